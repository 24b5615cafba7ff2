"""``safervlm fit | validate | predict``: Lightning's command line with our run folder, links and one-line errors."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from safervlm.run import RunManifest

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
        sys.stderr.write(f"safervlm: error: {one_line(message, self.arguments())}\n")
        sys.exit(2)

    def arguments(self) -> list[str]:
        """The names of all arguments, for a misspelt one."""
        return [action.dest for action in self._actions if action.dest not in ("help", "==SUPPRESS==")]


def one_line(message: str, arguments: Sequence[str] = ()) -> str:
    """What matters of jsonargparse's message, which repeats itself over dozens of lines for a union of types.

    Args:
        message: as jsonargparse gives it.
        arguments: the names to compare an unknown one with.
    """
    unknown = re.search(r"(?:Unrecognized arguments|unrecognized arguments): *(\S+)", message)
    if unknown:
        name = unknown[1].lstrip("-").split("=")[0]
        return f"unknown argument --{name}{nearest(name, arguments)}; see --help"
    key = re.search(r"(?:Key|Option|Group|Parser key) [\"']([\w.+]+)[\"']", message)
    lines = [line.strip(" -|") for line in message.splitlines()]
    lines = [line for line in lines if line and not re.match(r"(Problem with|Parser key|Given value|Subtypes)", line)]
    reason = lines[-1] if lines else message.strip()
    for pattern in (
        r"Key '[^']+' is not expected",
        r"Group '[^']+' does not accept nested key '[^']+'",
        r"Import path [^.]+(?:\.[^.\s]+)* does not correspond to a subclass of \S+",
        r"No module named '[^']+'",
        r"[^.]*Unable to load config[^.]*",
        r"Expected a [^\n]+",
        r"Value [^\n]+",
        r"Not a valid [^\n]+",
    ):
        found = re.search(pattern, message)
        if found:
            reason = found[0]
            break
    place = f"--{key[1]}: " if key and key[1] not in reason else ""
    return f"{place}{reason}"


def nearest(name: str, names: Sequence[str]) -> str:
    """A hint at the name that was probably meant."""
    close = difflib.get_close_matches(name, names, 1, cutoff=0.6)
    return f"; did you mean --{close[0]}?" if close else ""


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

    def before_fit(self) -> None:
        """Goes on from the run's last checkpoint unless another one is named."""
        config = self.config_init["fit"]
        last = Path(config["run"]) / "checkpoints" / "last.ckpt"
        if config["ckpt_path"] is None and last.exists():
            print(f"going on from {last}")
            config["ckpt_path"] = str(last)


@contextlib.contextmanager
def as_command_line(args: Sequence[str]) -> Iterator[None]:
    """Makes ``sys.argv`` the line that is played: Lightning compares with it, and the manifest records it."""
    before = sys.argv
    sys.argv = ["safervlm", *args]
    try:
        yield
    finally:
        sys.argv = before


def run(args: Sequence[str]) -> None:
    """Plays one command line."""
    # A user's own objective beside the shell's folder can be named; appended, so that it never takes a package's place.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with as_command_line(args):
        SaferCLI([local_or_shipped(argument) for argument in args])


def local_or_shipped(argument: str) -> str:
    """``configs/NAME.yaml`` means the shipped recipe where there is no such file here."""
    name, equals, value = argument.rpartition("=")
    if value.startswith("configs/") and not Path(value).exists():
        shipped = CONFIGS / value.removeprefix("configs/")
        return f"{name}{equals}{shipped}" if shipped.exists() else argument
    return argument
