"""CogVLM (arXiv:2311.03079), whose code comes with its weights: ``THUDM/cogvlm-chat-hf``.

That code was written for transformers 4 on a GPU; :mod:`safervlm.vlm.remote.base` describes how it is run.

Shapes: B rows, L tokens, A attention heads, D units of a head.
"""

import sys
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from safervlm.errors import ArgumentError
from safervlm.io.images import BLANK, ImageSettings
from safervlm.records import Question
from safervlm.vlm.compat import local_torch_dtype
from safervlm.vlm.layers import switch_off_dropout
from safervlm.vlm.lora import LoRA
from safervlm.vlm.prefix import Encoding
from safervlm.vlm.processors import read_tokenizer
from safervlm.vlm.remote.base import LegacyTupleCacheMixin, MissingPackageStub, Remote, RemoteCollator, rotate

TEMPLATES = {"chat": "Question: {question} Answer:", "vqa": "Question: {question} Short answer:"}
# All linear layers for text tokens; the parallel vision experts, for image tokens, are not adapted.
LANGUAGE_EXPERTS = (
    r".*\blayers\.\d+\.(self_attn\.language_expert_(query_key_value|dense)|mlp\.language_mlp\.(gate|up|down)_proj)"
)


class Kernels(MissingPackageStub):
    """Stub that also replaces xformers."""

    @staticmethod
    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Computes attention as xformers does; the vision tower uses no other function of it.

        Args:
            query: (B, L, A, D) queries.
            key: (B, L, A, D) keys.
            value: (B, L, A, D) values.
            scale: Factor of the attention scores.

        Returns:
            (B, L, A, D) attention output.
        """
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).contiguous()


class CogVLMCollator(RemoteCollator):
    """Makes an ``EncodedBatch`` of examples, in the format of the model's own ``build_conversation_input_ids``."""

    def encode(self, question: Question) -> Encoding:
        """Encodes one question: start token, image placeholders, text.

        Args:
            question: The question, with the path of its image.

        Returns:
            Token ids, token types and attention mask, (1, L) each, and images (1, 1, 3, image_size, image_size).

        Raises:
            RecordError: The image can't be decoded.
        """
        text = self.tokenizer.encode(self.template.format(question=question.prompt), add_special_tokens=False)
        tokens = [self.tokenizer.bos_token_id, *[self.image_token_id] * self.image_tokens, *text]
        types = [0, *[1] * self.image_tokens, *[0] * len(text)]
        return {
            "input_ids": torch.tensor([tokens]),
            "token_type_ids": torch.tensor([types]),
            "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
            "images": self.pixels(question)[None, None],
        }

    def completion_ids(self, prompt: Encoding, answer: str) -> list[int]:
        """Returns the token ids of a response, which the model tokenises separately from its prompt, and the end token.

        Args:
            prompt: Encoding of the prompt; ignored.
            answer: Text of the response.
        """
        return [*self.tokenizer.encode(answer, add_special_tokens=False), self.eos_token_ids[0]]


class CogVLM(Remote):
    """CogVLM, run by the code in its own repository, which requires consent (``trust_remote_code``).

    Args:
        model: Name on the Hugging Face Hub, or folder, of the model and its code.
        revision: Full commit (40 hexadecimal digits) of a model on the Hub, so that the code that was reviewed is the
            code that runs.
        trust_remote_code: Run the Python code that comes with the model, with all rights of the user.
        tokenizer: Name on the Hugging Face Hub, or folder, of the tokenizer, which the model's repository lacks.
        adapter: PEFT folder of the adapter to measure, for example ``runs/ppo/adapter``. None for the base model.
        lora: Settings of the LoRA adapters that training creates; by default on the layers for text tokens.
        dtype: Data type of the base weights. Adapter weights stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass. Takes less memory and about a third more
            time.
        template: Published prompt format: ``chat``, or ``vqa`` for short answers.
        images: How images are decoded, and the size limits above which they are rejected.
    """

    family = "CogVLM"
    absent = ("xformers", "xformers.ops", "triton", "triton.language", "torchvision")
    stand_in = Kernels("absent")

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
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    ) -> None:
        weights = (model, revision, trust_remote_code, adapter, lora, dtype, gradient_checkpointing)
        super().__init__(*weights, TEMPLATES[template], images=images)
        self.tokenizer_name, self.layout = tokenizer, template

    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response."""
        return super().describe() | {"tokenizer": self.tokenizer_name}

    @cached_property
    def config(self) -> Any:
        """The model's configuration with all dropout set to 0.

        LoRA has its own dropout, and the reference must be deterministic.
        """
        config = self.remote_class("AutoConfig").from_pretrained(self.name, revision=self.revision)
        switch_off_dropout(config)
        config.vision_config = {**config.vision_config, "dropout_prob": 0.0}
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the model was trained with."""
        tokenizer = read_tokenizer(self.tokenizer_name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token  # placeholder of image tokens, replaced by image features
        return tokenizer

    @cached_property
    def collator(self) -> CogVLMCollator:
        """The collator, checked against one prompt that the model's own code encodes.

        Raises:
            ArgumentError: The model's own code encodes the prompt differently.
        """
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
            self.named_ends,
            self.config.max_position_embeddings,
            0,
            self.config.vision_config["image_size"],
            int(own["token_type_ids"].sum()),
            int(own["input_ids"][1]),
            images=self.images,
        )
        ours = collator.encode(Question("", "", "", None, "alignment", 0, "Safe?", "", "", ""))
        if any(own[name].tolist() != ours[name][0].tolist() for name in ("input_ids", "token_type_ids")):
            raise ArgumentError(f"vlm.model: {self.name!r} formats questions differently from CogVLM; name a CogVLM")
        return collator

    def adapt(self, remote: Any) -> Any:
        """Returns the remote model class, adapted to current transformers and to any device.

        Args:
            remote: The model class of the repository.
        """
        module: Any = sys.modules[remote.__module__]
        if hasattr(module, "FastRotaryEmbedding"):
            sys.modules[module.FastRotaryEmbedding.__module__].apply_rotary_emb_func = rotate  # type: ignore[attr-defined]
        if hasattr(module, "checkpoint"):
            # CogVLM2 always recomputes its layers, with the adapter active during the backward pass: wrong gradients.
            module.checkpoint = lambda function, *args, **_: function(*args)

        class Adapted(
            LegacyTupleCacheMixin, remote, GenerationMixin
        ):  # PreTrainedModel no longer inherits from GenerationMixin
            _keys_to_ignore_on_load_missing = (r"\.inv_freq$",)

            def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
                inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
                mask = kwargs.get("attention_mask")
                if mask is not None:
                    # After padding the model counts from 1, otherwise from 0: a row would depend on its neighbours.
                    inputs["position_ids"] = (inputs["position_ids"] - (mask[:, :1] == 0).long()).clamp(min=0)
                return inputs

        Adapted.__name__ = remote.__name__
        return Adapted

    def image_encoder(self, model: PreTrainedModel) -> nn.Module:
        """Returns the submodule that encodes the pixels of an image, including the projection.

        Args:
            model: The loaded model.
        """
        return model.get_submodule("model.vision")

    def load_base(self) -> PreTrainedModel:
        """Loads the base weights, and computes the rotary frequencies, which are not among them."""
        model = super().load_base()
        for module in model.modules():
            if hasattr(module, "_compute_inv_freq"):  # the library leaves the frequencies uninitialised
                with local_torch_dtype(self.dtype):  # the data type used by the constructor
                    module.inv_freq = module._compute_inv_freq(module.inv_freq.device)
        return model
