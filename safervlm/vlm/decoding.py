"""Decoding with steps of fixed shapes: the tensors of a step are allocated once, and no step synchronises with the CPU.

Questions are decoded in rows, one or several per row (:class:`Rows`). A step computes one token of every question. A
finished question keeps its slot, whose further tokens are ignored, until its row is refilled with a waiting question or
finished rows are removed from the batch. On a GPU a step is captured as a CUDA graph (:mod:`safervlm.vlm.graphs`) for
each number of rows and each length of attention, and replayed.

The tokens equal those of the loops with growing tensors (``PackedVLM`` and ``generate`` of transformers), up to
rounding.

Shapes: R rows, Q slots (for questions) of a row, G rows that are started together, P columns of the longest prompt, K
columns of the cache, C coordinates of a position, N maximum number of tokens of a response, V tokens of the vocabulary,
A key/value heads, D head dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from safervlm.ranges import in_range
from safervlm.vlm.cache import Places, fixed
from safervlm.vlm.graphs import Capture, Graphs
from safervlm.vlm.noise import STEP
from safervlm.vlm.sampling import Choice

CHECK_INTERVAL = 8  # steps between two checks for end tokens; on a CPU, where they are cheap, each step has one
BUCKET = 64  # the length of attention of a CUDA graph is rounded up to a multiple of this number
REFILL = 4  # waiting questions start when a quarter (1 / REFILL) of the rows is free, so that several start together
REQUESTED = "requested by vlm.decoding.step"  # reason for growing steps


@dataclass(frozen=True)
class Decoding:
    """How decoding steps are computed. Responses don't depend on it, up to rounding.

    Args:
        step: ``automatic`` uses steps of fixed shapes where the model's KV cache allows it, as CUDA graphs on a GPU;
            other models use growing steps. ``eager`` is the same without CUDA graphs. ``growing`` uses loops whose
            tensors grow by one token per step. The run's log and manifest state what was used, and why.
        rows: Maximum number of rows that are decoded at once; further questions of the batch wait until rows are free.
            A row contains up to 8 questions about an image for LLaVA, and one question for other models. None decodes
            all questions of a batch at once.

    Raises:
        ArgumentError: ``rows`` is less than 1.
    """

    step: Literal["automatic", "eager", "growing"] = "automatic"
    rows: int | None = None

    def __post_init__(self) -> None:
        """Rejects values out of range."""
        if self.rows is not None:
            in_range("vlm.decoding", least=1, rows=self.rows)


@dataclass
class DecodedTokens:
    """The decoded responses to the questions of a batch.

    Attributes:
        tokens: The tokens of each response.
        bad: For each response, whether its logits were not finite, which ends it.
        logprobs: The log-probability of each token; None unless the sampling records them. Those of the library's loop
            continue after the end of a response.
    """

    tokens: list[list[int]]
    bad: list[bool]
    logprobs: list[list[float]] | None = None


@dataclass
class Prompts:
    """Rows whose prompts are computed.

    Attributes:
        layers: (G, A, P, D) keys and values of each layer.
        seen: (G, Q, P) True for the columns that a slot attends to.
        positions: (G, Q, C) position of the last token of each prompt.
        logits: (G, Q, V) logits of the first token of each response.
    """

    layers: list[tuple[Tensor, Tensor]]
    seen: Tensor
    positions: Tensor
    logits: Tensor


class Rows(ABC):
    """The questions of a batch in rows, and the model-specific part of decoding them.

    Attributes:
        questions: Indices of the questions of each row.
        dtype: Data type of attention masks.
    """

    questions: list[list[int]]
    dtype: torch.dtype

    @property
    def slots(self) -> int:
        """Q, the number of questions of the longest row."""
        return max(map(len, self.questions))

    @abstractmethod
    def prefill(self, rows: Sequence[int]) -> Prompts:
        """Computes the prompts of some of the rows.

        Args:
            rows: Numbers of the rows.
        """

    @abstractmethod
    def logits(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Computes the (R, Q, V) logits that follow a token of each slot.

        Args:
            tokens: (R, Q) token ids.
            positions: (R, Q, C) their positions.
            mask: (R, 1, Q, length) mask that attention adds to its scores.
            cache: KV cache that the step writes to and attends to.
        """


class State:
    """Everything that the steps of some rows read and write; all tensors keep their shapes and addresses.

    The first dimension of all tensors is R.

    Args:
        prompts: The computed prompts; their keys and values are moved, so that they are not stored twice.
        keys: For each row, the keys of the noise of its questions.
        most: N.
        capacity: K.
        dtype: Data type of the attention mask.

    Attributes:
        tokens: (R, Q) the last token of each response, which the next step computes.
        positions: (R, Q, C) its position.
        columns: (R, Q) its column in the cache.
        counters: (R, Q) counter of the noise of the token after it.
        made: (R, Q) number of tokens of the response.
        answers: (R, Q, N + 1) its tokens, followed by arbitrary values.
        logprobs: (R, Q, N + 1) their log-probabilities, 0 unless the sampling records them; then arbitrary values.
        done: (R, Q) whether it has ended. True for slots without a question.
        bad: (R, Q) whether its logits were not finite.
        undecided: (R, Q) whether the last step could not choose a token, so that the next one repeats it.
        mask: (R, Q, K) 0 for the columns that a slot attends to, minus infinity for the others.
        cache: (R, A, K, D) keys and values of each layer.
    """

    def __init__(
        self, prompts: Prompts, keys: Sequence[Sequence[int]], most: int, capacity: int, dtype: torch.dtype
    ) -> None:
        rows, slots, columns = prompts.seen.shape
        device = prompts.seen.device
        self.capacity = capacity
        padded = [[*row, *[0] * (slots - len(row))] for row in keys]
        asked = torch.tensor([[slot < len(row) for slot in range(slots)] for row in keys], device=device)
        self.tokens = torch.zeros(rows, slots, dtype=torch.long, device=device)
        # The first choice of a token advances these by one.
        self.positions = prompts.positions.clone()
        self.columns = columns + torch.arange(slots, device=device) - slots * asked
        self.counters = torch.tensor(padded, device=device) + STEP
        self.made, self.done = torch.zeros_like(self.tokens), ~asked
        self.bad, self.undecided = torch.zeros_like(self.done), torch.zeros_like(self.done)
        self.answers = torch.zeros(rows, slots, most + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, slots, most + 1, device=device)
        self.mask = torch.full((rows, slots, capacity), -torch.inf, dtype=dtype, device=device)
        self.mask[:, :, :columns].masked_fill_(prompts.seen, 0)
        self.places = Places(self.columns, capacity)
        layers = []
        while prompts.layers:
            computed, values = prompts.layers.pop(0)
            layers.append((with_room(computed, capacity), with_room(values, capacity)))
        self.cache = fixed(layers, self.places)

    def _replace(self, new: Callable[[Tensor], Tensor]) -> None:
        """Replaces the buffers of the cache, whose rows or columns have changed."""
        self.places = Places(self.columns, self.capacity)
        for layer in self.cache.layers:
            layer.keys, layer.values, layer.places = new(layer.keys), new(layer.values), self.places

    def forward(self, rows: Rows, length: int, start: int | None = None) -> Tensor:
        """Computes the (R, Q, V) logits of the next token of each slot.

        Args:
            rows: The model-specific part of decoding.
            length: Number of columns that attention uses; all columns in use are among them.
            start: First column of the step, if all rows have the same one (finished slots excepted); None otherwise.
        """
        self.places.begin(length, start)
        self.mask.scatter_(2, self.columns[..., None], 0)
        return rows.logits(self.tokens, self.positions, self.mask[:, None, :, :length], self.cache)

    def choose(self, logits: Tensor, choice: Choice, levels: int | None) -> None:
        """Chooses the next token of each slot, and advances the slots that have one.

        Args:
            logits: (R, Q, V) logits.
            choice: Sampling settings, suppressed tokens and end tokens.
            levels: See :meth:`Choice.tokens`.
        """
        found = choice.tokens(logits.flatten(0, 1), self.counters.flatten(), levels)
        tokens, wrong, undecided, logprobs = (each.view_as(self.tokens) for each in found)
        self.logprobs.scatter_(2, self.made[..., None], logprobs[..., None])
        self.undecided.copy_(undecided & ~self.done)
        going = ~(self.done | undecided)
        self.advance(going, tokens)
        self.bad |= going & wrong
        ended = wrong | (tokens[..., None] == choice.ends).any(-1) | (self.made >= choice.sampling.max_new_tokens)
        self.done |= going & ended

    def advance(self, going: Tensor, tokens: Tensor) -> None:
        """Appends a token to some of the responses.

        Args:
            going: (R, Q) True for these responses.
            tokens: (R, Q) tokens; those of other responses are ignored.
        """
        self.answers.scatter_(2, self.made[..., None], tokens[..., None])
        self.tokens.copy_(torch.where(going, tokens, self.tokens))
        self.made += going
        self.counters += going * STEP
        self.positions += going[..., None]
        self.columns += going * self.tokens.shape[1]  # each slot has every Q-th column

    def _per_row(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def select(self, rows: Tensor) -> None:
        """Keeps some of the rows, in new tensors.

        Args:
            rows: Indices of the rows.
        """
        for name, tensor in self._per_row().items():
            setattr(self, name, tensor[rows])
        self._replace(lambda buffer: buffer[rows])

    def grow(self, capacity: int) -> None:
        """Increases the number of columns, in new tensors.

        Args:
            capacity: The new K.
        """
        self.mask, self.capacity = with_room(self.mask, capacity, -torch.inf), capacity
        self._replace(lambda buffer: with_room(buffer, capacity))

    def put(self, places: Tensor, other: "State") -> None:
        """Replaces rows in place.

        Args:
            places: Indices of the rows.
            other: State with as many rows and the same capacity.
        """
        news = other._per_row()
        for name, tensor in self._per_row().items():
            tensor[places] = news[name]
        for old, new in zip(self.cache.layers, other.cache.layers, strict=True):
            old.keys[places], old.values[places] = new.keys, new.values


def with_room(tensor: Tensor, capacity: int, value: float = 0) -> Tensor:
    """Copies a tensor into one with a larger third dimension.

    Args:
        tensor: The tensor.
        capacity: The new size.
        value: Value of the added elements. It must be finite for keys and values, even where attention masks them.
    """
    rows, heads, length, *rest = tensor.shape
    longer = tensor.new_full((rows, heads, capacity, *rest), value)
    longer[:, :, :length] = tensor
    return longer


def rounded(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least a number.

    Args:
        number: The number.
        multiple: The result is a multiple of it.
    """
    return -(-number // multiple) * multiple


class Decoder:
    """Decodes the questions of a batch.

    Args:
        rows: The questions in rows, and the model-specific part of decoding.
        keys: Key of the noise of each question.
        choice: Sampling settings, suppressed tokens and end tokens.
        at_once: Number of rows that are decoded at once; None for all.
        capture: Function that captures a step; None computes each step without capture.

    Attributes:
        graphs: The captured steps.
    """

    def __init__(
        self, rows: Rows, keys: Sequence[int], choice: Choice, at_once: int | None, capture: Capture | None
    ) -> None:
        self.rows, self.choice, self.most = rows, choice, choice.sampling.max_new_tokens
        self.keys = [[keys[question] for question in row] for row in rows.questions]
        self.waiting = list(range(len(rows.questions)))
        self.at_once = min(len(self.waiting), at_once or len(self.waiting))
        self.graphs = Graphs(capture)
        self.levels = None if capture is None else 0
        self.used = 0  # columns in use
        self.aligned = True  # whether all rows have the same columns, because they started together
        self.answers: list[list[int]] = [[] for _ in keys]
        self.bad = [False for _ in keys]
        self.logprobs: list[list[float]] = [[] for _ in keys]

    def run(self) -> DecodedTokens:
        """Returns the decoded response to each question."""
        held = self._take(self.at_once)
        state = self._started(held)
        held, state = self._changed(held, state)
        while held:
            if self.levels is None and state.tokens.device.type == "cpu":
                self._make_steps(state, 1)
            else:
                left = int((self.most - state.made).masked_fill(state.done, 0).max())
                self._make_steps(state, min(CHECK_INTERVAL, left))
            held, state = self._changed(held, state)
        return DecodedTokens(self.answers, self.bad, self.logprobs if self.choice.sampling.logprobs else None)

    def _make_steps(self, state: State, steps: int) -> None:
        """Computes steps of one shape."""
        slots = self.rows.slots
        start = self.used if self.aligned and steps == 1 and self.levels is None else None
        self.used += steps * slots
        length = self.used if self.levels is None else rounded(self.used, BUCKET * slots)
        if length > state.capacity:
            self._grow(state, length + (BUCKET - 1) * slots)

        def step() -> None:
            state.choose(state.forward(self.rows, length, start), self.choice, self.levels)

        for _ in range(steps):
            self.graphs.run((length, self.levels), step)

    def _grow(self, state: State, capacity: int) -> None:
        state.grow(rounded(capacity, BUCKET))
        self.graphs.clear()

    def _take(self, count: int) -> list[int]:
        """Removes and returns the next waiting rows."""
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def _started(self, numbers: Sequence[int], capacity: int = 0) -> State:
        """Computes the prompts of some rows, and the first token of each response."""
        prompts = self.rows.prefill(numbers)
        enough = prompts.seen.shape[-1] + min(BUCKET, self.most) * self.rows.slots
        capacity = max(capacity, rounded(enough, BUCKET))
        state = State(prompts, [self.keys[number] for number in numbers], self.most, capacity, self.rows.dtype)
        state.choose(prompts.logits, self.choice, None)
        self.used = max(self.used, prompts.seen.shape[-1])
        return state

    def _changed(self, held: list[int], state: State) -> tuple[list[int], State]:
        """Collects the responses of finished rows, and starts waiting rows.

        Args:
            held: Number of each row of the state; -1 for a free one.
            state: The state.

        Returns:
            Both after the change; no rows if all questions are answered.
        """
        if self.levels is not None and bool(state.undecided.any()):
            self.levels += 1
        held, free = self._released(held, state)
        while self.waiting and len(free) * REFILL >= len(held):
            self._refill(held, free, state)
            held, free = self._released(held, state)  # a first token may have been the last
        live = [place for place, number in enumerate(held) if number >= 0]
        if not self.waiting and 2 * len(live) <= len(held):  # otherwise copying the cache costs more than it saves
            held = [held[place] for place in live]
            if held:
                state.select(torch.tensor(live, device=state.tokens.device))
                self.graphs.clear()
        return held, state

    def _released(self, held: list[int], state: State) -> tuple[list[int], list[int]]:
        """Stores the responses of finished rows. Returns the number of each row (-1: free), and the free rows."""
        over = state.done.all(-1).tolist()
        self._collect(held, state, [place for place, number in enumerate(held) if over[place] and number >= 0])
        held = [-1 if ended else number for number, ended in zip(held, over, strict=True)]
        return held, [place for place, number in enumerate(held) if number < 0]

    def _refill(self, held: list[int], free: Sequence[int], state: State) -> None:
        """Starts waiting rows in the places of free ones."""
        numbers = self._take(len(free))
        news = self._started(numbers, state.capacity)
        if news.capacity > state.capacity:
            self._grow(state, news.capacity)
        places = free[: len(numbers)]
        state.put(torch.tensor(places, device=state.tokens.device), news)
        for place, number in zip(places, numbers, strict=True):
            held[place] = number
        self.aligned, self.used = False, int(state.columns.max()) + 1 - self.rows.slots

    def _collect(self, held: Sequence[int], state: State, places: list[int]) -> None:
        """Stores the responses of finished rows."""
        if not places:
            return
        found = (state.made, state.bad, state.answers, state.logprobs)
        made, bad, answers, logprobs = (each[places].tolist() for each in found)
        for row, place in enumerate(places):
            for slot, question in enumerate(self.rows.questions[held[place]]):
                self.answers[question] = answers[row][slot][: made[row][slot]]
                self.logprobs[question] = logprobs[row][slot][: made[row][slot]]
                self.bad[question] = bad[row][slot]
