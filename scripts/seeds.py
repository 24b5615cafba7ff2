"""The demo with seeds 0, 1 and 2, and the table of all three: python scripts/seeds.py [FOLDER]."""

import subprocess
import sys
from pathlib import Path

from safervlm.scoring import compare, load_run, scores

SEEDS = (0, 1, 2)
RUNS = ("original", "sft", "dpo", "ppo")
COLUMNS = {
    "perception": "perception",
    "text_only_unsafe": "text only, unsafe",
    "image_unsafe": "image, unsafe",
    "image_safe": "image, safe",
    "modality_gap": "gap",
    "na_rate": "N/A",
}


def main(folder: Path) -> None:
    """Plays the demo in a folder a seed (what is there already is reused) and prints the table as Markdown."""
    print("| seed | run |", " | ".join(COLUMNS.values()), "|")
    print("|---|---|", "---:|" * len(COLUMNS), sep="")
    for seed in SEEDS:
        place = folder / str(seed)
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "safervlm.cli", "demo", "--seed", str(seed)]
        with (place / "demo.log").open("w") as log:
            subprocess.run(command, cwd=place, check=True, stdout=log, stderr=log)  # noqa: S603
        table = compare({name: scores(load_run(place / "runs" / "demo" / name)) for name in RUNS})
        for name, row in table.iterrows():
            print(f"| {seed} | {name} |", " | ".join(f"{100 * row[column]:.1f}" for column in COLUMNS), "|", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/seeds"))
