"""Models whose code comes with their weights: it is asked for, at a commit that was read, and run as it is.

What has changed in transformers since that code was written is put right around it: nothing of it is copied, and no
file of it is changed.

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


class Absent(ModuleType):
    """Stands for a package that remote code imports; whatever it takes from it is this again."""

    def __getattr__(self, name: str) -> Self:
        """Anything but what the import machinery looks for."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Self:
        """A decorator or a constructor."""
        return self


@contextmanager
def standing_in(names: Iterable[str], module: ModuleType) -> Iterator[None]:
    """Within it, packages that remote code needs by name only can be imported, installed or not."""
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names, module))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False) -> Tensor:
    """Rotary positions (arXiv:2104.09864).

    Args:
        states: (B, A, L, D) queries or keys.
        cos: (B, L, D / 2) of each place.
        sin: the same.
        interleaved: whether pairs stand side by side, which no model here uses.
        inplace: may overwrite ``states``, which this doesn't.
    """
    if interleaved:
        raise NotImplementedError("interleaved rotary positions")
    cos, sin = cos[:, None], sin[:, None]
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Tuples:
    """What a model class of transformers 4 is given before its own: its layers read and write tuples as a cache."""

    supports_gradient_checkpointing = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_position_ids_for_generation(self, *args: Any) -> None:
        """The library would count in its own way; the model counts itself."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What a step of ``generate`` computes with; the code knows the cache by its former name."""
        former = {"past_key_values": kwargs.pop(CACHE, None)}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs, **former)  # type: ignore[misc]
        return inputs

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # A remote one calls what is no longer there.
        return GenerationMixin._update_model_kwargs_for_generation(self, *args, **kwargs)


@dataclass
class RemoteCollator(ProcessorCollator):
    """Examples -> ``EncodedBatch`` for a model that comes with a tokenizer and no processor.

    Attributes:
        processor: the tokenizer.
        template: the text around a question.
        image_size: the side of the square that every image is stretched to, in pixels.
        image_tokens: the number of an image's places.
        image_token_id: what stands in them.
    """

    processor: Any
    template: str
    image_size: int
    image_tokens: int
    image_token_id: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.processor

    def pixels(self, question: Question) -> Tensor:
        """(3, image_size, image_size) of the image; a blank one stands for none."""
        path = question.image_path
        image = BLANK if path is None else open_image(path, question.id, self.images)
        pixels = np.asarray(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC), np.float32)
        pixels = (pixels / 255 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
        return torch.from_numpy(pixels).float().permute(2, 0, 1)


class Remote(Transformers):
    """A model that runs by the code in its own repository.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model and its code.
        revision: the full commit (40 hexadecimal digits) of a model on the Hub.
        trust_remote_code: run the Python code that comes with the model.
        adapter: PEFT folder of the adapter to measure with; none for the base model.
        lora: the adapter that training makes.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass.
        system: the conversation's system prompt; empty for none.
        template: the text around ``{question}``.
        images: how images are decoded, and which are too large.
    """

    family: ClassVar[str]
    absent: ClassVar[tuple[str, ...]]
    stand_in: ClassVar[ModuleType] = Absent("absent")

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
                f"vlm.trust_remote_code: {model!r} runs Python code of its own on this machine; read that code, then "
                "set it to true, or measure another model"
            )
        if not Path(model).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            raise ArgumentError(
                f"vlm.revision: code from the Hub is run at a fixed commit only, got {revision!r}; pin it: give the "
                f"full 40 digits of a commit that you have read (https://huggingface.co/{model}/commits/main)"
            )

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer; on the Hub, code and weights are the revision's."""
        folder = Path(self.name)
        if not folder.is_dir():
            return super().describe() | {"code": self.revision}
        described = super().describe() | {"code": fingerprint(*sorted(folder.glob("*.py")))}
        if not any(folder.glob("*.safetensors")):
            described["weights"] = fingerprint(described["weights"], *sorted(folder.glob("pytorch_model*.bin")))
        return described

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The configuration as it stands in its file; today's library drops some of it and rewrites some."""
        with reading(self.name):
            return PreTrainedConfig.get_config_dict(self.name, revision=self.revision)[0]

    def remote_class(self, name: str) -> Any:
        """Runs the file of a class that the repository names, and gives the class.

        Args:
            name: as the ``auto_map`` of the configuration, or of the tokenizer's, has it.
        """
        settings = self.raw_config
        if name == "AutoTokenizer":
            with reading(self.name):
                settings = get_tokenizer_config(self.name, revision=self.revision)
        reference = settings.get("auto_map", {}).get(name) or ""
        if isinstance(reference, list):  # a tokenizer's, then its fast one's
            reference = reference[0]
        if not reference or "--" in reference:
            raise ArgumentError(
                f"vlm.model: the code of {self.name!r} has to lie in its own repository, but {name} in its auto_map "
                f"is {reference!r}; name a {self.family}"
            )
        with reading(self.name):
            try:
                with standing_in(self.absent, self.stand_in):
                    return get_class_from_dynamic_module(reference, self.name, revision=self.revision)
            except ImportError as error:
                raise ArgumentError(
                    f"vlm.model: the code of {self.name!r} can't be imported ({str(error).splitlines()[0]}); "
                    f"{self.family}'s needs pip install 'safervlm[remote]'"
                ) from error

    @cached_property
    @abstractmethod
    def collator(self) -> RemoteCollator:
        """Made after one question that the model's own code lays out, and compared with it."""

    @property
    def image_token_ids(self) -> set[int]:
        """What stands in the image's places."""
        return {self.collator.image_token_id}

    @abstractmethod
    def adapt(self, remote: Any) -> Any:
        """The remote model class as today's transformers and any device can run it."""

    def load_base(self) -> PreTrainedModel:
        """Reads the base weights: from safetensors, else with ``weights_only``."""
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
        """What of the model goes through the pixels of an image: the code has its own name for it."""
