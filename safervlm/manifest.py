"""Lightning callback that locks a run folder and writes its manifest."""

import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from safervlm.addresses import public_text
from safervlm.ending import OrderlyEnd
from safervlm.errors import RecordError
from safervlm.io.caches import LOCK
from safervlm.io.locks import Lock
from safervlm.io.signals import forget_peers
from safervlm.io.tables import say
from safervlm.provenance import PACKAGES, git_commit
from safervlm.run import check_settings, has_results, lock, read_manifest, write_stage
from safervlm.run_folder import RunFolder
from safervlm.schedules import follow_schedules
from safervlm.vlm.weights import HASHES

NOTHING_STORED = (
    "trainer.callbacks: none stores this training; for checkpoints, metrics and the adapter start from a recipe "
    "(--config configs/sft.yaml), or add callbacks.checkpoint.LastCheckpoint and callbacks.adapter_export.AdapterExport"
)


def stage_name(module: LightningModule) -> str:
    """Returns the name of a module's stage in the manifest.

    Args:
        module: Module of the stage.
    """
    return type(module).__name__.lower()


def share_hashes(trainer: Trainer, module: LightningModule) -> None:
    """Lets the first process hash the weights for all; a collective operation.

    Args:
        trainer: Trainer of the run.
        module: Module that names the weights.
    """
    if trainer.world_size == 1:
        return
    if trainer.is_global_zero:
        with suppress(Exception):  # every process raises it when it describes the module
            module.describe()  # type: ignore[operator]
    HASHES.update(trainer.strategy.broadcast(HASHES))


class RunManifest(Callback):
    """Callback that writes the manifest and locks the run folder. It rejects a folder made with other settings.

    Args:
        extend: Whether a training may be longer than it was in the folder.
    """

    def __init__(self, extend: bool = False) -> None:
        self.extend = extend
        self._lock: Lock | None = None
        self._end = OrderlyEnd()
        self._decoded: dict[str, str] = {}
        self._trained = self._said_checkpoint = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Locks the folder, checks the settings and writes the stage's entry, before any weight is loaded.

        Raises:
            RecordError: Another process uses the folder, or the run in it has other settings.
        """
        run, name = Path(trainer.default_root_dir), stage_name(pl_module)
        self._end.connect(trainer)
        refusal = ""
        if trainer.is_global_zero and stage != "validate":
            try:
                self._lock = lock(run)
            except RecordError as error:
                refusal = str(error)
        if refusal := trainer.strategy.broadcast(refusal):  # raised on all processes, so that none waits
            raise RecordError(refusal)
        share_hashes(trainer, pl_module)
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
        longer = check_settings(run, name, settings, self.extend)
        trainer.strategy.barrier()
        if trainer.is_global_zero and stage != "validate":
            device = trainer.strategy.root_device
            provenance: dict[str, Any] = {
                "command": " ".join(["safervlm", *map(public_text, sys.argv[1:])]),
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
                kept |= {"extended": longer} if longer else {}
                provenance, continued = first, [*there.get("continued", []), kept]
            write_stage(run, name, settings=settings, provenance=provenance, continued=continued, finished=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the checkpoint to resume from; prints and stores which share of the language model LoRA adapts.

        A training of adapters without any callback of a recipe is reported, as nothing of it would be stored.
        """
        self._say_checkpoint(trainer, "resuming from")
        adapted = getattr(getattr(pl_module, "vlm", None), "adapted", None)
        if trainer.is_global_zero and adapted is not None:
            say(str(adapted))
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            others = [each for each in callbacks if not type(each).__module__.startswith(("lightning.", "safervlm."))]
            if not others and not any(isinstance(each, ModelCheckpoint) for each in callbacks):
                say(NOTHING_STORED)
            write_stage(Path(trainer.default_root_dir), stage_name(pl_module), lora=adapted.describe())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints which checkpoint is validated."""
        if trainer.state.fn == "validate":
            self._say_checkpoint(trainer, "validating")

    def _say_checkpoint(self, trainer: Trainer, doing: str) -> None:
        # The settings have been checked by now.
        if trainer.is_global_zero and trainer.ckpt_path is not None and not self._said_checkpoint:
            self._said_checkpoint = True
            say(f"{doing} {trainer.ckpt_path}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the schedules' learning rates; defers requests to end until the current step is complete."""
        self._say_checkpoint(trainer, "resuming from")  # DeepSpeed restores it after on_fit_start
        follow_schedules(trainer)
        self._write_check(trainer, pl_module)
        self._end.defer()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops deferring requests to end: what follows can be repeated."""
        self._end.stop_deferring()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defers requests to end until the current batch is written."""
        self._write_check(trainer, pl_module)
        self._end.defer()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prints and stores how responses are decoded, which is known after the first batch."""
        self._write_decoding(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prints and stores how responses are decoded, if training samples any."""
        self._trained = True
        self._write_decoding(trainer, pl_module)

    def _write_decoding(self, trainer: Trainer, pl_module: LightningModule) -> None:
        decoded = getattr(getattr(pl_module, "vlm", None), "decoded", {})
        if trainer.is_global_zero and decoded and decoded != self._decoded:
            self._decoded = decoded
            say(f"decoding: {decoded['steps']} steps" + (f" ({decoded['reason']})" if "reason" in decoded else ""))
            write_stage(Path(trainer.default_root_dir), stage_name(pl_module), decoding=decoded)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops deferring requests to end before callbacks that merge and judge, which can be repeated."""
        self._end.stop_deferring()

    def _write_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stores the result of the model's self-check; the weights are loaded by then."""
        checked = getattr(getattr(pl_module, "vlm", None), "checked", None)
        if trainer.is_global_zero and checked:
            write_stage(Path(trainer.default_root_dir), stage_name(pl_module), self_check=checked)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Releases the lock and, after a request to end, prints how to resume."""
        with suppress(SystemExit):  # the current exception already ends the run
            self._end.stop_deferring()
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.is_global_zero:
            say("")
            say(f"stopped; the same command resumes from what is in {trainer.default_root_dir}")
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Marks the stage as finished; Lightning doesn't call this after an interruption."""
        if trainer.is_global_zero and stage != "validate":
            run = Path(trainer.default_root_dir)
            # These files list questions without a response or odds, and responses without a verdict or rating.
            failed = {*run.glob("*-failed.jsonl")}
            if not getattr(pl_module, "odds", False):
                failed -= {RunFolder(run).odds_failed}  # of an earlier command that stored odds
            complete = stage != "predict" or not failed
            write_stage(run, stage_name(pl_module), finished=complete)
            there = [path for path in run.iterdir() if path.name != LOCK]
            names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in there)
            if stage == "fit" and not self._trained:
                say("the training was complete: nothing was left to do; --extend with more epochs or steps extends it")
            say(f"{run} contains {', '.join(names)}")
        self._unlock()
        trainer.strategy.barrier("run-manifest-end")
        forget_peers()
