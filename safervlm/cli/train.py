"""``safervlm train``: trains with several objectives, one after the other."""

from collections.abc import Sequence
from pathlib import Path

from safervlm.cli.sequence import finish, is_shipped, play, recipe_file, typed
from safervlm.errors import ArgumentError
from safervlm.io.tables import say

HELP = """usage: safervlm train OBJECTIVE... [OPTIONS] [ARGUMENTS of safervlm fit]

Trains the models that `safervlm evaluate` evaluates, each in its own run folder and process:
  safervlm train sft dpo ppo

An OBJECTIVE is the name of a file in configs/ without its extension (sft, dpo, ppo, grpo), or the path of such a file.
In the ARGUMENTS, {} is replaced by the name of the objective: --config my/{}.yaml. Finished runs are not changed,
a failure does not stop the others, and the same command resumes. The exit code is 1 after a failure, 2 if the
first one rejects the ARGUMENTS.

  --runs FOLDER   each objective has the run folder FOLDER/OBJECTIVE (default: runs)
  --pictograms    train on the pictograms: --config configs/pictograms/{}.yaml
"""


def train_objectives(words: Sequence[str]) -> None:
    """Trains with each objective.

    Args:
        words: Words of the command line after ``train``.

    Raises:
        ArgumentError: There is no objective, or one that does not exist.
        SystemExit: With exit code 1 if a training failed, 2 if the first one rejects the arguments.
    """
    given = typed(words, {"runs": "runs"})
    if not given.names:
        raise ArgumentError("no objective is named; for example safervlm train sft dpo ppo")
    overlay = ["--config", "configs/pictograms/{}.yaml"] if given.options["pictograms"] else []
    files = [recipe_file(name, "configs") for name in given.names]
    failed = []
    # A command that rejects its arguments ends the sequence only if the others have the same arguments.
    common = len(files) == 1 or (bool(given.rest) and is_shipped(files[0]))
    for file in files:
        name = Path(file).stem
        run = Path(given.options["runs"]) / name
        say(f"{name}: training into {run}")
        rest = [word.replace("{}", name) for word in (*overlay, *given.rest)]
        line = ["fit", "--config", file, *rest, "--run", str(run)]
        if code := play(line, first=file == files[0] and common):
            failed.append(f"{name} (exit code {code})")
    finish(failed)
