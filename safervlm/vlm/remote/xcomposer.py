"""InternLM-XComposer2-VL (arXiv:2401.16420), whose code comes with its weights: ``internlm/internlm-xcomposer2-vl-7b``.

That code was written for transformers 4 on a GPU; :mod:`safervlm.vlm.remote.base` says how it is run. Its linear layers
have a low-rank part of their own, which the image's places alone go through (``Plora_A``, ``Plora_B``); it is part of
the base model and stays as it is. LoRA goes beside it, for words and image alike, as in the authors' own fine-tuning.

Shapes: B rows, L tokens, A attention heads, D units of a head, P places of an image, S pixels of its side.
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
from safervlm.vlm.auto import Encoding, switch_off_dropout
from safervlm.vlm.base import Generation
from safervlm.vlm.compat import CACHE, local_torch_dtype
from safervlm.vlm.encoding import EncodedBatch
from safervlm.vlm.lora import LoRA
from safervlm.vlm.remote.base import Remote, RemoteCollator, Tuples, rotate

IMAGE, END = "<ImageHere>", "[UNUSED_TOKEN_145]"
SYSTEM = "[UNUSED_TOKEN_146]system\n{system}[UNUSED_TOKEN_145]\n"
TEMPLATE = "[UNUSED_TOKEN_146]user\n<ImageHere>{question}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
# What the model marks turns with, and their like: words to the tokenizer, which lists none of them as special.
MARKS = re.compile(r"<ImageHere>|\[UNUSED_TOKEN_\d+\]")
LANGUAGE_LAYERS = r".*\blayers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.w[123])"
# The parameters of interleav_wrap_chat; later models of the authors have others, or no one size of an image.
WRAP = ["self", "tokenizer", "query", "image", "history", "meta_instruction"]
# openai/clip-vit-large-patch14-336 but for the size of the image, whose positions the checkpoint brings.
CLIP: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}


class Tower(nn.Module):
    """CLIP's vision tower with the name that its weights have in the checkpoint, a level deeper than the library's.

    Args:
        image_size: S.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(CLIPVisionConfig(image_size=image_size, **CLIP))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.vision_model.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.vision_model.device

    def forward(self, images: Tensor, output_hidden_states: bool) -> Any:
        """(B, 3, S, S) -> the library's output, with the hidden states of all layers."""
        return self.vision_model(images, output_hidden_states=output_hidden_states)


def rotate_rows(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of each row's own count; the remote function counts columns, padding included.

    Args:
        query: (B, A, L, D).
        key: the same, of fewer heads.
        cos: of each position, its two halves alike.
        sin: the same.
        position_ids: (B, L), or (1, L).
    """
    cos, sin = (table[position_ids, : table.shape[-1] // 2] for table in (cos, sin))
    return rotate(query, cos, sin), rotate(key, cos, sin)


class XComposer2Collator(RemoteCollator):
    """Examples -> ``EncodedBatch`` as the model's own ``chat`` lays them out, the image before the question."""

    def __call__(self, examples: Sequence[Example]) -> EncodedBatch:
        """Reads the images and encodes prompts and completions."""
        for example in examples:
            for text in (example.question.prompt, *example.completions):
                if found := MARKS.search(text):
                    raise RecordError(
                        f"{example.question.id}: its text contains the special token {found[0]!r}; leave it out"
                    )
        return super().__call__(examples)

    def encode(self, question: Question) -> Encoding:
        """What the model is told first, image, question; im_mask is (1, L), True in the image's places."""
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
    """InternLM-XComposer2-VL, by the code in its own repository, which runs only when you say so.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model, its code and its tokenizer.
        revision: the full commit (40 hexadecimal digits) of a model on the Hub: the code that was looked at is the code
            that runs.
        trust_remote_code: run the Python code that comes with the model, with all of your rights.
        adapter: PEFT folder of the adapter to measure with, for example ``runs/ppo/adapter``; none for the base model.
        lora: the adapter that training makes, by default on the language model's linear layers.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        system: what the model is told first; none for the words of its own ``chat``, empty for nothing.
        images: how images are decoded, and which are too large.
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
        super().__init__(
            model,
            revision,
            trust_remote_code,
            adapter,
            lora,
            dtype,
            gradient_checkpointing,
            TEMPLATE,
            system or "",
            images,
        )
        self.own_words = system is None

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer; its own words are part of the code."""
        return super().describe() | {"system": None if self.own_words else self.system}

    def remote_class(self, name: str) -> Any:
        """Runs the file of a class that the repository names, and gives the class."""
        remote = super().remote_class(name)
        if name == "AutoModelForCausalLM":
            wrap = getattr(remote, "interleav_wrap_chat", None)
            known = wrap is not None and list(inspect.signature(wrap).parameters) == WRAP
            if not known or "img_size" not in self.raw_config:
                raise self.another()
        return remote

    def another(self) -> ArgumentError:
        """Says that the code is not the one that this file is for."""
        return ArgumentError(f"vlm.model: {self.name!r} lays its questions out otherwise than {self.family}; name one")

    @cached_property
    def config(self) -> Any:
        """The model's configuration, as its code wants it."""
        config = self.remote_class("AutoConfig").from_pretrained(self.name, revision=self.revision)
        switch_off_dropout(config)
        config.rope_parameters = self.raw_config["rope_scaling"]  # also none, which the library fills
        config.max_length = self.raw_config["max_length"]
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, by its own code."""
        return self.remote_class("AutoTokenizer").from_pretrained(self.name, revision=self.revision)

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """The end of a turn, which the model was trained to write, and the tokenizer's end."""
        end = self.tokenizer.convert_tokens_to_ids(END)
        if end == self.tokenizer.unk_token_id:
            raise ArgumentError(f"vlm.model: the tokenizer of {self.name!r} has no {END}; name a {self.family}")
        return [end, self.tokenizer.eos_token_id]

    @cached_property
    def collator(self) -> XComposer2Collator:
        """Made after one question that the model's own code lays out, and compared with it."""
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
        """Tokens that an answer never contains, the marks of turns among them."""
        marks = {number for token, number in self.tokenizer.get_vocab().items() if MARKS.fullmatch(token)}
        return torch.tensor(sorted({*super().suppressed.tolist(), *marks} - set(self.eos_token_ids)))

    def generation(self, tokens: list[int]) -> Generation:
        """Generated tokens, cut behind the first one that ends an answer, which is a word to the tokenizer."""
        answer = super().generation(tokens)
        return replace(answer, text=answer.text.removesuffix(END).strip())

    def adapt(self, remote: Any) -> Any:
        """The remote model class as today's transformers and any device can run it."""
        module: Any = sys.modules[remote.__module__]
        sys.modules[module.InternLM2Model.__module__].apply_rotary_pos_emb = rotate_rows  # type: ignore[attr-defined]
        image_size = self.raw_config["img_size"]

        def load_model(tower: Any) -> None:
            """The remote one downloads CLIP, whose weights the checkpoint has again, in another size."""
            tower.vision_tower = Tower(image_size).requires_grad_(False)
            tower.is_loaded = True

        sys.modules[module.build_vision_tower.__module__].CLIPVisionTower.load_model = load_model

        class Adapted(Tuples, remote, GenerationMixin):  # models no longer generate unless they say so
            def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
                PreTrainedModel._set_gradient_checkpointing(self, *args, **kwargs)
                # The remote one would recompute around that, in a way that loses gradients behind frozen embeddings.
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
        """What of the model goes through the pixels of an image."""
        return model.get_submodule("vit")

    def load_base(self) -> PreTrainedModel:
        """Reads the base weights, and computes what they come without."""
        model = super().load_base()
        del model.config.max_length  # the library takes it for a setting of generate, and would not save it
        for module in model.modules():
            if hasattr(module, "_init_rope"):  # the library leaves its tables uninitialised
                with local_torch_dtype(self.dtype):  # in which the constructor computes them
                    module._init_rope()
            elif isinstance(module, nn.Dropout):  # of Plora: the reference has to be one model
                module.p = 0.0
        return model
