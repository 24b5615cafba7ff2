"""Packed rows: the common prefix of several sequences is computed once.

A row is a tree, written segment by segment: ``beginning | rest 1 | completion 1.1 | completion 1.2 | rest 2 | ...``.
The beginning contains the image and the common prefix of the prompts; a rest is the remainder of a prompt. A segment
attends to the beginning, to the segment that it continues, and to itself; its positions continue from the end of that
segment, as in a separate row. In rows for generation, the rests have no completions.

Shapes: R packed rows, L tokens of the longest row, C sequences (completions, or prompts to generate from), T tokens of
the longest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from safervlm.vlm.local import Targets

# Maximum number of questions, or of responses to a prompt, per row. Each also computes attention to the tokens of the
# others, which is then masked.
ROW = 8


@dataclass
class Packed(Targets):
    """Beginnings with their continuations, one row per beginning.

    Attributes:
        input_ids: (R, L) token ids, padded on the right.
        segments: (R, L) number of each token's segment: 0 for the beginning, -1 for padding.
        parents: (R, L) number of the segment that each token's segment continues; 0 for the beginning.
        position_ids: (R, L) position of each token in its sequence.
        sequences: (R, L) a sequence that contains the token.
        rows: (C,) row of each sequence.
        questions: (R,) a question of each row, which has the row's image.
        source: (C, T) position in the row whose hidden state predicts each token of the completion.
        ends: (C,) position in the row of the sequence's last token.
    """

    input_ids: Tensor
    segments: Tensor
    parents: Tensor
    position_ids: Tensor
    sequences: Tensor
    rows: Tensor
    questions: Tensor
    source: Tensor
    ends: Tensor

    def to(self, device: torch.device) -> Self:
        """Returns the packed rows on another device.

        Args:
            device: The target device.
        """
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})

    def attention_mask(self) -> Tensor | None:
        """Returns the attention mask: each token attends to the tokens before it in its sequence, and to itself.

        Returns:
            (R, 1, L, L) True where a query may attend to a key. None if each row is one sequence: padding comes
            last, so causal attention is sufficient, and the fastest kernels accept no mask.
        """
        if len(self.rows) == len(self.input_ids):
            return None
        query, key, parent = self.segments[:, :, None], self.segments[:, None, :], self.parents[:, :, None]
        length = self.input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        # Padding attends to itself: attention to no key would be NaN.
        allowed = causal & ((key == 0) | (key == parent) | (key == query))
        return (allowed | torch.eye(length, dtype=torch.bool, device=query.device))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a mask to the one that attention adds to its scores; otherwise each layer converts it anew.

    Args:
        mask: True where a query may attend to a key.
        dtype: Data type of the hidden states.

    Returns:
        0 where the mask is True, minus infinity elsewhere.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


class _Row:
    """A row that is being written.

    Args:
        beginning: Token ids of the beginning.
        sequence: A sequence that contains it.
    """

    def __init__(self, beginning: Sequence[int], sequence: int) -> None:
        self.ids, self.segments, self.parents = list(beginning), [0] * len(beginning), [0] * len(beginning)
        self.positions, self.sequences = list(range(len(beginning))), [sequence] * len(beginning)
        self.ends = [len(beginning) - 1]  # place of each segment's last token

    def add(self, tokens: Sequence[int], parent: int, sequence: int) -> int:
        """Appends a segment, possibly an empty one, and returns its number.

        Args:
            tokens: Token ids of the segment.
            parent: Number of the segment that it continues.
            sequence: A sequence that contains it.
        """
        number, start = len(self.ends), self.positions[self.ends[parent]] + 1
        self.positions += range(start, start + len(tokens))
        self.ids += tokens
        self.segments += [number] * len(tokens)
        self.parents += [parent] * len(tokens)
        self.sequences += [sequence] * len(tokens)
        self.ends.append(len(self.ids) - 1 if tokens else self.ends[parent])
        return number

    def predicting(self, segment: int, parent: int, count: int) -> Tensor:
        """Returns the places of the tokens that predict a segment's first ``count`` tokens.

        Args:
            segment: Number of the last segment that was added.
            parent: Number of the segment that it continues.
            count: At most the number of its tokens plus 1.
        """
        start = len(self.ids) - self.segments.count(segment)
        return torch.tensor([self.ends[parent], *range(start, start + count - 1)])


@dataclass
class _Leaf:
    """A sequence in a row: the row's number, the places that predict its last segment, that segment, and its end."""

    row: int
    source: Tensor
    target: Tensor
    end: int


def _packed(rows: Sequence[_Row], leaves: Sequence[_Leaf], questions: Sequence[int]) -> Packed:
    """Pads rows and sequences, and makes tensors of them."""

    def padded(lists: Sequence[Sequence[int]], value: int = 0) -> Tensor:
        return pad_sequence([torch.tensor(each) for each in lists], batch_first=True, padding_value=value)

    lengths = torch.tensor([len(leaf.target) for leaf in leaves])
    return Packed(
        target=pad_sequence([leaf.target for leaf in leaves], batch_first=True),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        input_ids=padded([row.ids for row in rows]),
        segments=padded([row.segments for row in rows], -1),
        parents=padded([row.parents for row in rows]),
        position_ids=padded([row.positions for row in rows]),
        sequences=padded([row.sequences for row in rows]),
        rows=torch.tensor([leaf.row for leaf in leaves]),
        questions=torch.tensor(questions),
        source=pad_sequence([leaf.source for leaf in leaves], batch_first=True),
        ends=torch.tensor([leaf.end for leaf in leaves]),
    )


def pack(beginnings: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]) -> Packed:
    """Packs each beginning with its continuations into one row.

    Args:
        beginnings: Token ids of the R beginnings, none of them empty.
        continuations: For each beginning, the token ids of its continuations (at least one, none of them empty).

    Returns:
        The rows; their sequences are in the order of the continuations.
    """
    rows: list[_Row] = []
    leaves: list[_Leaf] = []
    for number, (beginning, following) in enumerate(zip(beginnings, continuations, strict=True)):
        row = _Row(beginning, len(leaves))
        for tokens in following:
            segment = row.add(tokens, 0, len(leaves))
            source = row.predicting(segment, 0, len(tokens))
            leaves.append(_Leaf(number, source, torch.tensor(tokens), row.ends[segment]))
        rows.append(row)
    return _packed(rows, leaves, range(len(rows)))


def pack_completions(
    images: Sequence[int], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> Packed:
    """Packs prompts with their completions; the prompts about one image share rows.

    The last token of a completion predicts nothing, so no row contains it.

    Args:
        images: For each question, the index of its image.
        prompts: For each question, the token ids of its prompt, including the image's placeholders; none is empty.
        completions: For each question, the token ids of its completions (at least one, none of them empty).

    Returns:
        The rows; the completions are in the order of the questions.
    """
    firsts = [sum(map(len, completions[:question])) for question in range(len(prompts))]  # of each question
    rows: list[_Row] = []
    leaves: dict[int, _Leaf] = {}
    together = rows_of_completions(images, prompts, completions)
    for number, questions in enumerate(together):
        about: dict[tuple[int, ...], list[int]] = {}  # samples of one prompt share it
        for question in questions:
            about.setdefault(tuple(prompts[question]), []).append(question)
        beginning = common_beginning(list(about)) if len(about) > 1 else prompts[questions[0]]
        row = _Row(beginning, firsts[questions[0]])
        for prompt, same in about.items():
            rest = prompt[len(beginning) :]
            parent = row.add(rest, 0, firsts[same[0]]) if rest else 0
            for question in same:
                for place, tokens in enumerate(completions[question], firsts[question]):
                    segment = row.add(tokens[:-1], parent, place)
                    source = row.predicting(segment, parent, len(tokens))
                    leaves[place] = _Leaf(number, source, torch.tensor(tokens), row.ends[segment])
        rows.append(row)
    return _packed(rows, [leaves[place] for place in sorted(leaves)], [row[0] for row in together])


def rows_of_completions(
    images: Sequence[int], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> list[list[int]]:
    """Groups questions into packed rows: questions about one image, at most :data:`ROW` per row.

    Rows are padded to the longest one. An image with many questions next to images with one would make most of a batch
    padding; so the number of questions per row is the one with which the fewest tokens are computed.

    Args:
        images: For each question, the index of its image.
        prompts: For each question, the token ids of its prompt.
        completions: For each question, the token ids of its completions.

    Returns:
        The questions of each row.
    """
    about: dict[int, list[int]] = {}
    for question, image in enumerate(images):
        about.setdefault(image, []).append(question)
    common = {image: len(common_beginning([prompts[q] for q in those])) for image, those in about.items()}
    added = [sum(len(tokens) - 1 for tokens in answers) for answers in completions]

    def length(row: Sequence[int]) -> int:
        start, rests = common[images[row[0]]], {tuple(prompts[question]) for question in row}
        return start + sum(len(prompt) - start for prompt in rests) + sum(added[question] for question in row)

    def computed(rows: Sequence[Sequence[int]]) -> int:
        return len(rows) * max(map(length, rows))

    most = min(ROW, max(map(len, about.values())))
    return min(
        ([row for those in about.values() for row in evenly(those, k)] for k in range(1, most + 1)), key=computed
    )


def evenly(questions: Sequence[int], most: int) -> list[list[int]]:
    """Cuts questions into as few rows as possible, whose sizes differ by at most one.

    Args:
        questions: Questions about one image.
        most: Maximum number of questions per row.
    """
    count = -(-len(questions) // most)
    bounds = [len(questions) * number // count for number in range(count + 1)]
    return [list(questions[begin:end]) for begin, end in pairwise(bounds)]


def questions_of_rows(image_rows: Sequence[int]) -> list[list[int]]:
    """Groups questions into packed rows for generation: questions about one image, at most :data:`ROW` per row.

    Args:
        image_rows: For each question, the index of its image.

    Returns:
        The indices of the questions of each row.
    """
    about: dict[int, list[int]] = {}
    for question, image in enumerate(image_rows):
        about.setdefault(image, []).append(question)
    return [those[start : start + ROW] for those in about.values() for start in range(0, len(those), ROW)]


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns the longest common prefix of all prompts that leaves at least one token of each prompt.

    Args:
        prompts: Token ids of the prompts.
    """
    together = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]
