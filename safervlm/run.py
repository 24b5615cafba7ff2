"""The run folder: where a run's files stand, and the manifest that says what made them.

``manifest.json`` holds an entry for each stage that ran in the folder, by the name of its module (``measure``,
``panel``, ``sft``): ``settings``, which decide the result, and ``provenance``, which is good to know. A stage that
comes again has to come with the same settings: then it goes on where it stopped, and ``continued`` says when, by which
command, and what of the provenance was another.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException

from safervlm.errors import RecordError
from safervlm.io.caches import TEMPORARY, remove_leftovers
from safervlm.io.files import write_atomically
from safervlm.io.reading import read_object
from safervlm.io.settings import flat
from safervlm.io.signals import apart, asked_to_end, observe, pass_safe_point, together, wait_for_safe_point
from safervlm.io.tables import say
from safervlm.legacy import with_todays_names
from safervlm.provenance import PACKAGES, git_commit
from safervlm.records import FAILED

MANIFEST = "manifest.json"
LOCK = ".lock"
OLD_NAMES = ("manifest", "responses", "responses-failed", "verdicts", "ratings", "scores", "labels", "verify", "report")


class SettingsDifferError(RecordError):
    """A run folder was made with other settings."""


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run folder; without one, an empty manifest.

    Raises:
        RecordError: the file is damaged or something else.
    """
    path = run / MANIFEST
    if not path.exists():
        return {"stages": {}}
    manifest = read_object(path, "restore it, or name another run folder", finite=False)
    stages = manifest.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise RecordError(f"{path}: damaged (no object with stages); restore it, or name another run folder")
    return manifest


def check_settings(run: Path, stage: str, settings: Mapping[str, Any]) -> None:
    """Refuses to go on in a folder that was made with other settings.

    A stage that left nothing behind is no obstacle. Where questions failed, the images may have been mended since: it
    is the way out that a failure names. Of several sets (:class:`safervlm.data.suite.Suite`) those are compared that
    are asked now and were asked before. An adapter is its weights, wherever they lie.

    Raises:
        SettingsDifferError: names the settings that differ, at most five.
    """
    there = read_manifest(run)["stages"].get(stage)
    if there is None or not has_results(run):
        return
    # Through JSON: a tuple there is a list here.
    if not isinstance(there.get("settings"), dict):
        raise RecordError(
            f"{run / MANIFEST}: damaged ({stage} has no settings); restore it, or name another run folder"
        )
    before, now = with_todays_names(dict(flat(there["settings"]))), dict(flat(json.loads(json.dumps(settings))))
    if "trainer" not in settings:  # validating what was fitted: how it was trained is none of its settings
        before = {key: value for key, value in before.items() if not key.startswith("trainer.")}
    both = set.intersection(
        *({key.split(".")[2] for key in each if key.startswith("data.sets.")} for each in (before, now))
    )
    differing = [
        key
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and not (key.startswith("data.sets.") and key.split(".")[2] not in both)
        and not key.endswith(".adapter.folder")
        and not (key.startswith("data.") and key.endswith(".images") and (run / FAILED).exists())
    ]
    if differing:
        differing.sort(key=lambda key: key.endswith((".ids", ".content", ".images", ".sha256")))  # hashes tell least
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise SettingsDifferError(
            f"--run: {run} holds a {stage} made with other settings: {shown}{more}; name another folder, or delete it"
        )


def has_results(run: Path) -> bool:
    """Whether a run folder holds more than the settings that it was started with."""
    return any(map(is_result, run.rglob("*")))


def is_result(path: Path) -> bool:
    """Whether a file of a run folder is more than the settings that it was started with."""
    if path.suffix == ".yaml" or path.name in (MANIFEST, LOCK, "traceback.txt") or path.name.startswith(TEMPORARY):
        return False
    return path.is_file() and path.stat().st_size > 0


def lock(run: Path) -> TextIO | None:
    """Keeps other commands out of a run folder, until the file that is given back is closed or the process dies.

    Returns:
        None on a file system without locks.

    Raises:
        RecordError: another process has the folder.
    """
    try:
        file = (run / LOCK).open("a+", encoding="ascii", errors="replace")
    except OSError:
        return None  # what can't be written says so by itself
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with file:
            raise RecordError(
                f"--run: {_at_work(file)} is at work in {run}; wait for its end, or name another folder"
            ) from None
    except OSError:
        file.close()
        return None
    with suppress(OSError):  # a full disk says so by itself
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    remove_unfinished(run)
    return file


def _at_work(file: TextIO) -> str:
    """The command that has locked a file, with the number of its process, for the error."""
    file.seek(0)
    process = file.read(20).strip()
    return f"another command (process {process})" if process.isdecimal() else "another command"


def refuse_while_at_work(run: Path) -> None:
    """For commands that only read a run folder: its files need not belong together while another command writes them.

    Several may read it at the same time, and none needs to write there.

    Raises:
        RecordError: another process has the folder.
    """
    try:
        file = (run / LOCK).open(encoding="ascii", errors="replace")
    except OSError:
        return  # nothing was ever at work, or it can't be told
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RecordError(
                f"{run}: {_at_work(file)} is at work in it; wait for its end, or copy the folder"
            ) from None
        except OSError:
            return


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within it other commands are kept out of a run folder.

    Raises:
        RecordError: another process has the folder.
    """
    file = lock(run)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def remove_unfinished(run: Path) -> None:
    """Removes what commands that died left unfinished in a run folder, which is locked; nothing else."""
    for folder in (run, run / "checkpoints", run / "adapter"):
        remove_leftovers(folder)
    # As older versions named their temporary files.
    pattern = re.compile(rf"\.({'|'.join(OLD_NAMES)})\.\d+\.(jsonl?|csv|xlsx|tex|html)")
    for file in run.glob(".*.*"):
        if pattern.fullmatch(file.name) and file.is_file():
            with suppress(OSError):
                file.unlink()
    checkpoints = run / "checkpoints"
    last = checkpoints / "last.ckpt"
    for name in ("next.ckpt", "other.ckpt", "link"):  # see callbacks.checkpoint
        path = checkpoints / name
        with suppress(OSError):
            if last.is_symlink() and last.readlink() == Path(name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def write_stage(run: Path, stage: str, **entry: Any) -> None:
    """Adds to a stage's entry of the manifest."""
    manifest = read_manifest(run)
    manifest["stages"][stage] = manifest["stages"].get(stage, {}) | entry
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(run / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def finished(run: Path, stage: str) -> bool:
    """Whether a stage of a run came to its end."""
    return bool(read_manifest(run)["stages"].get(stage, {}).get("finished"))


def stage_name(module: LightningModule) -> str:
    """The name of a stage in the manifest."""
    return type(module).__name__.lower()


class Signals(_SignalConnector):
    """What Lightning knows of requests to end: those of :mod:`safervlm.io.signals`.

    Lightning's own handler speaks to the other processes from within the handler, and may wait for them forever.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.agreed: bool | None = None
        super().__init__(trainer)

    @property
    def received_sigterm(self) -> bool:
        """Whether to end now. While training it changes only where all processes agree on it, and can save."""
        return asked_to_end() if self.agreed is None else self.agreed

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        """Lightning begins with False."""

    def register_signal_handlers(self) -> None:
        """Leaves SIGTERM to our handler; Slurm's other signals are Lightning's."""
        ours = signal.getsignal(signal.SIGTERM)
        super().register_signal_handlers()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def agree_to_end(trainer: Trainer, save: bool = False) -> tuple[bool, bool]:
    """Whether one of the processes is asked to end, and whether one wants to save; all ask after the same step.

    Args:
        trainer: of the fit; it ends after this step where the first answer is yes.
        save: whether this process wants to, which may depend on its clock.
    """
    connector = trainer._signal_connector
    here = torch.tensor([trainer.received_sigterm or asked_to_end(), save], dtype=torch.int64)
    ends, saves = trainer.strategy.reduce(here.to(trainer.strategy.root_device), reduce_op="sum").tolist()
    if isinstance(connector, Signals):
        connector.agreed = bool(ends)
    return bool(ends), bool(saves)


class RunManifest(Callback):
    """Writes the run's manifest, and refuses a folder made with other settings, or in which another command works."""

    def __init__(self) -> None:
        self._lock: TextIO | None = None
        self._waits = False
        # Before Lightning launches other processes of the run.
        subprocess_script._launch_process_observer = observe

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before any weight is read."""
        run, name = Path(trainer.default_root_dir), stage_name(pl_module)
        trainer._signal_connector = Signals(trainer)
        together(trainer.global_rank)
        refusal = ""
        if trainer.is_global_zero and stage != "validate":
            try:
                self._lock = lock(run)
            except RecordError as error:
                refusal = str(error)
        if refusal := trainer.strategy.broadcast(refusal):  # on all processes: none may wait for another
            raise RecordError(refusal)
        settings = {
            "model": pl_module.describe(),  # type: ignore[operator]
            "data": trainer.datamodule.describe(),  # type: ignore[attr-defined]
            "precision": str(trainer.precision),
        }
        if stage == "fit":
            settings["trainer"] = {
                "max_epochs": trainer.max_epochs,
                "max_steps": trainer.max_steps,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
                "gradient_clip_val": trainer.gradient_clip_val,
                "world_size": trainer.world_size,
            }
        check_settings(run, name, settings)
        trainer.strategy.barrier()
        if trainer.is_global_zero and stage != "validate":
            device = trainer.strategy.root_device
            provenance = {
                "command": " ".join(["safervlm", *sys.argv[1:]]),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {name: version(name) for name in PACKAGES},
                "python": sys.version.split()[0],
                "git_commit": git_commit(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                "strategy": type(trainer.strategy).__name__,
                "world_size": trainer.world_size,
            }
            there = read_manifest(run)["stages"].get(name, {})
            if "sets" in settings["data"]:  # those that were asked before stay on record
                before = there.get("settings", {}).get("data", {}).get("sets", {})
                settings["data"]["sets"] = before | settings["data"]["sets"]
            continued: list[dict[str, Any]] = []
            if "provenance" in there and has_results(run):
                first, now = there["provenance"], provenance
                kept = {key: value for key, value in now.items() if key == "started" or value != first.get(key)}
                provenance, continued = first, [*there.get("continued", []), kept]
            write_stage(run, name, settings=settings, provenance=provenance, continued=continued, finished=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a request to end waits for the end of the step."""
        self._wait()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows can be done again."""
        self._pass()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a request to end waits until the batch is written."""
        self._wait()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the callbacks that merge and judge, which can be done again."""
        self._pass()

    def _wait(self) -> None:
        if not self._waits:
            wait_for_safe_point()
        self._waits = True

    def _pass(self) -> None:
        waits, self._waits = self._waits, False
        if waits:
            pass_safe_point()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says how to resume after a request to end."""
        with suppress(SystemExit):  # the exception says it already
            self._pass()
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.is_global_zero:
            say("")
            say(f"stopped; the same command goes on from what is in {trainer.default_root_dir}")
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes that the stage came to its end; Lightning doesn't call this where it was interrupted."""
        if trainer.is_global_zero and stage != "validate":
            run = Path(trainer.default_root_dir)
            # What has no answer, no verdict or no rating is listed in such a file.
            complete = stage != "predict" or not any(run.glob("*-failed.jsonl"))
            write_stage(run, stage_name(pl_module), finished=complete)
            there = [path for path in run.iterdir() if path.name != LOCK]
            names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in there)
            say(f"{run} holds {', '.join(names)}")
        self._unlock()
        trainer.strategy.barrier("run-manifest-end")
        apart()
