"""``safervlm evaluate``: evaluates the original model and trained ones on every dataset, and writes one table."""

from collections.abc import Sequence
from pathlib import Path

from safervlm.cli.sequence import finish, play, typed
from safervlm.errors import ArgumentError
from safervlm.io.tables import say
from safervlm.run_folder import RunFolder

HELP = """usage: safervlm evaluate [RUN...] [OPTIONS] [ARGUMENTS of safervlm predict]

Evaluates the original model and models trained from it on every dataset, and writes one table:
  safervlm evaluate runs/sft runs/dpo runs/ppo --config configs/rate.yaml

The adapter of each RUN is evaluated into RUN/evaluation, each in a separate process. In the ARGUMENTS, {} is replaced
by the name of the run. Complete evaluations are not repeated, a failed one does not stop the others, unavailable
datasets are skipped with a warning, and the same command resumes. The exit code is 1 after a failure, 3 if something
has no response, 2 if the first one rejects the ARGUMENTS.

  --original FOLDER   the original model is evaluated into FOLDER/evaluation (default: runs/original)
  --out FILE          the table, a page with .csv, .xlsx and .tex files next to it (default: runs/evaluation.html)
  --pictograms        evaluate on the pictograms: --config configs/pictograms/evaluate.yaml
"""


def evaluate_runs(words: Sequence[str]) -> None:
    """Evaluates each run and the original model.

    Args:
        words: Words of the command line after ``evaluate``.

    Raises:
        ArgumentError: An option has no value, or none of the named runs has an adapter.
        SystemExit: With exit code 1 if an evaluation failed, 3 if something has no response, 2 if the first evaluation
            rejects the arguments.
    """
    given = typed(words, {"original": "runs/original", "out": "runs/evaluation.html"})
    overlay = ["--config", "configs/pictograms/evaluate.yaml"] if given.options["pictograms"] else []
    original = Path(given.options["original"])
    runs: dict[Path, Path] = {}  # each folder once
    for run in (original, *map(Path, given.names)):
        runs.setdefault(run.resolve(), run)
    there = [run for run in runs.values() if (RunFolder(run).adapter / "adapter_config.json").is_file()]
    if given.names and not there and len(runs) > 1:
        raise ArgumentError(
            f"{', '.join(given.names)}: no adapter there; name the run folders of trainings, or train one: safervlm "
            "train --help"
        )
    failed, partial = [], []
    evaluated = [original]  # the baseline of the comparison, whether it exists or not
    for run in runs.values():
        adapter = []
        if run != original:
            if run not in there:
                failed.append(f"{run}: no adapter in it; train one: safervlm train --help")
                continue
            adapter = ["--model.vlm.adapter", str(RunFolder(run).adapter)]
            evaluated.append(run)
        say(f"{run}: evaluating into {RunFolder(run).evaluation}")
        rest = [word.replace("{}", run.name) for word in (*overlay, *given.rest)]
        recipe = ["--config", "configs/evaluate.yaml"]
        line = ["predict", *recipe, *rest, *adapter, "--run", str(RunFolder(run).evaluation)]
        code = play(line, first=run == original and bool(given.rest))
        if code == 3:
            partial.append(f"{run}: some questions have no response, see above; the same command asks them again")
        elif code:
            failed.append(f"{run} (exit code {code})")
    code = play(["evaluation", *map(str, evaluated), "--out", given.options["out"]])
    if code == 3:
        partial.append("the table: a run is skipped, see above")
    elif code:
        failed.append(f"the table (exit code {code})")
    finish(failed, partial)
