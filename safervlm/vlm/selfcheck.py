"""Self-check of a model when it is loaded: two questions about two images, in a batch and separately.

It finds faults that make measurements wrong without an error: another processor than the model's own, inputs of a batch
that depend on the other questions, and a ``generate`` that ignores the sampling. A large model computes its first
layers only.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, GenerationConfig, LogitsProcessorList, PreTrainedModel

from safervlm.errors import ArgumentError, RecordError, explained, first_line
from safervlm.io.boundary import warn
from safervlm.io.images import ImageSettings
from safervlm.records import Example, Question
from safervlm.vlm.comparing import agree
from safervlm.vlm.encoding import EncodedBatch, ProcessorCollator
from safervlm.vlm.prefix import Encoding, PrefixSharing

# The second question and its image are smaller, so that a batch pads both.
ASKED = (("Is this image safe? Give the reason in a few words.", (96, 64)), ("Is it safe?", (48, 56)))
LARGE = 2**28  # parameters, above which a model computes only its first layers
LAYERS = 2  # number of these layers
TOKENS = 2  # number of tokens that a small model generates
RESULTS: dict[tuple[Any, ...], dict[str, Any]] = {}  # of the checks in this process
UNLIKE = "can't be measured correctly"
PROCESSOR_FAILS = "its processor fails"


@dataclass
class Trace:
    """Values that a model computed for a batch.

    Attributes:
        width: Number of tokens of the longest prompt.
        inputs: Integer tensors that the model and its decoder received, by name.
        states: (rows, tokens, units) states after the first layers; for a small model None.
        logits: For a small model, the (rows, vocabulary) logits of each token.
        tokens: For a small model, the (rows, generated) tokens.
        steps: Number of calls of the logits processor.
    """

    width: int
    inputs: dict[str, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    logits: Sequence[Tensor] = ()
    tokens: Tensor | None = None
    steps: int = 0


class FirstLayersDone(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass early."""


def self_check(vlm: Any) -> None:
    """Checks a loaded model, whose adapters have no effect yet; once per process and state of its files.

    It sets ``vlm.checked``, which the manifest records: how the processor was compared (``processor``); the class that
    prepares images, whose name ends with ``Pil`` if there is one for Pillow and one for torchvision (``images``); the
    integer inputs with a value for each token (``aligned``); how many layers were computed (``layers``, None for all);
    and why questions have to be computed separately (``one_by_one``, None if they do not).

    Args:
        vlm: The loaded model, a :class:`safervlm.vlm.auto.Transformers`.

    Raises:
        ArgumentError: The model can't be measured correctly; the message states what differs.
    """
    key = _key(vlm)
    if key not in RESULTS:
        RESULTS[key] = _checked(vlm)
    vlm.checked = RESULTS[key]
    if reason := vlm.checked["one_by_one"]:
        warn(f"the questions are computed one by one: in a batch of this model, {reason}")


def _key(vlm: Any) -> tuple[Any, ...]:
    folder = Path(vlm.name)
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir())] if folder.is_dir() else []
    text = (vlm.template, vlm.system, repr(vlm.template_arguments))
    settings = (type(vlm), vlm.name, vlm.revision, vlm.dtype, *text)
    return (*settings, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


def _checked(vlm: Any) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        questions = [_question(Path(folder), *asked) for asked in ASKED]
        collator = replace(vlm.collator, images=ImageSettings(), max_length=2**31)
        with works(vlm, PROCESSOR_FAILS):
            try:
                encodings = collator([Example(question) for question in questions]).encodings
            except RecordError as error:
                raise ValueError(first_line(error)) from error
            processor = compare_processor(vlm, collator, questions, encodings)
    images = type(getattr(collator.processor, "image_processor", collator)).__name__  # or its own code
    result = {"processor": processor, "images": images, "aligned": aligned(encodings), "layers": 0, "one_by_one": None}
    if getattr(vlm.base, "is_quantized", False):  # may need a GPU, where the model isn't yet
        return result
    vlm.checked = result
    large = sum(parameter.numel() for parameter in vlm.base.parameters()) > LARGE
    with in_float32(vlm, skip=_layers(vlm.base)[LAYERS:] if large else ()):
        reason = _differences(vlm, questions, encodings, large)
    return result | {"layers": LAYERS if large else None, "one_by_one": reason}


def _question(folder: Path, prompt: str, size: tuple[int, int]) -> Question:
    width, height = size
    path = folder / f"{width}.png"
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Question("self-check", "", "", str(path), "alignment", 0, prompt, "", "", "")


def works(vlm: Any, what: str) -> AbstractContextManager[None]:
    """Returns a context manager that rejects a model whose code raises any exception.

    Args:
        vlm: The model.
        what: Description of the failure.
    """
    remedy = "use another model, or another version of transformers"
    return explained(f"vlm.model: {vlm.name!r} {UNLIKE}: {what}", remedy, Exception, error=ArgumentError)


def aligned(encodings: Sequence[Encoding]) -> list[str]:
    """Returns the names of the integer inputs with a value for each token, besides the tokens.

    Args:
        encodings: Encodings of questions of different lengths.
    """
    return [
        name
        for name in encodings[0]
        if name != "input_ids"
        and not any(e[name].is_floating_point() or e[name].shape[:2] != e["input_ids"].shape for e in encodings)
    ]


def compare_processor(
    vlm: Any, collator: ProcessorCollator, questions: Sequence[Question], encodings: Sequence[Encoding]
) -> str:
    """Compares the encodings with those of the processor that ``AutoProcessor`` loads, with the Pillow backend.

    Args:
        vlm: The model.
        collator: Its collator.
        questions: The questions.
        encodings: Their encodings by the collator.

    Returns:
        Class of the processor, and whether it was compared.

    Raises:
        ArgumentError: An encoding differs.
    """
    if type(collator) is not ProcessorCollator:
        return f"{type(collator).__name__}: its own code"
    mine = type(collator.processor).__name__
    try:
        own = AutoProcessor.from_pretrained(vlm.name, revision=vlm.revision, backend="pil", trust_remote_code=False)
    except (ImportError, ValueError):  # the video part needs torchvision
        if "video_processor" not in type(collator.processor).get_attributes():
            raise
        return f"{mine}, without its video part"
    for question, encoding in zip(questions, encodings, strict=True):
        expected = replace(collator, processor=own).encode(question)
        for name in sorted({*encoding, *expected}, key=lambda name: (name != "input_ids", name)):
            one, other = encoding.get(name), expected.get(name)
            if one is None or other is None or one.shape != other.shape or not torch.equal(one, other):
                shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (one, other)]
                raise ArgumentError(
                    f"vlm.model: {vlm.name!r} {UNLIKE}: {name} {shapes[0]} of {mine} differs from {shapes[1]} of its "
                    f"own {type(own).__name__}; correct processor_class in its processor_config.json"
                )
    return f"{mine}, compared"


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    found: Sequence[nn.Module] = getattr(model.get_decoder(), "layers", ())
    return found


@contextmanager
def in_float32(vlm: Any, skip: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Context manager in which a model computes in float32; the original tensors are restored afterwards.

    Args:
        vlm: The model.
        skip: Modules whose weights are not converted.
    """
    model, dtype, vlm.dtype = vlm.base, vlm.dtype, torch.float32
    kept = {id(tensor) for module in skip for tensor in module.parameters()}
    before = [(p, p.data) for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    for tensor, data in before:
        if id(tensor) not in kept and data.dtype != torch.float32:
            tensor.data = data.float()
    try:
        yield
    finally:
        vlm.dtype = dtype
        for tensor, data in before:
            tensor.data = data


def _differences(vlm: Any, questions: list[Question], encodings: Sequence[Encoding], large: bool) -> str | None:
    """Describes what differs between a batch and its second question alone; None if nothing does."""
    with works(vlm, "its code in transformers fails"):
        alone = trace(vlm, encodings[1:], large)
    if not large and alone.steps != len(alone.logits):
        raise ArgumentError(
            f"vlm.model: {vlm.name!r} {UNLIKE}: its generate called the logits processor {alone.steps} times for "
            f"{len(alone.logits)} tokens, so it ignores vlm.sampling; use another model"
        )
    try:
        together = trace(vlm, encodings, large)
        return difference(together, alone) or (None if large else _scores_differ(vlm, questions, encodings))
    except ArgumentError:  # can't be scored: reported where it is trained
        return None
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        return f"its code fails ({type(error).__name__}: {first_line(error)})"


@torch.no_grad()
def trace(vlm: Any, encodings: Sequence[Encoding], large: bool) -> Trace:
    """Computes questions in a batch, as :meth:`generate` does without prefix sharing.

    Args:
        vlm: The model.
        encodings: Encodings of the questions.
        large: Whether to compute only the first layers.
    """
    model = vlm.base
    tokenwise = {"input_ids", *vlm.written(encodings[0])}
    inputs = PrefixSharing(model, vlm.pad_token_id, vlm.image_token_ids, vlm.dtype).alone(encodings, tokenwise)
    found = Trace(inputs["input_ids"].shape[1])

    def receive(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            for key, value in given.items():
                if isinstance(value, Tensor) and not value.is_floating_point() and key != "input_ids":
                    found.inputs.setdefault(f"{key} of {name}", value.clone())

        return hook

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.states = output[0] if isinstance(output, tuple) else output
        raise FirstLayersDone

    def count(input_ids: Tensor, scores: Tensor) -> Tensor:
        found.steps += 1
        return scores

    with ExitStack() as hooks:
        for part, name in ((model, "the model"), (model.get_decoder(), "its decoder")):
            hooks.callback(part.register_forward_pre_hook(receive(name), with_kwargs=True).remove)
        if large:
            hooks.callback(_layers(model)[LAYERS - 1].register_forward_hook(stop).remove)
        settings = GenerationConfig(
            max_new_tokens=TOKENS, output_logits=True, return_dict_in_generate=True, pad_token_id=vlm.pad_token_id
        )
        try:
            output = model.generate(**inputs, generation_config=settings, logits_processor=LogitsProcessorList([count]))
        except FirstLayersDone:
            return found
    found.logits, found.tokens = output.logits, output.sequences[:, -len(output.logits) :]
    return found


def difference(together: Trace, alone: Trace) -> str | None:
    """Describes what differs between two questions in a batch and the second one alone; None if nothing does.

    Args:
        together: Trace of both questions.
        alone: Trace of the second one.
    """
    for name, value in alone.inputs.items():
        if name in together.inputs and not rows_equal_or_incomparable(
            together.inputs[name], value, together.width - alone.width
        ):
            return f"{name} differs"
    if together.states is not None and alone.states is not None:
        states = together.states[1:, -alone.states.shape[1] :]
        return None if agree(alone.states, states, torch.float32) else f"the states after {LAYERS} layers differ"
    for step, (one, both) in enumerate(zip(alone.logits, together.logits, strict=True)):
        if not agree(one, both[1:], torch.float32):
            return f"the logits of token {step + 1} differ"
        assert together.tokens is not None  # noqa: S101 (for mypy)
        assert alone.tokens is not None  # noqa: S101 (for mypy)
        if together.tokens[1, step] != alone.tokens[0, step]:
            break  # the logits are nearly equal, and so are those of the next token
    return None


def rows_equal_or_incomparable(batch: Tensor, alone: Tensor, padding: int) -> bool:
    """Returns whether the second row of a batch equals a tensor of one row, or the two can't be compared.

    Args:
        batch: A tensor with two rows, in any dimension; a dimension of tokens is padded on the left.
        alone: The tensor of the second row.
        padding: Number of padding tokens of the second row.
    """
    if batch.dim() != alone.dim():
        return True
    for axis in range(batch.dim()):
        if batch.shape[axis] != 2 or alone.shape[axis] != 1:
            continue
        row = batch.select(axis, 1)
        rest = alone.select(axis, 0)
        if all(wide - size in (0, padding) for wide, size in zip(row.shape, rest.shape, strict=True)):
            for dimension, size in enumerate(rest.shape):
                row = row.narrow(dimension, row.shape[dimension] - size, size)
            return torch.equal(row, rest)
    return True


@torch.no_grad()
def _scores_differ(vlm: Any, questions: list[Question], encodings: Sequence[Encoding]) -> str | None:
    """Returns that the states that score responses differ between a batch and its second question; or None."""
    answers = [[[vlm.eos_token_ids[0]]], [[vlm.eos_token_ids[0]] * 2]]
    rows = [slice(None), slice(1, None)]
    batches = [EncodedBatch(questions[some], list(encodings[some]), answers[some]) for some in rows]
    together, alone = (vlm.response_states(batch, "reference")[1] for batch in batches)
    return None if agree(alone, together[-len(alone) :], torch.float32) else "the scores of a response differ"
