"""DPO, SFT and PPO where all questions of a step are about one image."""

from dataclasses import replace
from pathlib import Path

from comparisons.against_trl import benchmark_dpo, benchmark_sft
from comparisons.model import Shape
from comparisons.ppo import benchmark_ppo
from comparisons.timing import Row


def benchmark_shared(shape: Shape, folder: Path, repeats: int, questions: int = 5) -> list[Row]:
    """Compares DPO, SFT and PPO with the alternatives where all questions of a step are about one image.

    Args:
        shape: see :class:`Shape`; a step has ``questions`` examples.
        folder: the folder of the model.
        repeats: number of measured repetitions.
        questions: number of questions about the image.
    """
    shape = replace(shape, pairs=questions, targets=questions, rollouts=questions)
    comparisons = (benchmark_dpo, benchmark_sft, benchmark_ppo)
    return [row for compare in comparisons for row in compare(shape, folder, repeats, questions)]
