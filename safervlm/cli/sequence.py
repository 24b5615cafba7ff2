"""Runs several commands one after the other, each in a separate process.

The next command then inherits no memory, process group or damaged GPU context, and a failure of one command, even by a
kill, does not end the others. This process imports neither torch nor Lightning.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from safervlm.cli.arguments import check_words
from safervlm.errors import ArgumentError
from safervlm.io.boundary import REJECTED, warn
from safervlm.io.signals import GRACE, grace
from safervlm.recipes import CONFIGS, local_or_shipped

PROGRAM: Sequence[str] = (sys.executable, "-m", "safervlm")
ENDED_BY_SIGNAL = (130, 143)
USAGE = 64  # exit code of a command that rejects its arguments, see REJECTED


@dataclass(frozen=True)
class Typed:
    """Command line of a command that runs others.

    Attributes:
        names: What the commands are run for, for example VLMs.
        options: Its own options -> value; that of ``pictograms`` is ``"yes"`` if it is given.
        rest: Arguments for the commands that are run.
    """

    names: list[str]
    options: dict[str, str]
    rest: list[str]


def typed(words: Sequence[str], defaults: Mapping[str, str]) -> Typed:
    """Separates names, own options, and the arguments for the commands that are run.

    Own options are recognised anywhere before ``--``, which may separate the arguments for the commands. The flag
    ``--pictograms`` belongs to every command.

    Args:
        words: Words of the command line after the command.
        defaults: Options with a value -> its default.

    Raises:
        ArgumentError: A name is empty, given twice or after the options, an option has no value, ``--run`` is given,
            which would be overwritten, or an argument is one that each command would reject, see
            :func:`safervlm.cli.arguments.check_words`.
    """
    names: list[str] = []
    options = {"pictograms": "", **defaults}
    rest: list[str] = []
    ahead = list(words)
    while ahead:
        word = ahead.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--":
            rest += ahead
            break
        if word == "--pictograms":
            options[name] = "yes"
        elif word.startswith("--") and name in defaults:
            if not equals:
                value = ahead.pop(0) if ahead and not ahead[0].startswith("--") else ""
            if not value.strip():
                raise ArgumentError(f"--{name}: it needs a value, for example --{name} {defaults[name]}")
            options[name] = value
        elif rest or word.startswith("-"):
            rest.append(word)
        elif not word.strip():
            raise ArgumentError(f"the argument {word!r} is empty; give a name, or leave it out")
        elif word in names:
            raise ArgumentError(f"{word!r} is named twice; name it once")
        else:
            names.append(word)
    check_words(rest)
    for before, word in pairwise(rest):
        if not word.startswith("-") and (not before.startswith("-") or "=" in before):
            raise ArgumentError(f"{word!r}: not the value of an option; names come first, before all options")
    if any(word.partition("=")[0] == "--run" for word in rest):
        raise ArgumentError("--run: each command gets its own folder; leave it out, --help says where the folders are")
    return Typed(names, options, rest)


def recipe_file(name: str, folder: str) -> str:
    """Returns the file of a recipe as an argument of the command line.

    Args:
        name: Path of a file, or the name of a file in ``folder`` without its extension.
        folder: ``configs`` or a folder in it. Files in the current folder come before the shipped ones.

    Raises:
        ArgumentError: There is no such file.
    """
    if Path(local_or_shipped(name)).is_file():
        return name
    file = f"{folder}/{name}.yaml"
    if not Path(local_or_shipped(file)).is_file():
        raise ArgumentError(f"{name!r}: neither a file nor one of {', '.join(recipes(folder))}")
    return file


def is_shipped(file: str) -> bool:
    """Returns whether the file of a recipe is a shipped one, which users don't change.

    A command with such a file is rejected for its other arguments, not for the file.

    Args:
        file: See :func:`recipe_file`.
    """
    return CONFIGS.resolve() in Path(local_or_shipped(file)).resolve().parents


def recipes(folder: str) -> list[str]:
    """Returns the names of the recipes in a folder, both in the current folder and shipped.

    Args:
        folder: ``configs`` or a folder in it.
    """
    places = (Path(folder), CONFIGS / Path(folder).relative_to("configs"))
    return sorted({file.stem for place in places for file in place.glob("*.yaml")})


def play(words: Sequence[str], log: Path | None = None, first: bool = False) -> int:
    """Runs a command of SaferVLM in a separate process and returns its exit code.

    A request to end is passed on to it as SIGTERM. It is given nine tenths of the time that this process has to end.

    Args:
        words: Words of the command line, beginning with the command.
        log: File that receives a copy of its output; None for none.
        first: Whether it is the first of several commands with the same arguments.

    Raises:
        SystemExit: The command was ended by a signal, or is the first one and has rejected its arguments, so no other
            one is to be started.
    """
    # PYTHONSAFEPATH: a file in the current folder, such as datasets.py, must not shadow a package.
    environment = os.environ | {"PYTHONSAFEPATH": "1", GRACE: f"{0.9 * grace():g}", REJECTED: str(USAGE)}
    sys.stdout.flush()
    if log is None:
        child = subprocess.Popen([*PROGRAM, *words], env=environment)  # noqa: S603
        code = _wait(child)
    else:
        with log.open("wb") as file:
            child = subprocess.Popen(  # noqa: S603
                [*PROGRAM, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            code = _wait(child, file)
    if code == USAGE and first:
        raise SystemExit(2)
    return 2 if code == USAGE else code


def _wait(child: "subprocess.Popen[bytes]", log: IO[bytes] | None = None) -> int:
    try:
        if log is not None:
            _copy(child, log, echo=True)
        code = child.wait()
    except BaseException:  # a request to end, or the reader of our output has ended
        with suppress(OSError):
            child.terminate()
        if log is not None:
            _copy(child, log, echo=False)
        child.wait()
        raise
    code = 128 - code if code < 0 else code  # as a shell reports termination by a signal
    if code in ENDED_BY_SIGNAL:
        raise SystemExit(code)
    return code


def _copy(child: "subprocess.Popen[bytes]", log: IO[bytes], echo: bool) -> None:
    assert child.stdout is not None  # noqa: S101 (for the type checker)
    while some := os.read(child.stdout.fileno(), 65536):
        log.write(some)
        log.flush()
        if echo:
            sys.stdout.buffer.write(some)
            sys.stdout.flush()


def finish(failed: Sequence[str], partial: Sequence[str] = ()) -> None:
    """Reports what is incomplete and what failed, and exits with the corresponding code.

    Args:
        failed: A line for each failure.
        partial: A line for each result of which something is missing.

    Raises:
        SystemExit: With exit code 1 after a failure, 3 if something is missing.
    """
    for line in partial:
        warn(f"incomplete: {line}")
    for line in failed:
        warn(f"failed: {line}")
    if failed or partial:
        raise SystemExit(1 if failed else 3)
