"""CogVLM (arXiv:2311.03079), whose code comes with its weights: ``THUDM/cogvlm-chat-hf``.

That code was written for transformers 4 on a GPU. It is run as it is, and what has changed since is put right around it
(:func:`adapt`): nothing of it is copied, and no file of it is changed.

Shapes: B rows, L tokens, A attention heads, D units of a head.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import local_torch_dtype

from safervlm.images import BLANK, open_image
from safervlm.records import Question, fingerprint
from safervlm.vlm.local import reading
from safervlm.vlm.lora import LoRA
from safervlm.vlm.transformers import Encoding, ProcessorCollator, Transformers, switch_off_dropout

TEMPLATES = {"chat": "Question: {question} Answer:", "vqa": "Question: {question} Short answer:"}
# Every linear layer that words go through; the experts beside them, for the image's places, stay as they are.
LANGUAGE_EXPERTS = (
    r".*\blayers\.\d+\.(self_attn\.language_expert_(query_key_value|dense)|mlp\.language_mlp\.(gate|up|down)_proj)"
)


class Absent(ModuleType):
    """Stands for the packages that the remote code imports; whatever it takes from them is this again."""

    def __getattr__(self, name: str) -> Self:
        """Anything but what the import machinery looks for."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Self:
        """A decorator or a constructor."""
        return self

    @staticmethod
    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Xformers' only function that is used, in the vision tower: (B, L, A, D) each -> (B, L, A, D)."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).contiguous()


@contextmanager
def absent_packages() -> Iterator[None]:
    """Within it, what the remote code needs by name only can be imported, installed or not."""
    names = ("xformers", "xformers.ops", "triton", "triton.language", "torchvision")
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names, Absent("absent")))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False) -> Tensor:
    """Rotary positions (arXiv:2104.09864), in torch for the Triton kernel.

    Args:
        states: (B, A, L, D) queries or keys.
        cos: (B, L, D / 2) of each place.
        sin: the same.
        interleaved: whether pairs stand side by side, which the model doesn't use.
        inplace: may overwrite ``states``, which this doesn't.
    """
    if interleaved:
        raise NotImplementedError("interleaved rotary positions")
    cos, sin = cos[:, None], sin[:, None]
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def adapt(remote: Any) -> Any:
    """The remote model class as today's transformers and any device can run it."""
    module: Any = sys.modules[remote.__module__]
    if hasattr(module, "FastRotaryEmbedding"):
        sys.modules[module.FastRotaryEmbedding.__module__].apply_rotary_emb_func = rotate  # type: ignore[attr-defined]
    if hasattr(module, "checkpoint"):
        # CogVLM2 always recomputes its layers, with whatever adapter is at work at backward time: wrong gradients.
        module.checkpoint = lambda function, *args, **_: function(*args)

    class Adapted(remote, GenerationMixin):  # models no longer generate unless they say so
        supports_gradient_checkpointing = True
        _keys_to_ignore_on_load_missing = (r"\.inv_freq$",)

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            return False  # its layers read and write tuples

        def _prepare_position_ids_for_generation(self, *args: Any) -> None:
            """The library would count the image's tokens, all of which have one position; the model counts itself."""

        def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            # The remote one calls what is no longer there; this one also repeats the last token's type, a word's.
            return GenerationMixin._update_model_kwargs_for_generation(self, *args, **kwargs)

        def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
            inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
            mask = kwargs.get("attention_mask")
            if mask is not None:
                # Behind padding the model counts from 1, else from 0: a row would depend on its neighbours.
                inputs["position_ids"] = (inputs["position_ids"] - (mask[:, :1] == 0).long()).clamp(min=0)
            return inputs

    Adapted.__name__ = remote.__name__
    return Adapted


@dataclass
class CogVLMCollator(ProcessorCollator):
    """Examples -> ``EncodedBatch`` as the model's own ``build_conversation_input_ids`` lays them out.

    Attributes:
        processor: the tokenizer; the model has no more of one.
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

    def encode(self, question: Question) -> Encoding:
        """Beginning, image (blank for none), question; images is (1, 1, 3, image_size, image_size)."""
        image = BLANK if question.image_path is None else open_image(question.image_path, question.id)
        pixels = np.asarray(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC), np.float32)
        pixels = (pixels / 255 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
        text = self.tokenizer.encode(self.template.format(question=question.prompt), add_special_tokens=False)
        tokens = [self.tokenizer.bos_token_id, *[self.image_token_id] * self.image_tokens, *text]
        types = [0, *[1] * self.image_tokens, *[0] * len(text)]
        return {
            "input_ids": torch.tensor([tokens]),
            "token_type_ids": torch.tensor([types]),
            "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
            "images": torch.from_numpy(pixels).float().permute(2, 0, 1)[None, None],
        }

    def completion_ids(self, prompt: Encoding, answer: str) -> list[int]:
        """The tokens of an answer, which the model tokenises apart, and the end token."""
        return [*self.tokenizer.encode(answer, add_special_tokens=False), self.eos_token_ids[0]]


class CogVLM(Transformers):
    """CogVLM, by the code in its own repository, which runs only when you say so.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model and its code.
        revision: the full commit (40 hexadecimal digits) of a model on the Hub: the code that was looked at is the code
            that runs.
        trust_remote_code: run the Python code that comes with the model, with all of your rights.
        tokenizer: name on the Hugging Face Hub, or folder, of the tokenizer, which the model comes without.
        adapter: PEFT folder of the adapter to measure with, for example ``runs/ppo/adapter``; none for the base model.
        lora: the adapter that training makes, by default on the layers that words go through.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        template: the published text around a question: ``chat``, or ``vqa`` for short answers.
    """

    def __init__(
        self,
        model: str = "THUDM/cogvlm-chat-hf",
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: str = "lmsys/vicuna-7b-v1.5",
        adapter: str | None = None,
        lora: LoRA = LoRA(target_modules=LANGUAGE_EXPERTS),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
        template: Literal["chat", "vqa"] = "chat",
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing, template=TEMPLATES[template])
        if not trust_remote_code:
            raise ValueError(
                f"vlm.trust_remote_code: {model!r} runs Python code of its own on this machine; read that code, then "
                "set it to true, or measure another model"
            )
        if not Path(model).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            raise ValueError(
                f"vlm.revision: code from the Hub is run at a fixed commit only, got {revision!r}; pin it: give the "
                f"full 40 digits of a commit that you have read (https://huggingface.co/{model}/commits/main)"
            )
        self.tokenizer_name, self.layout = tokenizer, template

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer; on the Hub the code is the revision's."""
        folder = Path(self.name)
        code = fingerprint(*sorted(folder.glob("*.py"))) if folder.is_dir() else self.revision
        return super().describe() | {"code": code, "tokenizer": self.tokenizer_name}

    def remote_class(self, name: str) -> Any:
        """Runs the file of a class that the repository names, and gives the class."""
        with reading(self.name):
            settings, _ = PreTrainedConfig.get_config_dict(self.name, revision=self.revision)
        reference = settings.get("auto_map", {}).get(name, "")
        if not reference or "--" in reference:
            raise ValueError(
                f"vlm.model: the code of {self.name!r} has to lie in its own repository, but {name} in the auto_map of "
                f"its config.json is {reference!r}; name a CogVLM"
            )
        try:
            with reading(self.name), absent_packages():
                return get_class_from_dynamic_module(reference, self.name, revision=self.revision)
        except ImportError as error:
            raise ValueError(
                f"vlm.model: the code of {self.name!r} can't be imported ({str(error).splitlines()[0]}); CogVLM's "
                "needs pip install 'safervlm[cogvlm]'"
            ) from error

    @cached_property
    def config(self) -> Any:
        """The model's configuration, without dropout: LoRA has its own, and the reference has to be one model."""
        config = self.remote_class("AutoConfig").from_pretrained(self.name, revision=self.revision)
        switch_off_dropout(config)
        config.vision_config = {**config.vision_config, "dropout_prob": 0.0}
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that the model was trained with."""
        with reading(self.tokenizer_name):
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token  # stands in the image's places, and is overwritten
        return tokenizer

    @cached_property
    def collator(self) -> CogVLMCollator:
        """Made after one question that the model's own code lays out, and compared with it."""
        own = self.remote_class("AutoModelForCausalLM").build_conversation_input_ids(
            SimpleNamespace(config=self.config),
            self.tokenizer,
            query="Safe?",
            images=[BLANK],
            template_version=self.layout,
        )
        collator = CogVLMCollator(
            self.tokenizer,
            TEMPLATES[self.layout],
            self.system,
            self.eos_token_ids,
            self.config.max_position_embeddings,
            self.config.vision_config["image_size"],
            int(own["token_type_ids"].sum()),
            int(own["input_ids"][1]),
        )
        ours = collator.encode(Question("", "", "", None, "alignment", 0, "Safe?", "", "", ""))
        if any(own[name].tolist() != ours[name][0].tolist() for name in ("input_ids", "token_type_ids")):
            raise ValueError(f"vlm.model: {self.name!r} lays its questions out otherwise than CogVLM; name a CogVLM")
        return collator

    @property
    def image_token_ids(self) -> set[int]:
        """What stands in the image's places."""
        return {self.collator.image_token_id}

    def load_base(self) -> PreTrainedModel:
        """Reads the base weights, from safetensors only."""
        adapted = adapt(self.remote_class("AutoModelForCausalLM"))
        with reading(self.name):
            model, found = adapted.from_pretrained(
                self.name,
                revision=self.revision,
                config=self.config,
                dtype=self.dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
        missing = found["missing_keys"]
        if missing:
            raise ValueError(f"vlm.model: {self.name!r} lacks {len(missing)} weights, for example {min(missing)}")
        for module in model.modules():
            if hasattr(module, "_compute_inv_freq"):  # the library leaves the frequencies uninitialised
                with local_torch_dtype(self.dtype):  # in which the constructor computes them
                    module.inv_freq = module._compute_inv_freq(module.inv_freq.device)
        for layer in model.get_decoder().layers:
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (GradientCheckpointingLayer, kind), {})
        model.generation_config = GenerationConfig()  # the settings of ``sampling`` are the only ones
        return model
