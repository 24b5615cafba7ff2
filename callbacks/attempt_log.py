"""What asking a server took."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from safervlm.io.tables import say
from safervlm.records import read_torn_jsonl, to_line, write_jsonl
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.client import Server


class AttemptFile:
    """A history of requests: a line a request, as it comes.

    Args:
        path: goes on with the file that is there.
    """

    def __init__(self, path: Path) -> None:
        if path.is_file():
            write_jsonl(path, read_torn_jsonl(path))  # a process that was killed may have left half a line
        self._file = path.open("a", encoding="utf-8")

    def write(self, attempt: dict[str, Any]) -> None:
        """Appends what :attr:`safervlm.vlm.server.client.Server.on_attempt` is told."""
        self._file.write(to_line(attempt))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class AttemptLog(Callback):
    """Says before the first request how much there is to ask, and keeps the history of all requests to a server.

    Each process appends to its ``attempts-RANK.jsonl`` in the run folder a line a request, as it comes: the question's
    id, when, which server, the HTTP status, what came of it and how long it took; no text, no image, no key. It stands
    behind the RecordWriter, which finds out what has its answer already. A VLM that is no server is left alone.
    """

    def __init__(self) -> None:
        self._file: AttemptFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the estimate."""
        vlm = getattr(pl_module, "vlm", None)
        if stage != "predict" or not isinstance(vlm, Server):
            return
        left = trainer.datamodule.remaining()  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            sampling: Sampling = pl_module.sampling  # type: ignore[assignment]
            say(vlm.estimate([example.question for example in left], sampling.max_new_tokens))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file."""
        vlm = getattr(pl_module, "vlm", None)
        if not isinstance(vlm, Server):
            return
        self._file = AttemptFile(Path(trainer.default_root_dir) / f"attempts-{trainer.global_rank}.jsonl")
        vlm.on_attempt = self._file.write

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the file."""
        self.on_predict_end(trainer, pl_module)
