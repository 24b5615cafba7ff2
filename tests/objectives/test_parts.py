"""Mini-batches and micro-batches of a rollout."""

import torch

from safervlm.objectives.parts import micro_batches, rows_by_name


def test_micro_batches_keep_groups_together_and_are_sorted_by_length() -> None:
    names = ["a", "a", "b", "c", "c", "c", "b", "d", "e"]
    rows = torch.tensor([4, 8, 0, 5, 2, 3, 1, 6, 7])
    assert [group.tolist() for group in rows_by_name(rows, names)] == [[4, 5, 3], [8], [0, 1], [2, 6], [7]]
    lengths = torch.tensor([3, 9, 2, 1, 1, 4, 2, 5, 30])
    parts = micro_batches(rows, names, lengths, 3)
    assert [part.tolist() for part in parts] == [[2, 6], [4, 5, 3], [7, 0, 1], [8]]
    assert [part.tolist() for part in micro_batches(rows[[0, 3, 5]], names, lengths, 2)] == [[4, 5], [3]]
    assert micro_batches(rows[:0], names, lengths, 2) == []
