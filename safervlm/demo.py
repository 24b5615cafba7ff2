"""The whole line on the pictograms: measure, judge, align, measure again, report."""

import shlex
from pathlib import Path

from safervlm.cli import main
from safervlm.errors import ArgumentError

OBJECTIVES = ("sft", "dpo", "ppo")
MEASURE = "predict --config configs/measure.yaml --config configs/pictograms/measure.yaml"


def command_lines(out: Path, seed: int) -> list[str]:
    """What a user would type, in order."""

    def folder(name: str) -> str:
        return shlex.quote(str(out / name))

    lines = [f"pictograms --seed {seed}", f"{MEASURE} --seed_everything {seed} --run {folder('original')}"]
    for name in OBJECTIVES:
        run = f"--seed_everything {seed} --run {folder(name)}"
        lines += [
            f"fit --config configs/{name}.yaml --config configs/pictograms/{name}.yaml {run}",
            f"{MEASURE} --model.vlm.adapter {folder(f'{name}/adapter')} {run}",
        ]
    runs = " ".join(map(folder, ("original", *OBJECTIVES)))
    return [*lines, f"report {runs} --out {folder('report.html')}"]


def demo(out: str = "runs/demo", seed: int = 0) -> None:
    """Plays the line's commands one after the other and prints each as you would type it.

    Interrupted, it goes on where it stopped; a second time it reuses what is there.

    Args:
        out: folder of the runs and of the report.
        seed: of the pictograms, of the training and of the answers.

    Raises:
        ArgumentError: ``out`` is empty.
    """
    if not out.strip():
        raise ArgumentError(f"out: the folder of the runs, got {out!r}")
    lines = command_lines(Path(out), seed)
    for number, line in enumerate(lines, 1):
        print(f"\n[{number}/{len(lines)}] $ safervlm {line}", flush=True)
        main(shlex.split(line))
