"""``safervlm fit | validate | predict``: Lightning's command line with our run folder, links and one-line errors."""

import contextlib
import difflib
import inspect
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse._util import import_object
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from safervlm.checkpoints import differences, origin_of, verify
from safervlm.data.suite import Suite
from safervlm.objectives.base import Objective
from safervlm.records import FAILED, read_jsonl
from safervlm.run import RunManifest, read_manifest, stage_name
from safervlm.vlm.api import Server
from safervlm.vlm.lora import LoRA
from safervlm.vlm.sampling import Sampling

PACKAGE = Path(__file__).parent
# In a wheel the recipes lie inside the package, in a source tree beside it.
CONFIGS = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line: the argument, the value, the way out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # --trainer.max_step would pass as an abbreviation of --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the line and ends with exit code 2."""
        known = [action.dest for action in self._actions]
        fail(one_line(message, sys.argv[1:], known))


def fail(line: str) -> NoReturn:
    """Ends with an error of one line and exit code 2."""
    sys.stderr.write(f"safervlm: error: {line}\n")
    sys.exit(2)


def our_error(error: BaseException | None) -> ValueError | None:
    """The error, among this one and those that led to it, that our own code raised for the user to read.

    None where there is none: a library's error is a defect, and needs its traceback.
    """
    roots = (PACKAGE, PACKAGE.parent / "callbacks")
    while error is not None:
        place = traceback.extract_tb(error.__traceback__)[-1:]
        if isinstance(error, ValueError) and any(Path(place[0].filename).is_relative_to(root) for root in roots):
            return error
        error = error.__cause__ or error.__context__
    return None


def one_line(message: str, typed: Sequence[str] = (), known: Sequence[str] = ()) -> str:
    """What matters of jsonargparse's message, which repeats itself over dozens of lines for a union of types.

    Args:
        message: as jsonargparse gives it; of a nested argument it names the last part alone.
        typed: the command line, to find the whole name in.
        known: names of arguments, for a misspelt one.
    """

    def find(pattern: str) -> str | None:
        found = re.search(pattern, message)
        return found[1] if found else None

    if required := find(r"arguments are required: (.*)"):
        way_out = "give a recipe, for example --config configs/measure.yaml" if "model" in required else "see --help"
        return f"missing: {required}; {way_out}"
    if unknown := find(r"[Uu]nrecognized arguments: *(\S+)"):
        name = unknown.lstrip("-").split("=")[0]
        parts = [part for part in ("data", "model", "trainer") if part in known]  # plain commands have none
        nested = [f"{part}.{name}" for part in parts if name in parameters(part)]
        meant = did_you_mean(nested[0] if nested else name, [*nested, *known])
        return f"unknown argument --{name}{meant}; --help lists all"
    if unknown := find(r"Option '([^']+)' is not accepted"):
        whole = argument(unknown, typed)
        if whole == unknown:  # nobody typed it
            names = [*parameters("data"), *parameters("model")]
            if unknown not in names and (close := difflib.get_close_matches(unknown, names, 1, cutoff=0.8)):
                return f"a config sets {unknown!r}, which its class doesn't take; did you mean {close[0]}?"
            return (
                f"a config sets {unknown!r}, which its class doesn't take: an overlay goes behind its own recipe, as "
                "in --config configs/sft.yaml --config configs/pictograms/sft.yaml"
            )
        stem = whole.removesuffix(unknown)
        others = [name for name in parameters(stem.split(".")[0]) if name != unknown]  # another class takes it
        meant = did_you_mean(unknown, others, stem)
        return f"unknown argument --{whole}{meant}; --help lists all"
    if unknown := find(r"does not accept option '([^']+)'"):
        return (
            f"a config has {unknown.split('.')[0]!r}, which is no part of a recipe: it is of another kind; a recipe "
            "has run, model, data, trainer; a part goes where it belongs, as in --model.vlm configs/vlm/NAME.yaml"
        )
    key = find(r"""[Pp]arser key ["']([^"']+)["']""") or ""
    if missing := find(r"File does not exist: '?([^'\n]+)"):
        # Of several of one name the nearest to the top.
        files = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: -len(path.parts))
        shipped = {path.stem: path.relative_to(CONFIGS.parent) for path in files}
        close = difflib.get_close_matches(Path(missing).stem, shipped, 1)
        hint = f"did you mean {shipped[close[0]]}?" if close else "see configs/"
        return f"--{key}: no file {missing!r}; {hint}"
    name = f"--{argument(key, typed)}: " if key else ""
    if reason := find(r"does not correspond to a subclass of (\w+)"):
        return f"{name}{find(r'Given value: (.*)') or 'the class'} is not a {reason}; name the class_path of one"
    if path := find(r"Problem with given class_path '([^']+)'"):
        reason = find(r"class_path '[^']+':\s+(.*)")
        return f"{name}no class {path!r} ({reason}); check the spelling"
    expected = [
        re.sub(r"^a |<class '|'>|typing\.", "", each) for each in re.findall(r"Expected (.+?)(?:\. Got|\n|$)", message)
    ]
    expected = [each for each in dict.fromkeys(expected) if each != "NoneType"]
    got = find(r"(?:Got value|Given value): (.*)")
    if expected and got is not None:
        choices = re.findall(r"'([^']+)'", " ".join(expected))
        close = difflib.get_close_matches(got, choices, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        if any("Sequence" in each for each in expected):
            meant = f"; write a list, '[{got}]'"
        kinds = re.sub(r"Literal\[(.*?)\]", r"\1", " or ".join(expected)).replace("collections.abc.Sequence", "a list")
        return f"{name}expected {kinds}, got {got!r}{meant}"
    return name + " ".join(line.strip(" -") for line in message.splitlines() if line.strip())


def argument(key: str, typed: Sequence[str]) -> str:
    """The whole name of an argument of which a message gives the end."""
    names = [each.lstrip("-").split("=")[0] for each in typed if each.startswith("--")]
    return next((name for name in names if name.replace("init_args.", "").endswith(key)), key)


def parameters(part: str) -> list[str]:
    """The names of all arguments that a part of the command line may take.

    Args:
        part: ``model`` and ``data`` stand for those of our classes that are imported; ``trainer``.
    """
    if part == "trainer":
        return list(inspect.signature(Trainer.__init__).parameters)
    kinds = LightningDataModule if part == "data" else (torch.nn.Module, LoRA, Sampling)
    modules = [module for name, module in sys.modules.items() if name.startswith(("safervlm.", "callbacks."))]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    ours = [value for value in classes if value.__module__.startswith("safervlm.") and issubclass(value, kinds)]
    return sorted({name for value in ours for name in inspect.signature(value.__init__).parameters})


def did_you_mean(name: str, names: Sequence[str], stem: str = "") -> str:
    """A hint at the name that was probably meant."""
    close = difflib.get_close_matches(name, names, 1, cutoff=0.6)
    return f"; did you mean --{stem}{close[0]}?" if close else ""


class SaferCLI(LightningCLI):
    """Lightning's command line with a run folder and our links."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
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

    def before_instantiate_classes(self) -> None:
        """Refuses a recipe of another command before anything is read."""
        assert self.subcommand is not None  # noqa: S101 (we always have one; for the type checker)
        path = self.config[self.subcommand]["model"]["class_path"]
        step = {"fit": "training_step", "validate": "validation_step", "predict": "predict_step"}
        can = [command for command, name in step.items() if is_overridden(name, import_object(path), LightningModule)]
        if self.subcommand not in can:
            fail(f"--config: {path} is not for {self.subcommand}; use safervlm {' or '.join(can)}, or another recipe")
        self.save_config_kwargs["config_filename"] = f"{self.subcommand}.yaml"

    def instantiate_classes(self) -> None:
        """Makes trainer, model and data; what they refuse is said in one line."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            fail(f"--trainer: {error}")
        except (TypeError, ValueError) as error:
            if (known := our_error(error)) is None:
                if "/lightning/" in traceback.extract_tb(error.__traceback__)[-1].filename:
                    fail(f"--trainer: {error}")
                raise
            fail(str(known))
        started, wanted = int(os.environ.get("WORLD_SIZE", 1)), self.trainer.num_devices * self.trainer.num_nodes
        if "TORCHELASTIC_RUN_ID" in os.environ and started != wanted:
            fail(
                f"--trainer.devices: torchrun has started {started} processes for a trainer of {wanted}; give "
                f"--trainer.devices {started} --trainer.strategy ddp (for each of several nodes its own, and "
                "--trainer.num_nodes)"
            )
        run = self.config[self.subcommand]["run"]
        try:
            Path(run).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--run: the folder {run!r} can't be made ({error.strerror}); name another one")

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
        if self.trainer.limit_train_batches == 0:
            fail("--trainer.limit_train_batches: 0 leaves nothing to train on; give 1.0")
        self.take_last_checkpoint("fit")

    def before_validate(self) -> None:
        """Looks at the run's last checkpoint unless another one is named."""
        if self.trainer.limit_val_batches == 0:
            fail("--trainer.limit_val_batches: 0 leaves nothing to validate; give 1.0")
        self.take_last_checkpoint("validate")

    def take_last_checkpoint(self, command: str) -> None:
        """Makes the run's last checkpoint the one to load, if there is one and none is named."""
        config = self.config_init[command]
        given, last = config["ckpt_path"], Path(config["run"]) / "checkpoints" / "last.ckpt"
        if given is not None and not Path(given).exists():
            fail(f"--ckpt_path: no file {given!r}; leave it out to take {last}")
        if given is not None or last.exists():
            origin = origin_of(self.model)
            # What a checkpoint is validated on need not be what it was trained by.
            ignore = set() if command == "fit" else origin.keys() - {"class", "vlm", "lora"}
            # Where the settings are not those of the run, its manifest says so, those of the data included.
            stage = read_manifest(Path(config["run"]))["stages"].get(stage_name(self.model), {})
            of_run = stage.get("settings", {}).get("model")
            other = given is None and of_run is not None and differences(of_run, origin, {"class", *ignore})
            verify(last if given is None else Path(given), None if other else origin, ignore=ignore)
        if given is None and last.exists():
            print(f"{'going on from' if command == 'fit' else 'looking at'} {last}")
            config["ckpt_path"] = str(last)
        elif given is None and command == "validate" and isinstance(self.model, Objective):
            fail(f"--run: no {last}, so the adapter would be an untrained one; name the run of a fit, or --ckpt_path")

    def before_predict(self) -> None:
        """A server's dry run says what there is to ask, and ends before anything is written."""
        vlm = getattr(self.model, "vlm", None)
        if isinstance(vlm, Server) and vlm.dry_run:
            self.datamodule.prepare_data()
            questions = [example.question for example in self.datamodule.parts.predict]
            print(vlm.estimate(questions, self.model.sampling.max_new_tokens))
            sys.exit(0)

    def after_predict(self) -> None:
        """Says what has no answer, as the last thing, and in the exit code."""
        if not self.trainer.is_global_zero:
            return
        failed = Path(self.config_init["predict"]["run"]) / FAILED
        reasons = [record["reason"] for record in read_jsonl(failed)] if failed.exists() else []
        left_out = self.datamodule.left_out if isinstance(self.datamodule, Suite) else {}
        for name, reason in left_out.items():
            sys.stderr.write(f"safervlm: {name} was left out: {reason}; the same command asks it when it is there\n")
        if reasons:
            sys.stderr.write(
                f"safervlm: {len(reasons)} questions have no answer, for example: {reasons[0]}; {failed} has them all, "
                "the same command asks them again\n"
            )
        stages = read_manifest(failed.parent)["stages"]
        ratings = stages.get("ratings", {"finished": True})
        rated = sum(example.question.capability == "rated" for example in self.datamodule.parts.predict)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        # By its name: the callbacks stand above this layer.
        judged = any(type(each).__name__ == "RateResponses" for each in callbacks)
        if rated and not judged and "ratings" not in stages:
            sys.stderr.write(
                f"safervlm: {rated} answers wait for a model that rates them: give the same command a judge, --config "
                "configs/rate.yaml\n"
            )
        if not ratings["finished"]:
            sys.stderr.write("safervlm: ratings are missing, see above; the same command asks for them again\n")
        if reasons or left_out or not ratings["finished"]:
            sys.exit(3)


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
    # What is typed most is short.
    args = [re.sub(r"^--limit(?==|$)", "--data.limit", argument) for argument in args]
    with as_command_line(args):
        try:
            SaferCLI([local_or_shipped(argument) for argument in args])
        except MisconfigurationException as error:
            fail(f"--trainer: {error}")
        except SIGTERMException:
            # Lightning ends with 0, and a driver would take the run for finished.
            raise SystemExit(128 + signal.SIGTERM) from None


def local_or_shipped(argument: str) -> str:
    """``configs/NAME.yaml`` means the shipped recipe where there is no such file here."""
    name, equals, value = argument.rpartition("=")
    if value.startswith("configs/") and not Path(value).exists():
        shipped = CONFIGS / value.removeprefix("configs/")
        return f"{name}{equals}{shipped}" if shipped.exists() else argument
    return argument
