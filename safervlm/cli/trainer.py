"""Settings of the trainer: checks before anything is loaded, folders of loggers, progress output as lines."""

import inspect
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace
from lightning import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, MLFlowLogger

from safervlm.errors import ArgumentError
from safervlm.progress_lines import progress_lines
from safervlm.run_folder import RunFolder

# Numbers that Lightning does not check, with the smallest valid value of each.
LEAST = {
    **{"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "num_sanity_val_steps": -1},
    **{"min_epochs": 0, "min_steps": 0},
}


def check_trainer(command: str, settings: Namespace) -> None:
    """Rejects trainer settings that leave nothing to do, and invalid checkpoints, before data is loaded.

    Args:
        command: ``fit``, ``validate`` or ``predict``.
        settings: Parsed settings of the command.

    Raises:
        ArgumentError: Zero steps, no callbacks, a number out of range, or a checkpoint that is missing, empty or not
            applicable.
    """
    zero = {
        "fit": ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches"),
        "validate": ("limit_val_batches",),
        "predict": ("limit_predict_batches",),
    }[command]
    for name in zero:
        value = settings["trainer"].get(name)
        if value is not None and value is not False and value == 0:
            raise ArgumentError(f"--trainer.{name}: {value} leaves nothing to do for {command}; give more, or omit it")
    if command == "predict" and not settings["trainer"].get("callbacks"):
        raise ArgumentError(
            "--trainer.callbacks: there are none, so no result of predict would be stored; start from a recipe "
            "(--config configs/measure.yaml), or give at least callbacks.record_writer.RecordWriter"
        )
    duration = settings["trainer"].get("max_time")  # such as 00:12:00:00, or {hours: 12}
    if duration is not None and not re.search("[1-9]", str(duration)):
        raise ArgumentError(f"--trainer.max_time: {duration} leaves nothing to do for {command}; give more, or omit it")
    check_bounds(settings["trainer"])
    given = settings.get("ckpt_path")
    if given is not None and command == "predict":
        raise ArgumentError(f"--ckpt_path: predict takes none, got {given!r}; give --model.vlm.adapter RUN/adapter")
    if given is not None and not Path(given).exists():
        last = RunFolder(settings["run"]).last_checkpoint
        raise ArgumentError(f"--ckpt_path: no file {given!r}; leave it out to take {last}")
    if given is not None and Path(given).is_file() and not Path(given).stat().st_size:
        raise ArgumentError(f"--ckpt_path: {given!r} is empty; take an earlier copy, or delete it and train again")


def check_bounds(trainer: Namespace) -> None:
    """Rejects numbers that Lightning accepts but that stop or change the training, or that Lightning rejects late.

    Args:
        trainer: Parsed settings of the trainer.

    Raises:
        ArgumentError: A number is out of range.
    """
    shares = [name for name in ("train", "val", "test", "predict") if f"limit_{name}_batches" in trainer]
    for name in ("val_check_interval", "gradient_clip_val", *(f"limit_{share}_batches" for share in shares)):
        value = trainer.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if name.startswith("limit_"):
            # Python caches unions of types regardless of the order of their members: after other imports, "3" is
            # parsed as a float.
            if isinstance(value, float) and value > 1 and value.is_integer():
                value = trainer[name] = int(value)
            fits, bounds = (
                value >= 0 and (isinstance(value, int) or value <= 1),
                "a share from 0 to 1, or whole batches",
            )
        elif name == "gradient_clip_val":
            fits, bounds = 0 <= value < math.inf, "a number, 0 clips nothing"
        else:
            fits, bounds = 0 < value < math.inf, "above 0"
        if not fits:
            raise ArgumentError(f"--trainer.{name}: {bounds}, got {value}; correct it, or omit it")
    for name, least in LEAST.items():
        value = trainer.get(name)
        if value is not None and value < least:
            raise ArgumentError(f"--trainer.{name}: at least {least}, got {value}; correct it, or omit it")


def callbacks_with_lines(trainer: Mapping[str, Any]) -> list[Callback]:
    """Returns the trainer's callbacks, with lines of progress if stderr is not a terminal.

    Nothing is added if progress is disabled, or if the user has named a progress bar.

    Args:
        trainer: Settings of the trainer; its callbacks are instances.
    """
    given = trainer["callbacks"] or []
    callbacks = list(given) if isinstance(given, list) else [given]
    own = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return callbacks if own or trainer["enable_progress_bar"] is False else [*callbacks, *progress_lines()]


def has_folder(kind: type) -> bool:
    """Returns whether a class is a logger that writes to a folder, ``save_dir``.

    Args:
        kind: Class that a configuration names.
    """
    if not inspect.isclass(kind) or not issubclass(kind, Logger):
        return False
    return "save_dir" in inspect.signature(kind.__init__).parameters


def with_log_folders(config: Namespace, command: str) -> Namespace:
    """Returns a copy of the configuration in which loggers without a folder write to the run folder.

    Args:
        config: Parsed configuration with the settings of the command, whose loggers are not instantiated.
        command: ``fit``, ``validate`` or ``predict``.
    """
    config = config.clone()
    settings = config[command]
    given = settings["trainer"]["logger"]
    for logger in given if isinstance(given, list) else [given]:
        arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
        if arguments is not None and "save_dir" in arguments and arguments["save_dir"] is None:
            folder = Path(settings["run"])
            if mlflow := issubclass(resolve_name(logger["class_path"]), MLFlowLogger):
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 rejects folders without it
            arguments["save_dir"] = str(folder / "mlruns" if mlflow else folder)
    return config
