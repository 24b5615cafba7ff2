"""Settings of the trainer: folders of loggers."""

import os

import pytest

from safervlm.cli.arguments import prepared
from safervlm.cli.lightning import IdleCLI
from safervlm.cli.trainer import with_log_folders

FIT = ["fit", "--config=configs/sft.yaml", "--run=runs/x"]


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["CSVLogger"], ["runs/x"]),
        (["TensorBoardLogger"], ["runs/x"]),
        (["WandbLogger"], ["runs/x"]),
        (["MLFlowLogger"], ["runs/x/mlruns"]),
        (["lightning.pytorch.loggers.CSVLogger"], ["runs/x"]),
        (["CSVLogger", "--trainer.logger.save_dir=logs"], ["logs"]),
        (["[{class_path: CSVLogger}, {class_path: WandbLogger, init_args: {save_dir: y}}]"], ["runs/x", "y"]),
        (["true"], []),
    ],
)
def test_a_logger_writes_to_the_run_folder_unless_it_has_another(given: list[str], folders: list[str]) -> None:
    cli = IdleCLI(prepared([*FIT, "--trainer.logger", *given]), build=False)
    before = cli.config.clone()
    loggers = with_log_folders(cli.config, "fit")["fit"]["trainer"]["logger"]
    loggers = loggers if isinstance(loggers, list) else [loggers] if loggers is not True else []
    assert [logger["init_args"]["save_dir"] for logger in loggers] == folders
    assert cli.config == before


@pytest.mark.parametrize(("given", "expected"), [(None, "true"), ("false", "false")])
def test_mlflow_may_write_to_a_folder(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise MLflow 3 raises an error."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", given or "")
    if given is None:
        monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    cli = IdleCLI(prepared([*FIT, "--trainer.logger", "MLFlowLogger"]), build=False)
    with_log_folders(cli.config, "fit")
    assert os.environ["MLFLOW_ALLOW_FILE_STORE"] == expected
