"""LLaVA-1.5 (arXiv:2310.03744) in the Hugging Face format, for example ``llava-hf/llava-1.5-7b-hf``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import BLANK, ImageSettings, open_image
from safervlm.limits import TextLimits
from safervlm.protocol import VICUNA_SYSTEM
from safervlm.records import Example, Question
from safervlm.vlm.base import tokenizable_example
from safervlm.vlm.decoding import Decoding
from safervlm.vlm.lora import LoRA
from safervlm.vlm.packed import PackedBatch, PackedVLM
from safervlm.vlm.packing import pack_completions
from safervlm.vlm.processors import read_tokenizer
from safervlm.vlm.recent import RecentPixels
from safervlm.vlm.sizes import bounded_config
from safervlm.vlm.weights import load_model, reading

ROWS_AT_ONCE = 64  # number of pixel rows that are padded and resized together


def shrunk_square(
    image: Image.Image, side: int, colour: tuple[int, ...], resample: Image.Resampling | int
) -> Image.Image:
    """Pads an image to a square and resizes it, without allocating the padded square.

    Pillow resizes rows, then columns, and rounds to 8 bits in between. So rows can be padded and resized a few at a
    time, and columns can be padded after that. The result is bit-identical, and needs memory only for the image.

    Args:
        image: RGB image; it is padded to a square of its longer side.
        side: Side of the result, in pixels.
        colour: Padding colour.
        resample: Pillow's resampling filter.

    Returns:
        The (side, side) image.
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


def require_matching_image_tokens(config: LlavaConfig, name: str) -> None:
    """Rejects a configuration whose prompts would have another number of image tokens than the vision tower returns.

    Args:
        config: Configuration of the model.
        name: Name of the model, for the error message.

    Raises:
        ArgumentError: The numbers differ.
    """
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = patches + (config.vision_feature_select_strategy == "full")  # with the class token
    if config.image_seq_length != tokens:
        raise ArgumentError(
            f"vlm.model: the config.json of {name!r} has image_seq_length {config.image_seq_length}, its vision tower "
            f"returns {tokens} tokens per image; correct it"
        )


@dataclass
class LlavaCollator:
    """Makes a :class:`PackedBatch` of examples in LLaVA's conversation format; picklable, without weights.

    Attributes:
        tokenizer: The model's tokenizer.
        image_processor: The model's image processor, with the PIL backend.
        image_tokens: Number of placeholder tokens per image.
        image_token_id: Id of the placeholder token.
        system: System prompt of the conversation; empty for none.
        max_length: Maximum number of tokens of a prompt with its completion. Longer ones are rejected, never truncated.
        images: How images are decoded.
        words: Number of tokens for which the model has embeddings; a tokenizer may have more.
        recent: Pixel values of the images that were used last.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: LlavaImageProcessorPil
    image_tokens: int
    image_token_id: int
    system: str
    max_length: int
    images: ImageSettings = field(default=ImageSettings())
    words: int = 2**31
    recent: RecentPixels = field(default_factory=RecentPixels, compare=False, repr=False)

    def __call__(self, examples: Sequence[Example]) -> PackedBatch:
        """Decodes each distinct image once, and tokenises prompts and completions.

        Raises:
            RecordError: A text contains the image placeholder, is too long, or has a token without an embedding; or an
                image can't be decoded.
        """
        rows: dict[str | None, int] = {}
        pixels: list[Tensor] = []
        for question in (example.question for example in examples):
            path = question.image_path
            if path not in rows:
                rows[path] = len(pixels)
                pixels.append(
                    self.pixels(BLANK) if path is None else self.recent.get(path, partial(self.read, question))
                )
        encoded = [self.encoded(example) for example in examples]
        prompts, completions = [prompt for prompt, _ in encoded], [answers for _, answers in encoded]
        image_rows = [rows[example.question.image_path] for example in examples]
        return PackedBatch(
            questions=[example.question for example in examples],
            prompt_ids=prompts,
            pixel_values=torch.cat(pixels),
            image_rows=torch.tensor(image_rows),
            packed=pack_completions(image_rows, prompts, completions) if all(completions) else None,
        )

    def encoded(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """Returns the token ids of an example's prompt and of its completions.

        Args:
            example: The example; its image is not read.

        Raises:
            RecordError: A text contains the image placeholder, is too long, or has a token without an embedding.
        """
        name = example.question.id
        written = tokenizable_example(example, self.max_length)
        prompt = self.prompt_ids(written.question.prompt)
        answers = [self.completion_ids(text) for text in written.completions]
        if prompt.count(self.image_token_id) != self.image_tokens or any(self.image_token_id in a for a in answers):
            raise RecordError(f"{name}: its text contains the image placeholder; remove it")
        if (highest := max(max(tokens) for tokens in (prompt, *answers))) >= self.words:
            raise RecordError(f"{name}: its text has the token {highest}, the model has {self.words}; reword it")
        if (length := len(prompt) + max(map(len, answers), default=0)) > self.max_length:
            raise RecordError(f"{name}: {length} tokens, the model takes {self.max_length}; shorten the question")
        return prompt, answers

    def check_texts(self, example: Example) -> int:
        """Rejects an example whose texts the model can't process; see :meth:`encoded`.

        Args:
            example: The example; its image is not read.

        Returns:
            Its number of tokens, with those of its image.
        """
        prompt, answers = self.encoded(example)
        return len(prompt) + max(map(len, answers), default=0)

    def read(self, question: Question) -> Tensor:
        """Returns the pixel values of a question's image, (1, 3, height, width).

        Args:
            question: Question with the path of its image.

        Raises:
            RecordError: The image can't be decoded.
        """
        return self.pixels(open_image(str(question.image_path), question.id, self.images))

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns the pixel values that the image processor computes for an image.

        The processor would pad to a square of the longer side before it resizes; this returns the same bits with less
        memory.

        Args:
            image: RGB image.

        Returns:
            (1, 3, height, width) pixel values.
        """
        size = self.image_processor.size
        if self.image_processor.do_pad and self.image_processor.do_resize and size.shortest_edge:
            # The processor's padding colour, rounded as it rounds.
            colour = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
            image = shrunk_square(image, size.shortest_edge, colour, self.image_processor.resample)
        return self.image_processor([image], return_tensors="pt")["pixel_values"]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the token ids of the conversation up to the response.

        The texts before and after the image are tokenised separately, as in the published code.

        Args:
            prompt: Text of the question.
        """
        before = self.tokenizer(f"{self.system} USER: ".lstrip()).input_ids
        behind = self.tokenizer(f"\n{prompt} ASSISTANT:").input_ids
        if behind[0] == self.tokenizer.bos_token_id:
            behind = behind[1:]
        return [*before, *[self.image_token_id] * self.image_tokens, *behind]

    def completion_ids(self, text: str) -> list[int]:
        """Returns the token ids that follow ``ASSISTANT:``, including the end token.

        Args:
            text: Text of the response.

        Raises:
            ArgumentError: The tokenizer merges ``ASSISTANT:`` with the beginning of the response.
        """
        stem = self.tokenizer("ASSISTANT:").input_ids
        whole = self.tokenizer(f"ASSISTANT: {text}").input_ids
        if whole[: len(stem)] != stem:
            raise ArgumentError(
                f"the tokenizer merges 'ASSISTANT:' with the response {text[:40]!r}; its family needs its own collator"
            )
        return [*whole[len(stem) :], self.tokenizer.eos_token_id]


class Llava(PackedVLM):
    """LLaVA-1.5 in the Hugging Face format.

    Args:
        model: Name on the Hugging Face Hub, or folder, of the model and its processor.
        revision: Branch, tag or commit of a model on the Hub. A commit makes a run reproducible.
        adapter: PEFT folder of the adapter to measure, for example ``runs/ppo/adapter``. None for the base model.
        lora: Settings of the LoRA adapters that training creates.
        dtype: Data type of the base weights. Adapter weights stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass. Takes less memory and about a third more
            time.
        image_fit: How an image is made square. ``pad`` pads with the mean colour (the published training, and the
            published evaluation of trained models); ``crop`` crops the centre (the published measurement).
        system: System prompt of the conversation; empty for none.
        images: How images are decoded, and the size limits above which they are rejected.
        limits: Limits of texts and of the time to render or match them.
        decoding: How the steps of generation are computed.
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
        limits: TextLimits = TextLimits(),  # noqa: B008 (frozen)
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing, limits, decoding)
        self.image_fit, self.system, self.images = image_fit, system, images

    @classmethod
    def loads(cls, config: Mapping[str, Any]) -> bool:
        """Returns whether a model is a LLaVA on CLIP and Llama; others of its architecture have other prompt formats.

        Args:
            config: Content of the model's ``config.json``.
        """
        parts = [(config.get(part) or {}).get("model_type") for part in ("text_config", "vision_config")]
        named = config.get("architectures") or ()
        return "LlavaForConditionalGeneration" in named and parts == ["llama", "clip_vision_model"]

    @cached_property
    def collator(self) -> LlavaCollator:
        """The collator; the tokenizer and the image processor are loaded on first access.

        Raises:
            ArgumentError: The model is not a LLaVA, or can't be read.
        """
        with reading(self.name):
            config = bounded_config(self.name, self.revision)
            if not isinstance(config, LlavaConfig):
                raise ArgumentError(
                    f"vlm.model: {self.name!r} is a {config.model_type}, not a llava; name a LLaVA-1.5, or have it "
                    "loaded by --model.vlm safervlm.vlm.auto.Transformers"
                )
            require_matching_image_tokens(config, self.name)
            tokenizer = read_tokenizer(self.name, revision=self.revision)
            image_processor = LlavaImageProcessorPil.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=False, do_pad=self.image_fit == "pad"
            )
        return LlavaCollator(
            tokenizer=tokenizer,
            image_processor=image_processor,
            image_tokens=config.image_seq_length,
            image_token_id=config.image_token_id,
            system=self.system,
            max_length=min(config.text_config.max_position_embeddings, self.limits.max_tokens),
            images=self.images,
            words=config.text_config.vocab_size,
        )

    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response."""
        return super().describe() | {"image_fit": self.image_fit, "system": self.system} | self.images.describe()

    def load_base(self) -> PreTrainedModel:
        """Loads the base weights, from safetensors only."""
        return load_model(
            LlavaForConditionalGeneration,
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            use_safetensors=True,
            # Packed rows use a boolean attention mask; eager attention would add it to the scores.
            attn_implementation="sdpa",
        )

    def language_model(self) -> PreTrainedModel:
        """Returns the Llama model inside LLaVA."""
        return self.base.model.language_model

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encodes images with the vision tower and the projector.

        Args:
            pixel_values: (I, 3, height, width) pixel values.

        Returns:
            (I, image tokens, H) image features.
        """
        features = self.base.get_image_features(pixel_values.to(self.base.dtype), return_dict=True).pooler_output
        return torch.stack(list(features))

    @property
    def image_token_id(self) -> int:
        """Id of ``<image>``."""
        return self.collator.image_token_id

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.collator.tokenizer

    @property
    def eos_token_ids(self) -> list[int]:
        """Id of ``</s>``, as a list.

        Raises:
            ArgumentError: The tokenizer names no end token.
        """
        if self.tokenizer.eos_token_id is None:
            raise ArgumentError(
                f"vlm.model: the tokenizer of {self.name!r} names no token that ends a response (eos_token)"
            )
        return [self.tokenizer.eos_token_id]
