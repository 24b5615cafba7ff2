"""LLaVA-1.5 (arXiv:2310.03744) in the Hugging Face format, for example ``llava-hf/llava-1.5-7b-hf``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import BLANK, ImageSettings, open_image
from safervlm.protocol import VICUNA_SYSTEM
from safervlm.records import Example
from safervlm.vlm.base import tokenizable_example
from safervlm.vlm.lora import LoRA
from safervlm.vlm.packed import PackedBatch, PackedVLM, pack
from safervlm.vlm.weights import load_model, reading

ROWS_AT_ONCE = 64  # of an image that is padded and resized


def shrunk_square(
    image: Image.Image, side: int, colour: tuple[int, ...], resample: Image.Resampling | int
) -> Image.Image:
    """An image padded to a square of its longer side and resized; the square itself is never made.

    Pillow resizes rows, then columns, and rounds to 8 bits in between. So rows can be padded and resized a few at a
    time, and columns be padded after that: the result is the same bit for bit, in memory for the image alone.

    Args:
        image: in RGB.
        side: of the result, in pixels.
        colour: of the padding.
        resample: the filter.
    """
    width, height = image.size
    long = max(width, height)
    resized_rows = Image.new("RGB", (side, long), colour)
    left, top = (long - width) // 2, (long - height) // 2
    for row in range(0, height, ROWS_AT_ONCE):
        rows = image.crop((0, row, width, min(row + ROWS_AT_ONCE, height)))
        strip = Image.new("RGB", (long, rows.height), colour)
        strip.paste(rows, (left, 0))
        resized_rows.paste(strip.resize((side, rows.height), resample), (0, top + row))
    return resized_rows.resize((side, side), resample)


@dataclass
class LlavaCollator:
    """Examples -> :class:`PackedBatch` in LLaVA's conversation; picklable, without weights.

    Attributes:
        tokenizer: the model's.
        image_processor: the model's, on PIL images.
        image_tokens: the number of placeholders of an image.
        image_token_id: the placeholder.
        system: the conversation's system prompt; empty for none.
        max_length: a longer prompt with its completion is refused, never cut.
        images: how images are decoded.
        words: tokens that the model has embeddings for; a tokenizer may have more.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: LlavaImageProcessorPil
    image_tokens: int
    image_token_id: int
    system: str
    max_length: int
    images: ImageSettings = field(default=ImageSettings())
    words: int = 2**31

    def __call__(self, examples: Sequence[Example]) -> PackedBatch:
        """Reads the images, once each, and tokenises prompts and completions."""
        rows: dict[str | None, int] = {}
        pixels: list[Tensor] = []
        for question in (example.question for example in examples):
            path = question.image_path
            if path not in rows:
                rows[path] = len(pixels)
                pixels.append(self.pixels(BLANK if path is None else open_image(path, question.id, self.images)))
        written = [tokenizable_example(example, self.max_length) for example in examples]
        prompts = [self.prompt_ids(example.question.prompt) for example in written]
        completions = [[self.completion_ids(text) for text in example.completions] for example in written]
        for example, prompt, answers in zip(examples, prompts, completions, strict=True):
            if prompt.count(self.image_token_id) != self.image_tokens or any(self.image_token_id in a for a in answers):
                raise RecordError(f"{example.question.id}: its text contains the image placeholder; leave it out")
            if (highest := max(max(tokens) for tokens in (prompt, *answers))) >= self.words:
                raise RecordError(
                    f"{example.question.id}: its text has the token {highest}, the model has {self.words}; reword it"
                )
            length = len(prompt) + max(map(len, answers), default=0)
            if length > self.max_length:
                raise RecordError(
                    f"{example.question.id}: {length} tokens, the model takes {self.max_length}; shorten the question"
                )
        return PackedBatch(
            questions=[example.question for example in examples],
            prompt_ids=prompts,
            pixel_values=torch.cat(pixels),
            image_rows=torch.tensor([rows[example.question.image_path] for example in examples]),
            packed=pack(prompts, completions) if all(completions) else None,
        )

    def pixels(self, image: Image.Image) -> Tensor:
        """(1, 3, height, width) what the image processor makes of an image.

        It would pad to a square of the longer side before it shrinks that; this gives the same bits in less memory.
        """
        size = self.image_processor.size
        if self.image_processor.do_pad and self.image_processor.do_resize and size.shortest_edge:
            # The processor's padding, its own way to round included.
            colour = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
            image = shrunk_square(image, size.shortest_edge, colour, self.image_processor.resample)
        return self.image_processor([image], return_tensors="pt")["pixel_values"]

    def prompt_ids(self, prompt: str) -> list[int]:
        """The conversation up to the answer; the texts on both sides of the image are tokenised apart, as published."""
        before = self.tokenizer(f"{self.system} USER: ".lstrip()).input_ids
        behind = self.tokenizer(f"\n{prompt} ASSISTANT:").input_ids
        if behind[0] == self.tokenizer.bos_token_id:
            behind = behind[1:]
        return [*before, *[self.image_token_id] * self.image_tokens, *behind]

    def completion_ids(self, text: str) -> list[int]:
        """The tokens that follow ``ASSISTANT:`` when the answer is ``text``, the end token included."""
        stem = self.tokenizer("ASSISTANT:").input_ids
        whole = self.tokenizer(f"ASSISTANT: {text}").input_ids
        if whole[: len(stem)] != stem:
            raise ArgumentError(
                f"the tokenizer merges 'ASSISTANT:' with the answer {text[:40]!r}; its family needs its own collator"
            )
        return [*whole[len(stem) :], self.tokenizer.eos_token_id]


class Llava(PackedVLM):
    """LLaVA-1.5 in the Hugging Face format.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model and its processor.
        revision: branch, tag or commit of a model on the Hub; a commit makes a run repeatable.
        adapter: PEFT folder of the adapter to measure with, for example ``runs/ppo/adapter``; none for the base model.
        lora: the adapter that training makes.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        image_fit: how an image becomes a square: ``pad`` with the mean colour (the published training and evaluation of
            trained models), or ``crop`` its centre (the published measurement).
        system: the conversation's system prompt; empty for none.
        images: how images are decoded, and which are too large.
    """

    def __init__(
        self,
        model: str = "llava-hf/llava-1.5-7b-hf",
        revision: str | None = None,
        adapter: str | None = None,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
        image_fit: Literal["pad", "crop"] = "pad",
        system: str = VICUNA_SYSTEM,
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing)
        self.image_fit, self.system, self.images = image_fit, system, images

    @cached_property
    def collator(self) -> LlavaCollator:
        """Reads the tokenizer and the image processor when it is first asked for."""
        with reading(self.name):
            config = AutoConfig.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
            if not isinstance(config, LlavaConfig):
                raise ArgumentError(
                    f"vlm.model: {self.name!r} is a {config.model_type}, not a llava; name a LLaVA-1.5, or have it "
                    "asked by --model.vlm safervlm.vlm.auto.Transformers"
                )
            tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
            image_processor = LlavaImageProcessorPil.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=False, do_pad=self.image_fit == "pad"
            )
        return LlavaCollator(
            tokenizer=tokenizer,
            image_processor=image_processor,
            image_tokens=config.image_seq_length,
            image_token_id=config.image_token_id,
            system=self.system,
            max_length=config.text_config.max_position_embeddings,
            images=self.images,
            words=config.text_config.vocab_size,
        )

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer."""
        return super().describe() | {"image_fit": self.image_fit, "system": self.system} | self.images.describe()

    def load_base(self) -> PreTrainedModel:
        """Reads the base weights, from safetensors only."""
        return load_model(
            LlavaForConditionalGeneration,
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            use_safetensors=True,
            # The mask of shared prompts is boolean; eager attention would add it to the scores.
            attn_implementation="sdpa",
        )

    def language_model(self) -> PreTrainedModel:
        """The Llama inside."""
        return self.base.model.language_model

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, height, width) -> (I, image tokens, H)."""
        features = self.base.get_image_features(pixel_values.to(self.base.dtype), return_dict=True).pooler_output
        return torch.stack(list(features))

    @property
    def image_token_id(self) -> int:
        """``<image>``."""
        return self.collator.image_token_id

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.collator.tokenizer

    @property
    def eos_token_ids(self) -> list[int]:
        """``</s>``."""
        if self.tokenizer.eos_token_id is None:
            raise ArgumentError(
                f"vlm.model: the tokenizer of {self.name!r} names no token that ends an answer (eos_token)"
            )
        return [self.tokenizer.eos_token_id]
