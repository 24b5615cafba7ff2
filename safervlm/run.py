"""Run directory layout and manifest.

``manifest.json`` has one entry per stage that ran in the folder, keyed by the lower-case name of its module
(``measure``, ``panel``, ``sft``): ``settings``, which determine the result, and ``provenance``, which documents how it
was made. A stage that runs again in the folder must have the same settings. It then resumes, and ``continued`` records
the time, the command, and each changed item of the provenance.
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
    """Raised if a run folder was made with other settings."""


def read_manifest(run: Path) -> dict[str, Any]:
    """Reads the manifest of a run folder; returns an empty manifest if there is none.

    Args:
        run: Run folder.

    Raises:
        RecordError: The file is damaged or not a manifest.
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
    """Rejects a run folder whose results were made with other settings.

    A folder without results is accepted. These differences are ignored: the images, if questions failed, because
    replacing an image is the remedy that a failure names; datasets of a :class:`safervlm.data.suite.Suite` that are not
    both asked now and asked before; and the location of an adapter, as its weights identify it.

    Args:
        run: Run folder.
        stage: Name of the stage.
        settings: Settings of the stage now; values must be serialisable as JSON.

    Raises:
        SettingsDifferError: Settings differ; the message names at most five.
        RecordError: The manifest is damaged.
    """
    there = read_manifest(run)["stages"].get(stage)
    if there is None or not has_results(run):
        return
    # Settings are compared after a round trip through JSON, which turns tuples into lists.
    if not isinstance(there.get("settings"), dict):
        raise RecordError(
            f"{run / MANIFEST}: damaged ({stage} has no settings); restore it, or name another run folder"
        )
    before, now = with_todays_names(dict(flat(there["settings"]))), dict(flat(json.loads(json.dumps(settings))))
    if "trainer" not in settings:  # validation of a fitted module: the trainer's settings are not compared
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
        differing.sort(key=lambda key: key.endswith((".ids", ".content", ".images", ".sha256")))  # hashes last
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise SettingsDifferError(
            f"--run: {run} holds a {stage} made with other settings: {shown}{more}; name another folder, or delete it"
        )


def has_results(run: Path) -> bool:
    """Returns whether a run folder holds results, and not only the settings that it was started with.

    Args:
        run: Run folder.
    """
    return any(map(is_result, run.rglob("*")))


def is_result(path: Path) -> bool:
    """Returns whether a file of a run folder is a result: non-empty, and no settings, manifest, lock or temporary file.

    Args:
        path: File or folder; a folder is no result.
    """
    if path.suffix == ".yaml" or path.name in (MANIFEST, LOCK, "traceback.txt") or path.name.startswith(TEMPORARY):
        return False
    return path.is_file() and path.stat().st_size > 0


def lock(run: Path) -> TextIO | None:
    """Locks a run folder against other commands until the returned file is closed or the process dies.

    Unfinished files of commands that died are removed.

    Args:
        run: Run folder.

    Returns:
        The open lock file; None if the file can't be opened or the file system has no locks.

    Raises:
        RecordError: Another process holds the lock.
    """
    try:
        file = (run / LOCK).open("a+", encoding="ascii", errors="replace")
    except OSError:
        return None  # writing the results raises its own error
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
    with suppress(OSError):  # on a full disk, writing the results raises its own error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    remove_unfinished(run)
    return file


def _at_work(file: TextIO) -> str:
    """Returns a description of the command that holds a lock, with its process id, for the error message."""
    file.seek(0)
    process = file.read(20).strip()
    return f"another command (process {process})" if process.isdecimal() else "another command"


def refuse_while_at_work(run: Path) -> None:
    """Rejects reading a run folder while another command writes to it, as its files may be inconsistent.

    Any number of commands may read at the same time. No write permission is needed.

    Args:
        run: Run folder.

    Raises:
        RecordError: Another process holds the lock.
    """
    try:
        file = (run / LOCK).open(encoding="ascii", errors="replace")
    except OSError:
        return  # the folder was never locked, or its lock can't be read
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
    """Context manager that locks a run folder against other commands (see :func:`lock`).

    Args:
        run: Run folder.

    Raises:
        RecordError: Another process holds the lock.
    """
    file = lock(run)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def remove_unfinished(run: Path) -> None:
    """Removes the unfinished files that dead commands left in a run folder, and nothing else.

    Args:
        run: Run folder, which must be locked.
    """
    for folder in (run, run / "checkpoints", run / "adapter"):
        remove_leftovers(folder)
    # Names of the temporary files of older versions.
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
    """Merges values into a stage's entry of the manifest.

    Args:
        run: Run folder.
        stage: Name of the stage.
        **entry: Values to set, such as ``settings`` or ``finished``.

    Raises:
        RecordError: The existing manifest is damaged.
        OSError: The manifest can't be written.
    """
    manifest = read_manifest(run)
    manifest["stages"][stage] = manifest["stages"].get(stage, {}) | entry
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(run / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def finished(run: Path, stage: str) -> bool:
    """Returns whether a stage of a run is complete.

    Args:
        run: Run folder.
        stage: Name of the stage.
    """
    return bool(read_manifest(run)["stages"].get(stage, {}).get("finished"))


def stage_name(module: LightningModule) -> str:
    """Returns the name of a module's stage in the manifest.

    Args:
        module: Module of the stage.
    """
    return type(module).__name__.lower()


class Signals(_SignalConnector):
    """Signal connector of Lightning that uses the request handling of :mod:`safervlm.io.signals`.

    Lightning's own handler communicates with the other processes from within the handler, and may block forever.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.agreed: bool | None = None
        super().__init__(trainer)

    @property
    def received_sigterm(self) -> bool:
        """Whether to end now. During training it changes only when all processes have agreed, and can save."""
        return asked_to_end() if self.agreed is None else self.agreed

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        """Ignores the assignment; Lightning initialises the flag with False.

        Args:
            value: Ignored.
        """

    def register_signal_handlers(self) -> None:
        """Registers Lightning's handlers, for Slurm's signals, but keeps our handler of SIGTERM."""
        ours = signal.getsignal(signal.SIGTERM)
        super().register_signal_handlers()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def agree_to_end(trainer: Trainer, save: bool = False) -> tuple[bool, bool]:
    """Returns whether any process is asked to end, and whether any wants to save; a collective operation.

    All processes must call it after the same step.

    Args:
        trainer: Trainer of the fit; it ends after this step if the first value is True.
        save: Whether this process wants to save a checkpoint, which may depend on its clock.
    """
    connector = trainer._signal_connector
    here = torch.tensor([trainer.received_sigterm or asked_to_end(), save], dtype=torch.int64)
    ends, saves = trainer.strategy.reduce(here.to(trainer.strategy.root_device), reduce_op="sum").tolist()
    if isinstance(connector, Signals):
        connector.agreed = bool(ends)
    return bool(ends), bool(saves)


class RunManifest(Callback):
    """Callback that writes the manifest and locks the run folder. It rejects a folder made with other settings."""

    def __init__(self) -> None:
        self._lock: TextIO | None = None
        self._waits = False
        # Must be set before Lightning launches the other processes of the run.
        subprocess_script._launch_process_observer = observe

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Locks the folder, checks the settings and writes the stage's entry, before any weight is loaded."""
        run, name = Path(trainer.default_root_dir), stage_name(pl_module)
        trainer._signal_connector = Signals(trainer)
        together(trainer.global_rank)
        refusal = ""
        if trainer.is_global_zero and stage != "validate":
            try:
                self._lock = lock(run)
            except RecordError as error:
                refusal = str(error)
        if refusal := trainer.strategy.broadcast(refusal):  # raised on all processes, so that none waits
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
            if "sets" in settings["data"]:  # keep the datasets that were asked before
                before = there.get("settings", {}).get("data", {}).get("sets", {})
                settings["data"]["sets"] = before | settings["data"]["sets"]
            continued: list[dict[str, Any]] = []
            if "provenance" in there and has_results(run):
                first, now = there["provenance"], provenance
                kept = {key: value for key, value in now.items() if key == "started" or value != first.get(key)}
                provenance, continued = first, [*there.get("continued", []), kept]
            write_stage(run, name, settings=settings, provenance=provenance, continued=continued, finished=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defers requests to end until the current step is complete."""
        self._wait()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops deferring requests to end: what follows can be repeated."""
        self._pass()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defers requests to end until the current batch is written."""
        self._wait()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops deferring requests to end before callbacks that merge and judge, which can be repeated."""
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
        """Releases the lock and, after a request to end, prints how to resume."""
        with suppress(SystemExit):  # the exception at hand already ends the run
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
        """Marks the stage as finished; Lightning doesn't call this after an interruption."""
        if trainer.is_global_zero and stage != "validate":
            run = Path(trainer.default_root_dir)
            # These files list questions without a response, and responses without a verdict or rating.
            complete = stage != "predict" or not any(run.glob("*-failed.jsonl"))
            write_stage(run, stage_name(pl_module), finished=complete)
            there = [path for path in run.iterdir() if path.name != LOCK]
            names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in there)
            say(f"{run} holds {', '.join(names)}")
        self._unlock()
        trainer.strategy.barrier("run-manifest-end")
        apart()
