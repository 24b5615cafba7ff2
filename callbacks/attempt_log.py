"""Request log of API-served models."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from safervlm.io.tables import say
from safervlm.records import read_torn_jsonl, to_line, write_jsonl
from safervlm.run_folder import RunFolder
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.client import Server


class AttemptFile:
    """A JSONL log of requests, one line per request.

    Args:
        path: The file. An existing one is appended to, after a torn last line has been removed.
    """

    def __init__(self, path: Path) -> None:
        if path.is_file():
            write_jsonl(path, read_torn_jsonl(path))  # a process that was killed may have left a torn line
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, attempt: dict[str, Any]) -> None:
        """Appends an attempt and flushes the file.

        Args:
            attempt: As :attr:`safervlm.vlm.server.client.Server.on_attempt` receives it.
        """
        self._file.write(to_line(attempt))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class AttemptLog(Callback):
    """Prints an estimate of the work before the first request, and logs every request to a server.

    Each process appends one line per request to its ``attempts-RANK.jsonl`` in the run folder: the question's id, the
    time, the server, the HTTP status, the outcome, the duration, and whether it is about the odds. Texts, images and
    keys are not logged. The callback must come after the RecordWriter, which determines the questions that have a
    response already. It does nothing for a VLM that is not a server.
    """

    def __init__(self) -> None:
        self._file: AttemptFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the estimate of the remaining questions."""
        vlm = getattr(pl_module, "vlm", None)
        if stage != "predict" or not isinstance(vlm, Server):
            return
        left = trainer.datamodule.remaining()  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            sampling: Sampling = pl_module.sampling  # type: ignore[assignment]
            say(vlm.estimate([example.question for example in left], sampling.max_new_tokens))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens this process's log and registers it with the server."""
        vlm = getattr(pl_module, "vlm", None)
        if not isinstance(vlm, Server):
            return
        self._file = AttemptFile(RunFolder(trainer.default_root_dir).attempts(trainer.global_rank))
        vlm.on_attempt = self._file.write

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the file."""
        self.on_predict_end(trainer, pl_module)
