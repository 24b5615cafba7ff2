"""Data loaders whose order is known in advance, so that a run can be resumed."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import fingerprint, seed_for
from safervlm.io.signals import keep_until_asked
from safervlm.records import Example

T = TypeVar("T")
Collator = Callable[[Sequence[Example]], Any]
# Questions at once to begin with, where the user leaves it to the memory.
AUTOMATIC = 256


def training_batches(
    examples: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """The batches of an epoch, as row numbers of the examples.

    All examples are shuffled by (seed, epoch) and cut into global batches of ``world_size * batch_size``, of which
    each process takes its consecutive part: so two processes see in a step what one with the double batch size sees.
    The last global batch may be smaller: each process takes its share of it, sizes differing by at most one. It is
    dropped only where there are fewer examples left than processes.

    Args:
        examples: how many there are.
        batch_size: of one process.
        seed: of the order.
        epoch: from 0.
        rank: of this process.
        world_size: the number of processes.
    """
    order = list(range(examples))
    random.Random(seed_for(seed, "order", epoch)).shuffle(order)
    size = world_size * batch_size
    batches = []
    for start in range(0, examples, size):
        together = order[start : start + size]
        if len(together) >= world_size:
            begin, end = (len(together) * r // world_size for r in (rank, rank + 1))
            batches.append(together[begin:end])
    return batches


def _deliver(
    examples: Sequence[Example], batches: Sequence[list[int]], collator: Collator, num_workers: int
) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        examples,  # type: ignore[arg-type]  # a list serves as a data set
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=num_workers,
        # DataLoader draws a seed for its workers. From the global generator it would shift everything drawn after it
        # (LoRA's dropout), and a continued run, which starts its loader at another moment, would differ.
        generator=torch.Generator(),
        worker_init_fn=keep_until_asked,
    )
    try:
        yield from loader
    except RecordError as error:
        # From a worker the message comes wrapped in its traceback; the last line is the one to read.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{RecordError.__module__}.RecordError: ")
        raise RecordError(message) from None


class TrainingLoader:
    """Shuffled batches, the same for the same (seed, epoch), with a position that a checkpoint keeps.

    Lightning saves :meth:`state_dict` and calls :meth:`load_state_dict` before it goes on in the middle of an epoch.
    The position counts batches that have been handed out, not those that workers have fetched ahead. This is no
    ``DataLoader``, so Lightning leaves the sharding alone.

    Args:
        examples: all training examples.
        collator: makes a batch of examples.
        batch_size: of one process.
        num_workers: processes that fetch ahead; 0 fetches in the main process.
        seed: of the order.
        rank: of this process.
        world_size: the number of processes.
        current_epoch: tells the epoch when an iteration gets its first batch. Lightning's ``set_epoch`` is no help: it
            counts an epoch too many after a run that is limited by steps was continued from an epoch's end.

    Raises:
        RecordError: fewer examples than processes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collator: Collator,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        current_epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        if len(examples) < world_size:
            raise RecordError(f"{len(examples)} training examples for {world_size} processes: use fewer processes")
        self.examples = examples
        self.collator = collator
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.current_epoch = current_epoch
        self._epoch = 0
        self._delivered = 0
        self._start = 0  # of the next iteration, if it plays the same epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.examples), self.world_size * self.batch_size)
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[Any]:
        # A generator: this runs when the first batch is asked for; Lightning makes the iterator before it knows where
        # it goes on.
        epoch = self.current_epoch()
        self._delivered = self._start if epoch == self._epoch else 0
        self._epoch, self._start = epoch, 0
        batches = training_batches(len(self.examples), self.batch_size, self.seed, epoch, self.rank, self.world_size)
        for batch in _deliver(self.examples, batches[self._delivered :], self.collator, self.num_workers):
            self._delivered += 1
            yield batch

    def _order(self) -> dict[str, Any]:
        # Whatever, besides the epoch, makes "the first k batches" mean these examples; the same on every rank.
        ids = fingerprint("\n".join(example.question.id for example in self.examples))
        return {"examples": ids, "seed": self.seed, "batch_size over all processes": self.world_size * self.batch_size}

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of batches delivered in it, and what their order depends on."""
        return {"epoch": self._epoch, "batches": self._delivered, "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batches that were delivered.

        Raises:
            ArgumentError: the order now is another one, so the position would mean other examples.
        """
        for name, value in self._order().items():
            if state["order"][name] != value:
                raise ArgumentError(
                    f"data: the checkpoint stands in the middle of an epoch with {name} {state['order'][name]}, now it "
                    f"is {value}: continue with the same data, or start from a checkpoint of an epoch's end"
                )
        self._epoch, self._delivered, self._start = state["epoch"], state["batches"], state["batches"]


def validation_batches(examples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """A process's batches of the held-out examples, as row numbers: every example once, in order, over all processes.

    Every process has as many batches as the others, each with something in it: what a step that talks to the others
    needs. A process has ``examples[rank::world_size]``.

    Raises:
        RecordError: fewer examples than processes.
    """
    if examples < world_size:
        raise RecordError(f"{examples} validation examples for {world_size} processes: hold out more, or none")
    rows = list(range(rank, examples, world_size))
    longest = -(-len(range(0, examples, world_size)) // batch_size)
    count = min(longest, examples // world_size)
    bounds = [len(rows) * number // count for number in range(count + 1)]
    return [rows[begin:end] for begin, end in pairwise(bounds)] if world_size > 1 else in_batches(rows, batch_size)


def limited(items: Sequence[T], limit: int | None, group: Callable[[T], object]) -> list[T]:
    """The first items of each group, in the order in which they were given.

    Args:
        items: in any order.
        limit: how many of each group; None takes all.
        group: tells what belongs together.

    Raises:
        ArgumentError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"data.limit: at least 1, or none, got {limit}")
    taken: Counter[object] = Counter()
    chosen = []
    for item in items:
        taken[group(item)] += 1
        if limit is None or taken[group(item)] <= limit:
            chosen.append(item)
    return chosen


def in_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cuts rows into batches."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def prediction_batches(examples: Sequence[Example], batch_size: int, world_size: int = 1) -> list[list[list[int]]]:
    """The batches of each process, as row numbers: every example once, the questions about an image together.

    A VLM encodes an image once for all its questions in a batch. The longest questions come first: what follows takes
    less memory than what has been seen to work.
    """
    about: dict[str | None, list[int]] = {}
    for row, example in enumerate(examples):
        about.setdefault(example.question.image_path, []).append(row)
    groups = [group for rows in about.values() for group in in_batches(rows, batch_size)]
    groups.sort(key=lambda group: -max(len(examples[row].question.prompt) for row in group))
    batches: list[list[list[int]]] = []
    for rank in range(world_size):
        batches.append([])
        for group in groups[rank::world_size]:
            if not batches[rank] or len(batches[rank][-1]) + len(group) > batch_size:
                batches[rank].append([])
            batches[rank][-1] += group
    return batches


class OrderedLoader:
    """Batches that are known from the start.

    Args:
        examples: of all processes.
        batches: of this process, as row numbers.
        length: what it is taken to be; an iteration may end before.
        collator: makes a batch of examples.
        num_workers: processes that fetch ahead; 0 fetches in the main process.
    """

    def __init__(
        self, examples: Sequence[Example], batches: list[list[int]], length: int, collator: Collator, num_workers: int
    ) -> None:
        self.examples, self.batches, self.length = examples, batches, length
        self.collator, self.num_workers = collator, num_workers

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return _deliver(self.examples, self.batches, self.collator, self.num_workers)
