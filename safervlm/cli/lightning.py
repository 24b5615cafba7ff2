"""``safervlm fit | validate | predict``: Lightning's command line with a run folder, links and one-line errors."""

import contextlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers.utils.logging import disable_progress_bar

from safervlm.cli.arguments import prepared
from safervlm.cli.classes import import_classes
from safervlm.cli.family import with_class
from safervlm.cli.messages import one_line
from safervlm.cli.nulls import reject_nulls
from safervlm.cli.parser import ConfigInRunFolder, OneLineParser
from safervlm.cli.trainer import callbacks_with_lines, check_trainer, with_log_folders
from safervlm.data.suite import Suite
from safervlm.errors import ArgumentError, UserError, explained
from safervlm.io.boundary import causes, fail, run_folder, warn
from safervlm.io.checkpoints import unloadable
from safervlm.io.progress import in_terminal
from safervlm.io.seals import differences, origin_of, verify_seal
from safervlm.io.signals import exit_code
from safervlm.io.tables import say
from safervlm.io.trust import allow_imports_from_current_folder
from safervlm.manifest import RunManifest, stage_name
from safervlm.objectives.base import Objective
from safervlm.records import read_jsonl
from safervlm.run import read_manifest
from safervlm.run_folder import RunFolder
from safervlm.vlm.server.client import Server

# Texts of the help; otherwise they would be the first lines of Lightning's docstrings.
DESCRIPTIONS = {
    "fit": "Trains a model, for example: safervlm fit --config configs/ppo.yaml --run runs/ppo",
    "validate": "Computes the loss on held-out records: the command that trained, with validate instead of fit",
    "predict": "Measures or judges, for example: safervlm predict --config configs/measure.yaml --run runs/llava-7b",
}
GROUPS = {
    "model": "Model: an objective, a measurement or a judge (--model.help PPO lists the arguments of PPO)",
    "data": "Data: questions or training examples (--data.help UnsafeConcepts lists the arguments of UnsafeConcepts)",
    "trainer": "Trainer of PyTorch Lightning: devices, precision, length of the training",
}


class SaferCLI(LightningCLI):
    """Lightning's command line with a run folder and links between model, data and trainer.

    Args:
        args: Words of the command line, beginning with the command.
    """

    def __init__(self, args: Sequence[str]) -> None:
        import_classes()
        self._manifest = RunManifest()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=ConfigInRunFolder,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [self._manifest],
                # The data module shards the data itself. Logs and checkpoints are written to the run folder instead.
                "use_distributed_sampler": False,
                "logger": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
            },
            parser_class=OneLineParser,
            parser_kwargs={"prog": "safervlm"} | {name: {"description": text} for name, text in DESCRIPTIONS.items()},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the commands, each with the arguments of the trainer's method that the command line fills in."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"},
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Adds the argument that only ``fit`` has."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--extend",
                action="store_true",
                help="Resume the run with a larger --trainer.max_epochs or --trainer.max_steps than it was made with.",
            )
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the seed.

        Args:
            parser: Parser of a command.
        """
        parser.add_argument(
            "--seed_everything",
            type=bool | int,  # Lightning's; true is rejected with an explanation
            default=self.seed_everything_default,
            help="Seed of all random numbers; model and data receive it.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run folder, model, data and trainer, in the order of a help text.

        Args:
            parser: Parser of a command.
        """
        parser.add_argument(
            "--run",
            type=str,
            default="runs/unnamed",
            help="Folder of the run: everything is written there; the same command again resumes where it stopped.",
        )
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        for name, group in (parser.groups or {}).items():
            group.title = GROUPS.get(name, group.title)
        defaults = {f"trainer.{name}": value for name, value in self.trainer_defaults.items() if name != "callbacks"}
        parser.set_defaults(defaults)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the links between arguments.

        Args:
            parser: Parser of a command.
        """
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("model.collator", "data.init_args.collator", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments, without Lightning's warning about arguments that are given as a list, as ``demo`` does.

        Args:
            parser: Parser with the commands.
            args: Words of the command line.
        """
        self.config = parser.parse_args(with_class(parser, args))

    def _parse_ckpt_path(self) -> None:
        """Skips Lightning's reading of settings from a checkpoint: the command line and its files have all settings.

        A checkpoint is verified when it is loaded, and not read before.
        """

    def before_instantiate_classes(self) -> None:
        """Rejects a recipe of another command and invalid trainer settings before anything is loaded."""
        assert self.subcommand is not None  # noqa: S101 (we always have one; for the type checker)
        path = self.config[self.subcommand]["model"]["class_path"]
        step = {"fit": "training_step", "validate": "validation_step", "predict": "predict_step"}
        can = [command for command, name in step.items() if is_overridden(name, resolve_name(path), LightningModule)]
        if self.subcommand not in can:
            fail(f"--config: {path} is not for {self.subcommand}; use safervlm {' or '.join(can)}, or another recipe")
        reject_nulls(self.config[self.subcommand].as_dict())
        check_trainer(self.subcommand, self.config[self.subcommand])
        self.save_config_kwargs["config_filename"] = f"{self.subcommand}.yaml"

    def instantiate_classes(self) -> None:
        """Creates the run folder, then trainer, model and data; if these fail, the empty folder is removed.

        Raises:
            ArgumentError: The folder can't be created, or see :meth:`instantiate_parts`.
        """
        assert self.subcommand is not None  # noqa: S101 (we always have one; for the type checker)
        run = Path(self.config[self.subcommand]["run"])
        with explained(
            f"--run: the folder {str(run)!r} can't be created", "name another one", OSError, error=ArgumentError
        ):
            made = [folder for folder in (run, *run.parents) if not folder.exists()]
            run.mkdir(parents=True, exist_ok=True)
        run_folder.set(run)
        try:
            self.instantiate_parts()
        except BaseException:
            for folder in made:
                with contextlib.suppress(OSError):  # the folder is not empty
                    folder.rmdir()
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Creates the trainer, with lines instead of Lightning's progress bar if stderr is not a terminal.

        Args:
            **kwargs: Arguments of the trainer that replace those of the configuration.
        """
        self.config = self._as_given
        config = self.config[str(self.subcommand)]
        if self.subcommand == "fit":
            self._manifest.extend, config["extend"] = config["extend"], False  # fit.yaml repeats the run
        assert self.subcommand is not None  # noqa: S101 (we always have one; for the type checker)
        settings = self.config_init[self.subcommand]["trainer"]
        return super().instantiate_trainer(callbacks=callbacks_with_lines(settings), **kwargs)

    def instantiate_parts(self) -> None:
        """Creates trainer, model and data.

        Raises:
            ArgumentError: A class can't be instantiated with its arguments.
            SystemExit: torchrun has not started the number of processes that the trainer is configured for.
        """
        # The configuration is saved as given: a run that repeats it logs to its own folder.
        self._as_given, self.config = self.config, with_log_folders(self.config, str(self.subcommand))
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse's long message about a class that can't be instantiated. A UserError among its causes
            # propagates unchanged.
            page = "Problem with given class_path" in str(error) and traceback.extract_tb(error.__traceback__)[-1]
            if page and "/jsonargparse/" in page.filename and not any(isinstance(e, UserError) for e in causes(error)):
                raise ArgumentError(one_line(str(error), sys.argv[1:])) from error
            raise
        started, wanted = int(os.environ.get("WORLD_SIZE", 1)), self.trainer.num_devices * self.trainer.num_nodes
        if "TORCHELASTIC_RUN_ID" in os.environ and started != wanted:
            fail(
                f"--trainer.devices: torchrun has started {started} processes for a trainer of {wanted}; give "
                f"--trainer.devices {started} --trainer.strategy ddp (for each of several nodes its own, and "
                "--trainer.num_nodes)"
            )

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command. Ctrl-C exits with code 130; after Lightning's code 1 a driver would start its next run."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as end:
            if end.code == 1 and self.trainer.interrupted:
                raise SystemExit(128 + signal.SIGINT) from None
            raise
        except Exception as error:
            if (line := unloadable(error, str(self.config_init[subcommand].get("ckpt_path")))) is not None:
                raise line from error
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Disables collecting predictions, which are written to files and would otherwise fill the memory."""
        given = super()._prepare_subcommand_kwargs(subcommand)
        # weights_only: a checkpoint is data, and may not execute code.
        return given | ({"return_predictions": False} if subcommand == "predict" else {}) | {"weights_only": True}

    def before_fit(self) -> None:
        """Resumes from the run's last checkpoint unless another one is named."""
        self.set_checkpoint_to_load("fit")

    def before_validate(self) -> None:
        """Validates the run's last checkpoint unless another one is named."""
        self.set_checkpoint_to_load("validate")

    def set_checkpoint_to_load(self, command: str) -> None:
        """Verifies the checkpoint to load: the one that is named, or else the run's last one, if it exists.

        Args:
            command: ``fit`` or ``validate``.

        Raises:
            RecordError: The checkpoint is damaged or was made with other settings.
            SystemExit: An objective is to be validated without any checkpoint.
        """
        config = self.config_init[command]
        given, last = config["ckpt_path"], RunFolder(config["run"]).last_checkpoint
        there = os.path.lexists(last)  # a link to a missing file does not count as a missing checkpoint
        if given is not None or there:
            origin = origin_of(self.model)
            # For validation only the class, the VLM and the adapter have to match.
            ignore = set() if command == "fit" else origin.keys() - {"class", "vlm", "lora"}
            # If the settings differ from those of the run, the check of its manifest reports it, including the data's.
            stage = read_manifest(Path(config["run"]))["stages"].get(stage_name(self.model), {})
            of_run = stage.get("settings", {}).get("model")
            other = given is None and of_run is not None and differences(of_run, origin, {"class", *ignore})
            verify_seal(last if given is None else Path(given), None if other else origin, ignore=ignore)
        if command == "fit" and config["extend"] and given is None and not there:
            raise ArgumentError(f"--extend: there is no {last} to resume from; name the run to extend, or leave it out")
        if given is not None:
            config["ckpt_path"] = str(Path(given).absolute())  # Lightning treats last, best and hpc as keywords
        elif there:
            config["ckpt_path"] = str(last)
        elif command == "validate" and isinstance(self.model, Objective):
            fail(f"--run: no {last}, so the adapter would be an untrained one; name the run of a fit, or --ckpt_path")

    def before_predict(self) -> None:
        """Prints the estimate of a server's dry run and exits before anything is written."""
        vlm = getattr(self.model, "vlm", None)
        if isinstance(vlm, Server) and vlm.dry_run:
            self.datamodule.prepare_data()
            questions = [example.question for example in self.datamodule.parts.predict]
            say(vlm.estimate(questions, self.model.sampling.max_new_tokens))
            sys.exit(0)

    def after_predict(self) -> None:
        """Reports missing responses, verdicts, ratings and datasets at the end, and exits with code 3 if there are any.

        Raises:
            SystemExit: With exit code 3, if results are missing.
        """
        if not self.trainer.is_global_zero:
            return
        files = RunFolder(self.config_init["predict"]["run"])
        reasons = [record["reason"] for record in read_jsonl(files.failed)] if files.failed.exists() else []
        not_judged = [record["reason"] for record in read_jsonl(files.unjudged)] if files.unjudged.exists() else []
        wants_odds = getattr(self.model, "odds", False) and files.odds_failed.exists()
        no_odds = [record["reason"] for record in read_jsonl(files.odds_failed)] if wants_odds else []
        left_out = self.datamodule.left_out if isinstance(self.datamodule, Suite) else {}
        for name, reason in left_out.items():
            warn(f"{name} was skipped: {reason}; the same command asks it once it is available")
        if reasons:
            warn(
                f"{len(reasons)} questions have no response, for example: {reasons[0]}; {files.failed} lists them, the "
                "same command asks them again"
            )
        if not_judged:
            warn(
                f"{len(not_judged)} responses have no verdict, for example: {not_judged[0]}; {files.unjudged} lists "
                "them, the same command judges them again"
            )
        if no_odds:
            warn(
                f"{len(no_odds)} questions have no odds, for example: {no_odds[0]}; {files.odds_failed} lists them, "
                "the same command computes them again"
            )
        stages = read_manifest(Path(files.path))["stages"]
        ratings = stages.get("ratings", {"finished": True})
        rated = sum(example.question.capability == "rated" for example in self.datamodule.parts.predict)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        # Compared by name: this layer may not import the callbacks.
        judged = any(type(each).__name__ == "RateResponses" for each in callbacks)
        if rated and not judged and "ratings" not in stages:
            warn(f"{rated} responses are not rated yet: add a judge to the same command, --config configs/rate.yaml")
        if not ratings["finished"]:
            warn("ratings are missing, see above; the same command asks for them again")
        if reasons or not_judged or no_odds or left_out or not ratings["finished"]:
            sys.exit(3)


class IdleCLI(SaferCLI):
    """Command line that is parsed but runs nothing.

    Args:
        args: Words of the command line, beginning with the command.
        build: Whether to create model, data and trainer.
    """

    def __init__(self, args: Sequence[str], build: bool) -> None:
        self._build = build
        super().__init__(args)

    def instantiate_classes(self) -> None:
        """Creates trainer, model and data, if requested."""
        if self._build:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing; the caller uses the parsed settings, or model, data and trainer."""


@contextlib.contextmanager
def as_command_line(args: Sequence[str]) -> Iterator[None]:
    """Context manager that sets the arguments in ``sys.argv``.

    The manifest records them, and Lightning starts further processes with them. The first word is kept: it is the
    script that those processes run.

    Args:
        args: Words of the command line, beginning with the command.
    """
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before


def silence_third_party() -> None:
    """Silences known third-party warnings and log messages that are not useful to users.

    If stderr is not a terminal, transformers' progress bars are silenced, too: they contain many control characters.
    """
    if not in_terminal():
        disable_progress_bar()
    for message in (
        r".*LeafSpec",  # torch, about Lightning's code
        r".*is_gradient_checkpointing",  # transformers, about PEFT's code
        r".*JsonargparseDeprecation|.*was deprecated in v4",  # jsonargparse, about Lightning's code
        r".*does not have many workers",  # loading images takes little time compared with a VLM
        r".*across ranks is zero",  # no validation data
        r".*You passed in a `val_dataloader` but",  # GenerationCheck uses the validation images
        r".*`predict_dataloader` returned 0 batches|.*eval mode at the start of training",
    ):
        warnings.filterwarnings("ignore", message)
    known = "Detected KeyboardInterrupt|Seed set to|Automatic Mixed Precision|TPU available|weights_only"
    known += "|to estimate number of stepping"
    news = re.compile(rf"(?!.*(Tip:|{known}))", re.DOTALL)
    for name in (
        "lightning.fabric.utilities.seed",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(lambda record: bool(news.match(record.getMessage())))


def run(args: Sequence[str]) -> None:
    """Runs one command line of fit, validate or predict.

    Args:
        args: Words of the command line, beginning with the command.

    Raises:
        SystemExit: The command was asked to end, or ended with an exit code other than 0.
    """
    silence_third_party()
    allow_imports_from_current_folder()  # a custom objective, for example
    with as_command_line(args):
        try:
            SaferCLI(prepared(args))
        except SIGTERMException:
            # Lightning would exit with 0, and a driver would treat the run as finished.
            raise SystemExit(exit_code()) from None
