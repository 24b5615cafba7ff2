"""The command line: ``safervlm --help`` imports nothing else, and each command imports only what it needs."""

import gc
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safervlm.errors import ArgumentError
from safervlm.io.boundary import one_line_errors, run_folder
from safervlm.io.signals import listening

if TYPE_CHECKING:
    from safervlm.cli.parser import OneLineParser

HELP = """usage: safervlm COMMAND [ARGUMENTS]

Measure, judge and align the safety ethics of vision-language models.

Training and prediction (safervlm COMMAND --config configs/RECIPE.yaml; --help explains every argument):
  predict      measure a VLM (configs/measure.yaml) or judge saved responses (configs/judge_responses.yaml)
  fit          align a VLM (configs/sft.yaml, dpo.yaml, ppo.yaml, grpo.yaml) or train a judge (configs/judge.yaml)
  validate     compute the loss on held-out records

Several models one after the other (safervlm COMMAND --help):
  measure      measure VLMs: safervlm measure llava-1.5-7b qwen2-vl-7b
  train        train with objectives: safervlm train sft dpo ppo
  evaluate     evaluate the original model and trained ones on every dataset: safervlm evaluate runs/sft runs/ppo

Analysing runs:
  report       one page, tables and plots of one or several measurements or evaluations
  verify       ask a sample of a run's questions again: do its responses and verdicts stay the same?
  label        people label a sample of a run's responses: rates are then corrected for the judge's error
  merge        write the trained model with the adapter in its weights: safervlm merge runs/ppo --out merged
  export       write the training data in the first implementation's formats

Environment check:
  doctor       does this machine have what a recipe needs? (--config configs/measure.yaml)

Demo data, a small world of pictograms:
  pictograms   write its datasets, its VLM and its judges
  demo         run the whole pipeline on it: measure, judge, align, measure again

  --version    print the version
  --print_shtab bash|zsh|tcsh
               print a script for the shell's completion (needs the package shtab)
"""


def sequence_commands() -> dict[str, tuple[Callable[[Sequence[str]], None], str]]:
    """Returns the commands that run other commands: name -> function of the words after it, and help."""
    from safervlm.cli import evaluate, measure, train

    return {
        "measure": (measure.measure_vlms, measure.HELP),
        "train": (train.train_objectives, train.HELP),
        "evaluate": (evaluate.evaluate_runs, evaluate.HELP),
    }


def plain_commands() -> dict[str, Callable[..., Any]]:
    """Returns the commands that run no Lightning loop, as functions whose signatures define the arguments."""
    with collection_paused():
        from safervlm.cli.demo import demo
        from safervlm.cli.doctor import doctor
        from safervlm.cli.label import label
        from safervlm.cli.merge import merge
        from safervlm.cli.verify import verify
        from safervlm.data.export import export_training_files
        from safervlm.pictograms.world import build
        from safervlm.reports.evaluation import evaluation
        from safervlm.reports.kinds import report_runs

    return {
        "doctor": doctor,
        "report": report_runs,
        "evaluation": evaluation,
        "verify": verify,
        "label": label,
        "merge": merge,
        "export": export_training_files,
        "pictograms": build,
        "demo": demo,
    }


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command line.

    Args:
        args: Words of the command line without the program's name; None for those of ``sys.argv``.

    Raises:
        SystemExit: The command failed or was asked to end.
    """
    args = list(sys.argv[1:] if args is None else args)
    if isinstance(sys.stdout, io.TextIOWrapper):  # into a pipe or file, Windows's encoding lacks most characters
        sys.stdout.reconfigure(errors="backslashreplace")
    # Without a home folder that can be written, matplotlib writes two lines; it then uses a temporary folder.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if args[0] == "--version":
        from safervlm import __version__

        print(__version__)
        return
    with one_line_errors(args), listening():
        shell = args[0].partition("--print_shtab")[2].removeprefix("=") or " ".join(args[1:])
        if args[0].startswith("--print_shtab"):
            print(shell_completion(shell))
        elif args[0] in ("fit", "validate", "predict"):
            with collection_paused():
                from safervlm.cli.lightning import run

            run(args)
        elif args[0] in ("measure", "train", "evaluate"):
            function, text = sequence_commands()[args[0]]
            words = args[1:]
            if {"-h", "--help"} & set(words[: words.index("--")] if "--" in words else words):
                print(text, end="")
                raise SystemExit(0)
            function(words)
        elif args[0] in ("doctor", "report", "evaluation", "verify", "label", "merge", "export", "pictograms", "demo"):
            plain(args)
        else:
            raise ArgumentError(f"unknown command {args[0]!r}; safervlm --help lists all")


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses the garbage collection during imports, and excludes the objects that they create from later collections.

    Modules live as long as the process, and searching their objects for garbage repeatedly takes a fifth of the
    start-up time. If PyTorch is already imported, as in a notebook, nothing is changed: the user's objects must be
    collected.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def shell_completion(shell: str) -> str:
    """Returns the script that completes command lines.

    Args:
        shell: ``bash``, ``zsh`` or ``tcsh``.
    """
    from safervlm.cli.completion import completion_script

    sequences = {
        command: [*re.findall(r"^  (--\w+)", text, re.MULTILINE), "--config", "--limit"]
        for command, (_, text) in sequence_commands().items()
    }
    plain_options = {command: plain_parser(command).option_names() for command in plain_commands()}
    return completion_script(shell, sequences | plain_options)


def plain(args: Sequence[str]) -> None:
    """Runs one of the commands that run no Lightning loop.

    Args:
        args: Words of the command line, beginning with the command.
    """
    from safervlm.cli.arguments import check_words

    name, *rest = args
    check_words(rest)
    parser = plain_parser(name)
    given = parser.instantiate(parser.parse_args(rest))
    named = [*(given.get("runs") or []), given.get("run"), given.get("out")]
    run_folder.set(next((Path(each) for each in named if each and Path(each).is_dir()), None))
    function = plain_commands()[name]
    if name == "demo":
        function = partial(function, main)
    arguments = given.as_dict()
    if name == "label":
        arguments["using"] = arguments.pop("with")  # a Python keyword can't be the name of a parameter
    function(**arguments)


def plain_parser(name: str) -> "OneLineParser":
    """Returns the parser of a command that runs no Lightning loop.

    Args:
        name: Name of the command.
    """
    from safervlm.cli.parser import OneLineParser

    function = plain_commands()[name]
    parser = OneLineParser(prog=f"safervlm {name}", description=(function.__doc__ or "").split("\n\n")[0])
    own: set[str | int] = set()  # arguments that are added below explicitly, or passed here
    if name == "doctor":
        own = {"config"}
        parser.add_argument("--config", action="append", help="The recipe, then its overlays, each after a --config.")
    if name == "verify":
        own = {"run"}
        parser.add_argument("run", help="The folder of a finished measurement.")
    if name == "label":
        own = {"run", "using"}
        parser.add_argument("run", help="The folder of a measurement with verdicts.")
        parser.add_argument(
            "--with",
            type=Literal["terminal", "sheet", "summary"],
            default="terminal",
            help="Where to label: on the terminal, or in a sheet (labels.csv, labels.xlsx); summary: only its results.",
        )
    if name == "merge":
        own = {"run"}
        parser.add_argument("run", help="The folder of a finished training.")
    if name == "demo":
        own = {"play"}
    if name in ("report", "evaluation"):
        own = {"runs", "group"}
        at_least = "*" if name == "report" else "+"  # a report may consist of groups only
        parser.add_argument("runs", nargs=at_least, help="The run folders; the first is the one to compare with.")
    if name == "report":
        parser.add_argument(
            "--group",
            action="append",
            metavar="NAME=PATTERN",
            help="Runs that differ in their training seed only, such as 'ppo=runs/ppo-*'; may be repeated.",
        )
    parser.add_function_arguments(function, skip=own, fail_untyped=True)
    return parser
