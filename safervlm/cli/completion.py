"""Shell completion of the command line: ``safervlm --print_shtab bash``."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from safervlm.cli.lightning import SaferCLI
from safervlm.cli.messages import parameters
from safervlm.cli.parser import OneLineParser
from safervlm.cli.sequence import recipes
from safervlm.errors import ArgumentError

SHELLS = ("bash", "zsh", "tcsh")
FILES = ("--config", "--out", "--run", "--runs", "--original", "--ckpt_path")
NAMES = {"train": "configs", "measure": "configs/vlm"}  # folder of the recipes that a command accepts as arguments


class Collected(Exception):  # noqa: N818 (ends the construction of a command line; not an error)
    """Raised when the parsers of all Lightning commands have been created."""


class Collector(SaferCLI):
    """Lightning's command line that only creates the parsers.

    Args:
        parsers: Receives the parser of each command.
    """

    def __init__(self, parsers: dict[str, OneLineParser]) -> None:
        self._parsers = parsers
        super().__init__([])

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Adds the arguments and keeps the parser.

        Args:
            parser: Parser of a command.
        """
        super().add_arguments_to_parser(parser)
        self._parsers[list(self.subcommands())[len(self._parsers)]] = parser

    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        """Ends the construction before anything is parsed: only the parsers are needed.

        Args:
            parser: Unused.
            args: Unused.

        Raises:
            Collected: Always.
        """
        raise Collected


def lightning_options() -> dict[str, list[str]]:
    """Returns the options of the Lightning commands, with those of all classes of models and data: command -> names."""
    parsers: dict[str, OneLineParser] = {}
    with suppress(Collected):
        Collector(parsers)
    nested = [f"--{part}.{name}" for part in ("data", "model") for name in parameters(part)]
    return {command: sorted({"--limit", *parser.option_names(), *nested}) for command, parser in parsers.items()}


def completion_script(shell: str, others: Mapping[str, Sequence[str]]) -> str:
    """Returns the script that completes command lines of SaferVLM.

    Args:
        shell: One of :data:`SHELLS`.
        others: Options of the commands that run no Lightning loop: command -> names.

    Raises:
        ArgumentError: The shell is unknown, or the package shtab is missing.
    """
    if shell not in SHELLS:
        raise ArgumentError(f"--print_shtab: one of {', '.join(SHELLS)}, got {shell!r}")
    try:
        shtab: Any = import_module("shtab")
    except ModuleNotFoundError:
        raise ArgumentError("--print_shtab: the package shtab is missing; pip install 'safervlm[completion]'") from None
    root = argparse.ArgumentParser("safervlm")
    root.add_argument("--version", action="store_true")
    commands = root.add_subparsers()
    for command, names in {**lightning_options(), **others}.items():
        parser = commands.add_parser(command, help=command)  # shtab skips parsers without a help text
        if folder := NAMES.get(command):
            parser.add_argument("names", nargs="*", choices=recipes(folder))
        elif command in ("report", "evaluation", "evaluate", "verify"):
            parser.add_argument("runs", nargs="*").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        for name in names:
            if name != "--help":
                option: Any = parser.add_argument(name)
                if name in FILES:
                    option.complete = shtab.FILE
    script: str = shtab.complete(root, shell)
    return script
