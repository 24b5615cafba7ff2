"""``safervlm fit | validate | predict``: Lightning's command line with our run folder, links and one-line errors."""

import contextlib
import logging
import math
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from safervlm.cli.arguments import prepared
from safervlm.cli.messages import one_line
from safervlm.data.suite import Suite
from safervlm.errors import ArgumentError, UserError, explained
from safervlm.io.boundary import causes, fail, run_folder, warn
from safervlm.io.files import write_atomically
from safervlm.io.seals import differences, origin_of, verify_seal
from safervlm.io.signals import exit_code
from safervlm.io.tables import say
from safervlm.objectives.base import Objective
from safervlm.records import FAILED, UNJUDGED, read_jsonl
from safervlm.run import RunManifest, read_manifest, stage_name
from safervlm.vlm.server.client import Server


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line: the argument, the value, the way out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # --trainer.max_step would pass as an abbreviation of --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the line and ends with exit code 2."""
        known = [action.dest for action in self._actions]
        fail(one_line(message, sys.argv[1:], known))


class ConfigInRunFolder(SaveConfigCallback):
    """Saves the configuration in the run folder, whatever the logger: its own place would be the logger's folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes ``fit.yaml``, ``validate.yaml`` or ``predict.yaml``.

        Args:
            trainer: knows the run folder.
            pl_module: not looked at.
            stage: not looked at.
        """
        # With what is none: left out, it would be the default when the file is run again.
        text = self.parser.dump(self.config, skip_unset=False)
        path = Path(trainer.default_root_dir) / self.config_filename
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def check_trainer(command: str, settings: Namespace) -> None:
    """Rejects what would train on nothing, before anything is read.

    Args:
        command: ``fit``, ``validate`` or ``predict``.
        settings: of the command, parsed.

    Raises:
        ArgumentError: zero steps, or a checkpoint that isn't there.
    """
    zero = {
        "fit": ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches"),
        "validate": ("limit_val_batches",),
        "predict": ("limit_predict_batches",),
    }[command]
    for name in zero:
        value = settings["trainer"].get(name)
        if value is not None and value is not False and value == 0:
            raise ArgumentError(
                f"--trainer.{name}: {value} leaves nothing to do for {command}; give more, or leave it out"
            )
    check_bounds(settings["trainer"])
    given = settings.get("ckpt_path")
    if given is not None and command == "predict":
        raise ArgumentError(f"--ckpt_path: predict takes none, got {given!r}; give --model.vlm.adapter RUN/adapter")
    if given is not None and not Path(given).exists():
        last = Path(settings["run"]) / "checkpoints" / "last.ckpt"
        raise ArgumentError(f"--ckpt_path: no file {given!r}; leave it out to take {last}")
    if given is not None and Path(given).is_file() and not Path(given).stat().st_size:
        raise ArgumentError(f"--ckpt_path: {given!r} is empty; take an earlier copy, or delete it and train again")


def check_bounds(trainer: Namespace) -> None:
    """Rejects numbers that Lightning takes, and which then stop or change the training, or that it refuses late.

    Args:
        trainer: its settings, parsed.

    Raises:
        ArgumentError: a number is out of its range.
    """
    shares = [name for name in ("train", "val", "test", "predict") if f"limit_{name}_batches" in trainer]
    for name in ("val_check_interval", "gradient_clip_val", *(f"limit_{share}_batches" for share in shares)):
        value = trainer.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if name.startswith("limit_"):
            fits, bounds = (
                value >= 0 and (isinstance(value, int) or value <= 1),
                "a share from 0 to 1, or whole batches",
            )
        elif name == "gradient_clip_val":
            fits, bounds = 0 <= value < math.inf, "a number, 0 clips nothing"
        else:
            fits, bounds = 0 < value < math.inf, "above 0"
        if not fits:
            raise ArgumentError(f"--trainer.{name}: {bounds}, got {value}; correct it, or leave it out")


class SaferCLI(LightningCLI):
    """Lightning's command line with a run folder and our links."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=ConfigInRunFolder,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [RunManifest()],
                # The data shards itself, and the run folder holds what these would write elsewhere.
                "use_distributed_sampler": False,
                "logger": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
            },
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments that the command line fills in by itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, and what goes from one part to another."""
        parser.add_argument(
            "--run",
            type=str,
            default="runs/unnamed",
            help="Folder of the run: everything is written there; the same command again goes on where it stopped.",
        )
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("model.collator", "data.init_args.collator", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; Lightning's own warns when it is given a line, as ``demo`` gives it many."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Passes over Lightning's reading of settings from a checkpoint: the command line and its files have them all.

        A checkpoint is verified where it is loaded, and not read before.
        """

    def before_instantiate_classes(self) -> None:
        """Refuses a recipe of another command before anything is read."""
        assert self.subcommand is not None  # noqa: S101 (we always have one; for the type checker)
        path = self.config[self.subcommand]["model"]["class_path"]
        step = {"fit": "training_step", "validate": "validation_step", "predict": "predict_step"}
        can = [command for command, name in step.items() if is_overridden(name, resolve_name(path), LightningModule)]
        if self.subcommand not in can:
            fail(f"--config: {path} is not for {self.subcommand}; use safervlm {' or '.join(can)}, or another recipe")
        check_trainer(self.subcommand, self.config[self.subcommand])
        self.save_config_kwargs["config_filename"] = f"{self.subcommand}.yaml"

    def instantiate_classes(self) -> None:
        """Makes the run folder, then trainer, model and data; without these, no empty folder stays behind."""
        assert self.subcommand is not None  # noqa: S101 (we always have one; for the type checker)
        run = Path(self.config[self.subcommand]["run"])
        made = [folder for folder in (run, *run.parents) if not folder.exists()]
        with explained(
            f"--run: the folder {str(run)!r} can't be made", "name another one", OSError, error=ArgumentError
        ):
            run.mkdir(parents=True, exist_ok=True)
        run_folder.set(run)
        try:
            self.instantiate_parts()
        except BaseException:
            for folder in made:
                with contextlib.suppress(OSError):  # something lies in it
                    folder.rmdir()
            raise

    def instantiate_parts(self) -> None:
        """Makes trainer, model and data.

        Raises:
            ArgumentError: a class can't be made of its arguments.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse's page about a class that can't be made; one of ours within it is said by itself.
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
        """Plays the command. Ctrl-C ends with 130: Lightning's 1 tells a driver to go on with its next run."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as end:
            if end.code == 1 and self.trainer.interrupted:
                raise SystemExit(128 + signal.SIGINT) from None
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Predictions go to files as they come; collected, they would fill the memory."""
        given = super()._prepare_subcommand_kwargs(subcommand)
        # A checkpoint is data; it is never trusted to run code.
        return given | ({"return_predictions": False} if subcommand == "predict" else {}) | {"weights_only": True}

    def before_fit(self) -> None:
        """Goes on from the run's last checkpoint unless another one is named."""
        self.take_last_checkpoint("fit")

    def before_validate(self) -> None:
        """Looks at the run's last checkpoint unless another one is named."""
        self.take_last_checkpoint("validate")

    def take_last_checkpoint(self, command: str) -> None:
        """Makes the run's last checkpoint the one to load, if there is one and none is named."""
        config = self.config_init[command]
        given, last = config["ckpt_path"], Path(config["run"]) / "checkpoints" / "last.ckpt"
        if given is not None or last.exists():
            origin = origin_of(self.model)
            # What a checkpoint is validated on need not be what it was trained by.
            ignore = set() if command == "fit" else origin.keys() - {"class", "vlm", "lora"}
            # Where the settings are not those of the run, its manifest says so, those of the data included.
            stage = read_manifest(Path(config["run"]))["stages"].get(stage_name(self.model), {})
            of_run = stage.get("settings", {}).get("model")
            other = given is None and of_run is not None and differences(of_run, origin, {"class", *ignore})
            verify_seal(last if given is None else Path(given), None if other else origin, ignore=ignore)
        if given is None and last.exists():
            say(f"{'going on from' if command == 'fit' else 'looking at'} {last}")
            config["ckpt_path"] = str(last)
        elif given is None and command == "validate" and isinstance(self.model, Objective):
            fail(f"--run: no {last}, so the adapter would be an untrained one; name the run of a fit, or --ckpt_path")

    def before_predict(self) -> None:
        """A server's dry run says what there is to ask, and ends before anything is written."""
        vlm = getattr(self.model, "vlm", None)
        if isinstance(vlm, Server) and vlm.dry_run:
            self.datamodule.prepare_data()
            questions = [example.question for example in self.datamodule.parts.predict]
            say(vlm.estimate(questions, self.model.sampling.max_new_tokens))
            sys.exit(0)

    def after_predict(self) -> None:
        """Says what has no answer, as the last thing, and in the exit code."""
        if not self.trainer.is_global_zero:
            return
        failed = Path(self.config_init["predict"]["run"]) / FAILED
        reasons = [record["reason"] for record in read_jsonl(failed)] if failed.exists() else []
        unjudged = failed.with_name(UNJUDGED)
        not_judged = [record["reason"] for record in read_jsonl(unjudged)] if unjudged.exists() else []
        left_out = self.datamodule.left_out if isinstance(self.datamodule, Suite) else {}
        for name, reason in left_out.items():
            warn(f"{name} was left out: {reason}; the same command asks it when it is there")
        if reasons:
            warn(
                f"{len(reasons)} questions have no answer, for example: {reasons[0]}; {failed} has them all, the same "
                "command asks them again"
            )
        if not_judged:
            warn(
                f"{len(not_judged)} answers have no verdict, for example: {not_judged[0]}; {unjudged} has them all, "
                "the same command judges them again"
            )
        stages = read_manifest(failed.parent)["stages"]
        ratings = stages.get("ratings", {"finished": True})
        rated = sum(example.question.capability == "rated" for example in self.datamodule.parts.predict)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        # By its name: the callbacks stand above this layer.
        judged = any(type(each).__name__ == "RateResponses" for each in callbacks)
        if rated and not judged and "ratings" not in stages:
            warn(
                f"{rated} answers wait for a model that rates them: give the same command a judge, --config "
                "configs/rate.yaml"
            )
        if not ratings["finished"]:
            warn("ratings are missing, see above; the same command asks for them again")
        if reasons or not_judged or left_out or not ratings["finished"]:
            sys.exit(3)


class IdleCLI(SaferCLI):
    """A command line that is understood and runs nothing.

    Args:
        args: the words, the command first.
        build: whether model, data and trainer are made.
    """

    def __init__(self, args: Sequence[str], build: bool) -> None:
        self._build = build
        super().__init__(args)

    def instantiate_classes(self) -> None:
        """Builds what is asked for."""
        if self._build:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Leaves model, data and trainer to whoever asked."""


@contextlib.contextmanager
def as_command_line(args: Sequence[str]) -> Iterator[None]:
    """Makes ``sys.argv`` the line that is played: the manifest records it, and Lightning starts more processes by it.

    The first word stays: it is the script that those processes run.
    """
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before


def hush() -> None:
    """Passes over what the libraries say to their developers, and what is no news to a user."""
    for message in (
        r".*LeafSpec",  # torch to Lightning
        r".*is_gradient_checkpointing",  # transformers to PEFT
        r".*JsonargparseDeprecation|.*was deprecated in v4",  # jsonargparse to Lightning
        r".*does not have many workers",  # images are small next to a VLM
        r".*across ranks is zero",  # nothing is held out
        r".*You passed in a `val_dataloader` but",  # GenerationCheck asks the held-out images
        r".*`predict_dataloader` returned 0 batches|.*eval mode at the start of training",
    ):
        warnings.filterwarnings("ignore", message)
    news = re.compile(r"(?!.*(Tip:|TPU available|weights_only|to estimate number of stepping))", re.DOTALL)
    rank_zero = "lightning.pytorch.utilities.rank_zero"
    for name in (rank_zero, "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(lambda record: bool(news.match(record.getMessage())))


def run(args: Sequence[str]) -> None:
    """Plays one command line."""
    hush()
    # A user's own objective beside the shell's folder can be named; appended, so that it never takes a package's place.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    with as_command_line(args):
        try:
            SaferCLI(prepared(args))
        except SIGTERMException:
            # Lightning ends with 0, and a driver would take the run for finished.
            raise SystemExit(exit_code()) from None
