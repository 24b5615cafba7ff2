"""Writes the table of results in README.md and docs/evaluation.md from an evaluation of the demo's models.

bash scripts/demo.sh
python -m safervlm.pictograms.rater &
safervlm evaluate runs/demo/sft runs/demo/dpo runs/demo/ppo --original runs/demo/original --pictograms \
        --config configs/pictograms/rate.yaml
python scripts/results.py runs/evaluation.csv
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pages import write_between

from safervlm.reports.suite_tables import interval, records, shown_estimate
from safervlm.results.measures import THESE_CONCEPTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "evaluation.md")
RUNS = {"original": "original", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
COLUMNS = {
    "alignment_all_drawn": "alignment",
    "alignment_safe_drawn": "safe images",
    "alignment_unsafe_drawn": "unsafe images",
    "alignment_all_drawn_diversity_published": "1 - self-BLEU, all texts",
    "context_all": "contexts",
    "MME": "MME",
    "MM-Vet_occurs": "MM-Vet",
    "LLaVABench": "LLaVABench",
    "SMID": "SMID",
    "NSFW": "NSFW",
}


def table_of(scores: pd.DataFrame) -> str:
    """Formats some columns of an evaluation as Markdown: numbers with intervals for new concepts or new images.

    Args:
        scores: CSV file of ``safervlm evaluate``.
    """
    wide = scores[~scores["detail"] & (scores["sampling_unit"] != THESE_CONCEPTS)]
    rows = {(row["run"], row["column"]): row for row in records(wide)}
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for run, name in RUNS.items():
        cells = []
        for column in COLUMNS:
            row = rows[run, column]
            cells.append("<br>".join(filter(None, (shown_estimate(row["unit"], row["value"]), interval(row)))))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Writes the table into both pages.

    Args:
        args: words of the command line; None for those of ``sys.argv``.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="CSV file of safervlm evaluate")
    table = table_of(pd.read_csv(parser.parse_args(args).scores))
    for page in PAGES:
        write_between(page, "results", table)
    print(table)


if __name__ == "__main__":
    main()
