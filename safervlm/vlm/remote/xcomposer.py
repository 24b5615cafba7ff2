"""InternLM-XComposer2-VL (arXiv:2401.16420), whose code comes with its weights: ``internlm/internlm-xcomposer2-vl-7b``.

That code was written for transformers 4 on a GPU; :mod:`safervlm.vlm.remote.base` describes how it is run. The linear
layers contain a built-in low-rank branch that is applied only to image tokens (``Plora_A``, ``Plora_B``). It belongs to
the base model and is not trained. LoRA is added parallel to it, for text and image tokens alike, as in the authors' own
fine-tuning.

Shapes: B rows, L tokens, A attention heads, D units of a head, P tokens of an image, S side of the image in pixels.
"""

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import ImageSettings
from safervlm.records import Example, Question
from safervlm.vlm.base import Generation
from safervlm.vlm.compat import CACHE, local_torch_dtype
from safervlm.vlm.encoding import EncodedBatch
from safervlm.vlm.layers import switch_off_dropout
from safervlm.vlm.lora import LoRA
from safervlm.vlm.prefix import Encoding
from safervlm.vlm.remote.base import LegacyTupleCacheMixin, Remote, RemoteCollator, rotate

IMAGE, END = "<ImageHere>", "[UNUSED_TOKEN_145]"
SYSTEM = "[UNUSED_TOKEN_146]system\n{system}[UNUSED_TOKEN_145]\n"
TEMPLATE = "[UNUSED_TOKEN_146]user\n<ImageHere>{question}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
# Markers of turns and similar tokens; the tokenizer lists none of them as special.
MARKS = re.compile(r"<ImageHere>|\[UNUSED_TOKEN_\d+\]")
LANGUAGE_LAYERS = r".*\blayers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.w[123])"
# Parameters of interleav_wrap_chat. Later models of the authors have others, or no fixed image size.
WRAP = ["self", "tokenizer", "query", "image", "history", "meta_instruction"]
# openai/clip-vit-large-patch14-336, except for the image size; the checkpoint contains its position embeddings.
CLIP: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}


class Tower(nn.Module):
    """CLIP's vision tower with the weight names of the checkpoint, which are one level deeper than the library's.

    Args:
        image_size: S, side of the image in pixels.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(CLIPVisionConfig(image_size=image_size, **CLIP))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.vision_model.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_model.device

    def forward(self, images: Tensor, output_hidden_states: bool) -> Any:
        """Encodes images.

        Args:
            images: (B, 3, S, S) pixel values.
            output_hidden_states: Whether the output includes the hidden states of all layers.

        Returns:
            The output of the library's ``CLIPVisionModel``.
        """
        return self.vision_model(images, output_hidden_states=output_hidden_states)


def rotate_rows(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Applies rotary positions, counted per row; the remote function counts columns, including padding.

    Args:
        query: (B, A, L, D) queries.
        key: Keys, of the same shape with fewer heads.
        cos: (positions, D) cosines of each position; the two halves of D are equal.
        sin: (positions, D) sines of each position, likewise.
        position_ids: (B, L) or (1, L) positions.

    Returns:
        The rotated queries and keys.
    """
    cos, sin = (table[position_ids, : table.shape[-1] // 2] for table in (cos, sin))
    return rotate(query, cos, sin), rotate(key, cos, sin)


class XComposer2Collator(RemoteCollator):
    """Makes an ``EncodedBatch`` of examples in the format of the model's own ``chat``; the image comes first."""

    def __call__(self, examples: Sequence[Example]) -> EncodedBatch:
        """Decodes the images and encodes prompts and completions.

        Raises:
            RecordError: A text contains a marker token, or any reason of
                :class:`safervlm.vlm.encoding.ProcessorCollator`.
        """
        for example in examples:
            for text in (example.question.prompt, *example.completions):
                if found := MARKS.search(text):
                    raise RecordError(
                        f"{example.question.id}: its text contains the special token {found[0]!r}; leave it out"
                    )
        return super().__call__(examples)

    def encode(self, question: Question) -> Encoding:
        """Encodes one question: system prompt, image placeholders, text.

        Args:
            question: The question, with the path of its image.

        Returns:
            Token ids, ``im_mask`` (True at image tokens) and attention mask, (1, L) each, and images (1, 3, S, S).

        Raises:
            RecordError: The image can't be decoded.
        """
        prompt = SYSTEM.format(system=self.system) if self.system else ""
        prompt += self.template.format(question=question.prompt)
        before, behind = (self.tokenizer(part).input_ids for part in prompt.split(IMAGE))
        tokens = torch.tensor([[*before, *[self.image_token_id] * self.image_tokens, *behind]])
        im_mask = torch.zeros_like(tokens, dtype=torch.bool)
        im_mask[:, len(before) : len(before) + self.image_tokens] = True
        return {
            "input_ids": tokens,
            "im_mask": im_mask,
            "attention_mask": torch.ones_like(tokens),
            "images": self.pixels(question)[None],
        }


class XComposer2(Remote):
    """InternLM-XComposer2-VL, run by the code in its own repository, which requires consent (``trust_remote_code``).

    Args:
        model: Name on the Hugging Face Hub, or folder, of the model, its code and its tokenizer.
        revision: Full commit (40 hexadecimal digits) of a model on the Hub, so that the code that was reviewed is the
            code that runs.
        trust_remote_code: Run the Python code that comes with the model, with all rights of the user.
        adapter: PEFT folder of the adapter to measure, for example ``runs/ppo/adapter``. None for the base model.
        lora: Settings of the LoRA adapters that training creates; by default on the language model's linear layers.
        dtype: Data type of the base weights. Adapter weights stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass. Takes less memory and about a third more
            time.
        system: System prompt of the conversation. None for the default of the model's own ``chat``, empty for no
            prompt.
        images: How images are decoded, and the size limits above which they are rejected.
    """

    family = "InternLM-XComposer2-VL"
    absent = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")

    def __init__(
        self,
        model: str = "internlm/internlm-xcomposer2-vl-7b",
        revision: str | None = None,
        trust_remote_code: bool = False,
        adapter: str | None = None,
        lora: LoRA = LoRA(target_modules=LANGUAGE_LAYERS),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
        system: str | None = None,
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    ) -> None:
        weights = (model, revision, trust_remote_code, adapter, lora, dtype, gradient_checkpointing)
        super().__init__(*weights, TEMPLATE, system or "", images)
        self.own_words = system is None

    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response; the default system prompt is part of the code."""
        return super().describe() | {"system": None if self.own_words else self.system}

    def remote_class(self, name: str) -> Any:
        """Imports a class of the model's repository, and checks that the model class is of the supported version.

        Args:
            name: Key in the ``auto_map`` of the model's configuration, or ``AutoTokenizer`` for the tokenizer's.

        Raises:
            ArgumentError: The class can't be imported, or the model encodes prompts differently.
        """
        remote = super().remote_class(name)
        if name == "AutoModelForCausalLM":
            wrap = getattr(remote, "interleav_wrap_chat", None)
            known = wrap is not None and list(inspect.signature(wrap).parameters) == WRAP
            if not known or "img_size" not in self.raw_config:
                raise self.another()
        return remote

    def another(self) -> ArgumentError:
        """Returns the error to raise for a model that encodes prompts differently from the supported version."""
        return ArgumentError(f"vlm.model: {self.name!r} formats questions differently from {self.family}; name one")

    @cached_property
    def config(self) -> Any:
        """The model's configuration with all dropout set to 0, restored to the values that the remote code expects."""
        config = self.remote_class("AutoConfig").from_pretrained(self.name, revision=self.revision)
        switch_off_dropout(config)
        config.rope_parameters = self.raw_config["rope_scaling"]  # None stays None; the library would fill it
        config.max_length = self.raw_config["max_length"]
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, by the code in its repository."""
        return self.remote_class("AutoTokenizer").from_pretrained(self.name, revision=self.revision)

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """The end of a turn, which the model was trained to generate, and the tokenizer's end token.

        Raises:
            ArgumentError: The tokenizer does not have the end of a turn.
        """
        end = self.tokenizer.convert_tokens_to_ids(END)
        if end == self.tokenizer.unk_token_id:
            raise ArgumentError(f"vlm.model: the tokenizer of {self.name!r} has no {END}; name a {self.family}")
        return [end, self.tokenizer.eos_token_id]

    @cached_property
    def collator(self) -> XComposer2Collator:
        """The collator, checked against one prompt that the model's own code encodes.

        Raises:
            ArgumentError: The model's own code encodes the prompt differently.
        """
        remote = self.remote_class("AutoModelForCausalLM")
        system = self.system
        if self.own_words:
            system = inspect.signature(remote.chat).parameters["meta_instruction"].default
        collator = XComposer2Collator(
            self.tokenizer,
            TEMPLATE,
            system,
            self.eos_token_ids,
            self.raw_config["max_length"],
            0,
            self.raw_config["img_size"],
            (self.raw_config["img_size"] // CLIP["patch_size"]) ** 2,
            self.tokenizer.unk_token_id,
            images=self.images,
        )
        ours = collator.encode(Question("", "", "", None, "alignment", 0, "Safe?", "", "", ""))
        shown = torch.full((1, collator.image_tokens, 1), float(collator.image_token_id))
        stand_in = SimpleNamespace(
            device="cpu",
            max_length=collator.max_length,
            model=SimpleNamespace(tok_embeddings=lambda tokens: tokens[..., None].float()),
        )
        own, im_mask = remote.interleav_wrap_chat(stand_in, self.tokenizer, f"{IMAGE}Safe?", shown, [], system)
        same = own["inputs_embeds"][..., 0].tolist() == ours["input_ids"].tolist()
        if not same or im_mask.tolist() != ours["im_mask"].tolist():
            raise self.another()
        return collator

    @cached_property
    def suppressed(self) -> Tensor:
        """Tokens that a response never contains, including the markers of turns."""
        marks = {number for token, number in self.tokenizer.get_vocab().items() if MARKS.fullmatch(token)}
        return torch.tensor(sorted({*super().suppressed.tolist(), *marks} - set(self.eos_token_ids)))

    def generation(self, tokens: list[int]) -> Generation:
        """Decodes generated tokens, truncated after the first end token, whose text the tokenizer doesn't skip.

        Args:
            tokens: Generated token ids; anything may follow an end token.
        """
        answer = super().generation(tokens)
        return replace(answer, text=answer.text.removesuffix(END).strip())

    def adapt(self, remote: Any) -> Any:
        """Returns the remote model class, adapted to current transformers and to any device.

        Args:
            remote: The model class of the repository.
        """
        module: Any = sys.modules[remote.__module__]
        sys.modules[module.InternLM2Model.__module__].apply_rotary_pos_emb = rotate_rows  # type: ignore[attr-defined]
        image_size = self.raw_config["img_size"]

        def load_model(tower: Any) -> None:
            """Replaces the remote method, which downloads CLIP.

            The checkpoint contains the tower's weights, for another image size.
            """
            tower.vision_tower = Tower(image_size).requires_grad_(False)
            tower.is_loaded = True

        sys.modules[module.build_vision_tower.__module__].CLIPVisionTower.load_model = load_model

        class Adapted(
            LegacyTupleCacheMixin, remote, GenerationMixin
        ):  # PreTrainedModel no longer inherits from GenerationMixin
            def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
                PreTrainedModel._set_gradient_checkpointing(self, *args, **kwargs)
                # The remote checkpointing would wrap this one, and lose gradients because the embeddings are frozen.
                self.get_decoder().gradient_checkpointing = False

            def forward(
                self,
                input_ids: Tensor,
                images: Tensor | None = None,
                im_mask: Tensor | None = None,
                attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None,
                past_key_values: Any = None,
                use_cache: bool | None = None,
                return_dict: bool = True,
            ) -> Any:
                given: dict[str, Any] = {"input_ids": input_ids}
                if images is not None:
                    words = self.get_input_embeddings()(input_ids)
                    seen = self.img2emb(images)[0].flatten(0, 1)
                    given = {"inputs_embeds": words.index_put((im_mask,), seen.to(words.dtype)), "im_mask": im_mask}
                return super().forward(
                    **given,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    return_dict=return_dict,
                )

            def prepare_inputs_for_generation(
                self, input_ids: Tensor, images: Tensor | None = None, **kwargs: Any
            ) -> dict[str, Any]:
                inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
                return inputs | {"images": images if kwargs.get(CACHE) is None else None}

            def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                grown = super()._update_model_kwargs_for_generation(*args, **kwargs)
                im_mask = grown["im_mask"]
                return grown | {"im_mask": torch.cat([im_mask, torch.zeros_like(im_mask[:, :1])], 1)}

        Adapted.__name__ = remote.__name__
        return Adapted

    def image_encoder(self, model: PreTrainedModel) -> nn.Module:
        """Returns the submodule that encodes the pixels of an image.

        Args:
            model: The loaded model.
        """
        return model.get_submodule("vit")

    def load_base(self) -> PreTrainedModel:
        """Loads the base weights, and computes the rotary tables, which are not among them."""
        model = super().load_base()
        del model.config.max_length  # a generation setting to the library, which would not save the configuration
        for module in model.modules():
            if hasattr(module, "_init_rope"):  # the library leaves the rotary tables uninitialised
                with local_torch_dtype(self.dtype):  # the data type used by the constructor
                    module._init_rope()
            elif isinstance(module, nn.Dropout):  # of Plora: the reference must be deterministic
                module.p = 0.0
        return model
