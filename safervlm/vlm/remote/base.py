"""Models whose code comes with their weights; it runs unmodified, with the user's consent, at a fixed commit.

Incompatibilities with current transformers are worked around from the outside: no remote code is copied, and no file of
it is changed.

Shapes: B rows, L tokens, A attention heads, D units of a head.
"""

import re
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_layers import GradientCheckpointingLayer

from safervlm.errors import ArgumentError
from safervlm.hashing import fingerprint
from safervlm.io.images import BLANK, ImageSettings, open_image
from safervlm.records import Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.compat import CACHE, get_tokenizer_config
from safervlm.vlm.encoding import ProcessorCollator
from safervlm.vlm.lora import LoRA
from safervlm.vlm.weights import load_model, reading


class MissingPackageStub(ModuleType):
    """Stub of a package that remote code imports but doesn't need; every attribute and call returns the stub itself."""

    def __getattr__(self, name: str) -> Self:
        """Returns the stub, except for dunder names, which the import machinery looks up."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Self:
        """Returns the stub, for use as a decorator or a constructor."""
        return self


@contextmanager
def stubbed_modules(names: Iterable[str], module: ModuleType) -> Iterator[None]:
    """Context manager that makes packages importable as a stub, installed or not; the previous modules are restored.

    Args:
        names: Full names of the modules to replace.
        module: The stub.
    """
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names, module))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False) -> Tensor:
    """Applies rotary positions (arXiv:2104.09864); used in place of functions of the remote code.

    Args:
        states: (B, A, L, D) queries or keys.
        cos: (B, L, D / 2) cosines of each position.
        sin: (B, L, D / 2) sines of each position.
        interleaved: Whether the two coordinates of a pair are adjacent. Not supported, and used by no model here.
        inplace: Whether ``states`` may be overwritten; ignored, they never are.

    Returns:
        (B, A, L, D) the rotated states.

    Raises:
        NotImplementedError: ``interleaved`` is set.
    """
    if interleaved:
        raise NotImplementedError("interleaved rotary positions")
    cos, sin = cos[:, None], sin[:, None]
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class LegacyTupleCacheMixin:
    """Mixin for remote model classes of transformers 4, whose layers use tuples as a KV cache.

    It precedes the model class in the bases, so that its methods override the model's.
    """

    supports_gradient_checkpointing = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_position_ids_for_generation(self, *args: Any) -> None:
        """Does nothing: the model counts positions itself, differently from the library."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Returns the inputs of a generation step, with the KV cache under the former name that remote code uses.

        Args:
            input_ids: (B, L) token ids.
            **kwargs: The other inputs, with the cache under the library's name.
        """
        former = {"past_key_values": kwargs.pop(CACHE, None)}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs, **former)  # type: ignore[misc]
        return inputs

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # The remote override calls a function that no longer exists.
        return GenerationMixin._update_model_kwargs_for_generation(self, *args, **kwargs)


@dataclass
class RemoteCollator(ProcessorCollator):
    """Makes an ``EncodedBatch`` of examples for a model that comes with a tokenizer and no processor.

    Attributes:
        processor: The tokenizer.
        template: Prompt text with ``{question}``.
        image_size: Side of the square that every image is resized to, ignoring its aspect ratio, in pixels.
        image_tokens: Number of placeholder tokens per image.
        image_token_id: Id of the placeholder token.
    """

    processor: Any
    template: str
    image_size: int
    image_tokens: int
    image_token_id: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.processor

    def pixels(self, question: Question) -> Tensor:
        """Returns the normalised pixel values of a question's image; a question without an image gets a blank one.

        Args:
            question: The question, with the path of its image.

        Returns:
            (3, image_size, image_size) pixel values, normalised with CLIP's mean and standard deviation.

        Raises:
            RecordError: The image can't be decoded.
        """
        path = question.image_path
        image = BLANK if path is None else open_image(path, question.id, self.images)
        pixels = np.asarray(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC), np.float32)
        pixels = (pixels / 255 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
        return torch.from_numpy(pixels).float().permute(2, 0, 1)


class Remote(Transformers):
    """Abstract VLM that runs the code in its own repository.

    Args:
        model: Name on the Hugging Face Hub, or folder, of the model and its code.
        revision: Full commit (40 hexadecimal digits) of a model on the Hub.
        trust_remote_code: Run the Python code that comes with the model; must be true.
        adapter: PEFT folder of the adapter to measure. None for the base model.
        lora: Settings of the LoRA adapters that training creates.
        dtype: Data type of the base weights. Adapter weights stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass. Takes less memory and about a third more
            time.
        template: Prompt text with the placeholder ``{question}``.
        system: System prompt of the conversation; empty for none.
        images: How images are decoded, and the size limits above which they are rejected.

    Attributes:
        family: Name of the model family, for error messages.
        absent: Modules that the remote code imports but doesn't need; they are replaced while it is imported.
        stand_in: The stub that replaces them.

    Raises:
        ArgumentError: ``trust_remote_code`` is false, or a model on the Hub has no full commit as its revision.
    """

    family: ClassVar[str]
    absent: ClassVar[tuple[str, ...]]
    stand_in: ClassVar[ModuleType] = MissingPackageStub("absent")

    def __init__(
        self,
        model: str,
        revision: str | None,
        trust_remote_code: bool,
        adapter: str | None,
        lora: LoRA,
        dtype: Literal["float32", "bfloat16"],
        gradient_checkpointing: bool,
        template: str,
        system: str = "",
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing, system, template, images)
        if not trust_remote_code:
            raise ArgumentError(
                f"vlm.trust_remote_code: {model!r} runs its own Python code on this machine; read that code, then "
                "set it to true, or measure another model"
            )
        if not Path(model).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            raise ArgumentError(
                f"vlm.revision: code from the Hub is run at a fixed commit only, got {revision!r}; pin it: give the "
                f"full 40 digits of a commit that you have read (https://huggingface.co/{model}/commits/main)"
            )

    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response.

        The code of a model on the Hub is identified by its revision, that of a folder by a hash.
        """
        folder = Path(self.name)
        if not folder.is_dir():
            return super().describe() | {"code": self.revision}
        described = super().describe() | {"code": fingerprint(*sorted(folder.glob("*.py")))}
        if not any(folder.glob("*.safetensors")):
            described["weights"] = fingerprint(described["weights"], *sorted(folder.glob("pytorch_model*.bin")))
        return described

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """Content of ``config.json``, unmodified; the library drops and rewrites some entries."""
        with reading(self.name):
            return PreTrainedConfig.get_config_dict(self.name, revision=self.revision)[0]

    def remote_class(self, name: str) -> Any:
        """Imports a class of the model's repository, which runs the file that defines it.

        Args:
            name: Key in the ``auto_map`` of the model's configuration, or ``AutoTokenizer`` for the tokenizer's.

        Raises:
            ArgumentError: The repository has no such class, refers to another repository, or can't be imported.
        """
        settings = self.raw_config
        if name == "AutoTokenizer":
            with reading(self.name):
                settings = get_tokenizer_config(self.name, revision=self.revision)
        reference = settings.get("auto_map", {}).get(name) or ""
        if isinstance(reference, list):  # the slow tokenizer, then the fast one
            reference = reference[0]
        if not reference or "--" in reference:
            raise ArgumentError(
                f"vlm.model: the code of {self.name!r} must be in its own repository, but {name} in its auto_map "
                f"is {reference!r}; name a {self.family}"
            )
        with reading(self.name):
            try:
                with stubbed_modules(self.absent, self.stand_in):
                    return get_class_from_dynamic_module(reference, self.name, revision=self.revision)
            except ImportError as error:
                raise ArgumentError(
                    f"vlm.model: the code of {self.name!r} can't be imported ({str(error).splitlines()[0]}); "
                    f"{self.family}'s needs pip install 'safervlm[remote]'"
                ) from error

    @cached_property
    @abstractmethod
    def collator(self) -> RemoteCollator:
        """The collator, checked against one prompt that the model's own code encodes."""

    @property
    def image_token_ids(self) -> set[int]:
        """Set of the one placeholder id."""
        return {self.collator.image_token_id}

    @abstractmethod
    def adapt(self, remote: Any) -> Any:
        """Returns the remote model class, adapted to current transformers and to any device.

        Args:
            remote: The model class of the repository.
        """

    def load_base(self) -> PreTrainedModel:
        """Loads the base weights, from safetensors, or else from PyTorch files with ``weights_only``."""
        adapted = self.adapt(self.remote_class("AutoModelForCausalLM"))
        model: Any = load_model(
            adapted, self.name, revision=self.revision, config=self.config, dtype=self.dtype, weights_only=True
        )
        for layer in model.get_decoder().layers:
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (GradientCheckpointingLayer, kind), {})
        return self.prepare(model)

    @abstractmethod
    def image_encoder(self, model: PreTrainedModel) -> nn.Module:
        """Returns the submodule that encodes the pixels of an image; its name depends on the remote code.

        Args:
            model: The loaded model.
        """
