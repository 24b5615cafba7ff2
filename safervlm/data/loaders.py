"""Deterministic, resumable data loaders."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import fingerprint, seed_for
from safervlm.io.signals import defer_signal_in_worker
from safervlm.records import Example

T = TypeVar("T")
Collator = Callable[[Sequence[Example]], Any]
# Initial number of questions per batch with batch_size "auto".
AUTOMATIC = 256


def image_groups(examples: Sequence[Example]) -> list[list[int]]:
    """Groups examples by their image; an example without an image forms a separate group.

    Args:
        examples: Examples in any order.

    Returns:
        The row numbers of the examples of each group.
    """
    groups: dict[str | int, list[int]] = {}
    for row, example in enumerate(examples):
        groups.setdefault(example.question.image_path or row, []).append(row)
    return list(groups.values())


def training_batches(
    groups: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Computes the batches of an epoch.

    All groups, and the examples of each, are shuffled by (seed, epoch) and cut into global batches of ``world_size *
    batch_size`` examples; a group at a cut is divided. Each process takes a consecutive slice of every global batch, so
    two processes see in one step the same examples as one process with twice the batch size. The last global batch may
    be smaller; it is divided so that the sizes per process differ by at most one. It is dropped only if it has fewer
    examples than there are processes.

    Args:
        groups: Row numbers of the examples that stay together. Groups of one example allow any order.
        batch_size: Number of examples per batch of one process.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.
        rank: Rank of this process.
        world_size: Number of processes.

    Returns:
        The row numbers of the examples in each batch of this process.
    """
    generator = random.Random(seed_for(seed, "order", epoch))
    shuffled = list(map(list, groups))
    generator.shuffle(shuffled)
    for group in shuffled:
        generator.shuffle(group)
    order = [row for group in shuffled for row in group]
    size = world_size * batch_size
    batches = []
    for start in range(0, len(order), size):
        together = order[start : start + size]
        if len(together) >= world_size:
            begin, end = (len(together) * r // world_size for r in (rank, rank + 1))
            batches.append(together[begin:end])
    return batches


def _deliver(
    examples: Sequence[Example], batches: Sequence[list[int]], collator: Collator, num_workers: int
) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        examples,  # type: ignore[arg-type]  # a list serves as a dataset
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=num_workers,
        # DataLoader samples a seed for its workers. With the global generator, this would change all random numbers
        # sampled later (LoRA's dropout), so a resumed run, which creates its loader at another time, would differ.
        generator=torch.Generator(),
        worker_init_fn=defer_signal_in_worker,
    )
    try:
        yield from loader
    except RecordError as error:
        # A worker's error message contains its traceback; the last line is the original message.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{RecordError.__module__}.RecordError: ")
        raise RecordError(message) from None


class TrainingLoader:
    """Shuffled batches, deterministic given (seed, epoch), with a position that is saved in checkpoints.

    Lightning saves :meth:`state_dict` and calls :meth:`load_state_dict` before it resumes in the middle of an epoch.
    The position counts batches that were delivered, not those prefetched by workers. The class is not a ``DataLoader``,
    so Lightning does not add a distributed sampler.

    Args:
        examples: All training examples.
        collator: Function that turns examples into a batch.
        batch_size: Number of examples per batch of one process.
        num_workers: Number of processes that prefetch batches. 0 loads them in the main process.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of processes.
        current_epoch: Returns the epoch; called when the first batch of an iteration is requested. Lightning's
            ``set_epoch`` is not used: it is one epoch too high after resuming, at the end of an epoch, a run limited by
            steps.
        groups: Row numbers of the examples that stay together; None for any order.

    Raises:
        RecordError: There are fewer examples than processes.
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
        groups: Sequence[Sequence[int]] | None = None,
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
        self.groups = groups or [[row] for row in range(len(examples))]
        self._epoch = 0
        self._delivered = 0
        self._start = 0  # first batch of the next iteration, if it is of the same epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.examples), self.world_size * self.batch_size)
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[Any]:
        # A generator: this code runs when the first batch is requested. Lightning creates the iterator before it
        # restores the position.
        epoch = self.current_epoch()
        self._delivered = self._start if epoch == self._epoch else 0
        self._epoch, self._start = epoch, 0
        batches = training_batches(self.groups, self.batch_size, self.seed, epoch, self.rank, self.world_size)
        loader = _deliver(self.examples, batches[self._delivered :], self.collator, self.num_workers)
        try:
            for batch in loader:
                self._delivered += 1
                yield batch
        except RecordError as error:  # images have been checked before the first step, but may change
            place = f"batch {self._delivered + 1} of epoch {epoch + 1}"
            raise RecordError(f"{error} ({place}; checkpoints/last.ckpt stays usable if there is one)") from None

    def _order(self) -> dict[str, Any]:
        # Everything except the epoch that determines which examples the first k batches contain. Equal on all ranks.
        ids = fingerprint("\n".join(example.question.id for example in self.examples))
        together = max(map(len, self.groups)) > 1  # checkpoints of earlier versions lack the key: False
        return {
            "examples": ids,
            "seed": self.seed,
            "batch_size over all processes": self.world_size * self.batch_size,
            **({"questions_together": True} if together else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch, the number of batches delivered in it, and everything else their order depends on."""
        return {"epoch": self._epoch, "batches": self._delivered, "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes after the batches that were delivered.

        Args:
            state: Result of :meth:`state_dict`.

        Raises:
            ArgumentError: The examples, the seed or the global batch size differ, so the position would refer to other
                examples.
        """
        order = self._order()
        for name in order | state["order"]:
            before, value = state["order"].get(name, False), order.get(name, False)
            if before != value:
                raise ArgumentError(
                    f"data: the checkpoint is from the middle of an epoch with {name} {before}, now it "
                    f"is {value}: continue with the same data, or start from a checkpoint of an epoch's end"
                )
        self._epoch, self._delivered, self._start = state["epoch"], state["batches"], state["batches"]


def validation_batches(examples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Computes a process's batches of the held-out examples; over all processes, each example occurs once.

    All processes have the same number of non-empty batches, as required by steps with collective communication. A
    process gets the rows ``rank, rank + world_size, ...``, in order.

    Args:
        examples: Number of held-out examples.
        batch_size: Number of examples per batch of one process. With batch size 1 and several processes, a batch may
            have two examples, to keep the numbers of batches equal.
        rank: Rank of this process.
        world_size: Number of processes.

    Returns:
        The row numbers of the examples in each batch.

    Raises:
        RecordError: There are fewer examples than processes.
    """
    if examples < world_size:
        raise RecordError(f"{examples} validation examples for {world_size} processes: hold out more, or none")
    rows = list(range(rank, examples, world_size))
    longest = -(-len(range(0, examples, world_size)) // batch_size)
    count = min(longest, examples // world_size)
    bounds = [len(rows) * number // count for number in range(count + 1)]
    return [rows[begin:end] for begin, end in pairwise(bounds)] if world_size > 1 else in_batches(rows, batch_size)


def limited(items: Sequence[T], limit: int | None, group: Callable[[T], object]) -> list[T]:
    """Selects the first items of each group, in their original order.

    Args:
        items: Items in any order.
        limit: Maximum number of items per group. None selects all.
        group: Returns the group of an item.

    Raises:
        ArgumentError: The limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"data.limit: at least 1, or null, got {limit}")
    taken: Counter[object] = Counter()
    chosen = []
    for item in items:
        taken[group(item)] += 1
        if limit is None or taken[group(item)] <= limit:
            chosen.append(item)
    return chosen


def in_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cuts rows into consecutive batches.

    Args:
        rows: Row numbers.
        size: Number of rows per batch. The last batch may be smaller.

    Returns:
        The row numbers of each batch.
    """
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def prediction_batches(examples: Sequence[Example], batch_size: int, world_size: int = 1) -> list[list[list[int]]]:
    """Computes the batches of each process; each example occurs once, and questions about one image are kept together.

    A VLM encodes an image once for all its questions in a batch. Groups with the longest questions come first, so that
    out-of-memory errors surface in the first batches.

    Args:
        examples: Examples to predict, of all processes.
        batch_size: Maximum number of examples per batch.
        world_size: Number of processes.

    Returns:
        By rank, the row numbers of the examples in each batch.
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
    """Loader of batches that are computed in advance.

    Args:
        examples: Examples of all processes.
        batches: Row numbers of the examples in each batch of this process.
        length: Length that the loader reports. An iteration may yield fewer batches.
        collator: Function that turns examples into a batch.
        num_workers: Number of processes that prefetch batches. 0 loads them in the main process.
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
