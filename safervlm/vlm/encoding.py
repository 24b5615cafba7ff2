"""Encodes questions and completions with a Hugging Face processor: texts and images to tensors."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import BLANK, ImageSettings, open_image
from safervlm.records import Example, Question
from safervlm.vlm.base import Batch, tokenizable_example
from safervlm.vlm.conversation import Conversation
from safervlm.vlm.prefix import Encoding


class EncodedBatch(Batch):
    """Questions that the model's processor has encoded separately.

    Args:
        questions: The B questions.
        encodings: For each question, the processor's output: ``input_ids`` (1, prompt tokens) and family-specific
            inputs.
        completions: For each question, the token ids of its completions; empty for generation.
        dropped: Number of tokens at the end of a prompt that the template doesn't write before a given answer.
            Generated responses follow the whole prompt.
        samples: See :class:`safervlm.vlm.base.Batch`.
    """

    def __init__(
        self,
        questions: list[Question],
        encodings: list[Encoding],
        completions: list[list[list[int]]],
        dropped: int = 0,
        samples: list[int] | None = None,
    ) -> None:
        super().__init__(questions, samples)
        self.encodings, self.completions, self.dropped = encodings, completions, dropped

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device; called by Lightning.

        Args:
            device: The target device.
        """
        encodings: list[Encoding] = [
            {name: tensor.to(device) for name, tensor in encoding.items()} for encoding in self.encodings
        ]
        return type(self)(self.questions, encodings, self.completions, self.dropped, self.samples)

    def select(self, rows: Tensor, answers: Sequence[Sequence[int]] | None = None) -> Self:
        """Returns a batch of some of the questions, each with its generated response as its only completion.

        Args:
            rows: Indices of the questions to keep.
            answers: Token ids of the response to each of the B questions; None for a batch without completions.
        """
        chosen = rows.tolist()
        return type(self)(
            [self.questions[row] for row in chosen],
            [self.encodings[row] for row in chosen],
            [[list(answers[row])] if answers else [] for row in chosen],
            samples=[self.samples[row] for row in chosen],
        )

    def before_answers(self, names: Collection[str]) -> list[Encoding]:
        """Returns the encodings of the prompts, up to where the template writes a given answer.

        Args:
            names: Inputs with a value per token.
        """
        end = -self.dropped or None
        return [
            {name: tensor[:, :end] if name in names else tensor for name, tensor in encoding.items()}
            for encoding in self.encodings
        ]

    def too_long(self, limit: int, new: int) -> dict[int, str]:
        """Returns the questions whose responses may exceed the model's positions, with the reason for each.

        Args:
            limit: Number of tokens that the model accepts.
            new: Maximum number of tokens of a response.
        """
        lengths = [encoding["input_ids"].shape[1] for encoding in self.encodings]
        return {
            row: f"{self.questions[row].id}: {length} tokens and as many as {new} new ones, the model takes {limit}; "
            "shorten the question, or lower sampling.max_new_tokens"
            for row, length in enumerate(lengths)
            if length + new > limit
        }


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns the special tokens by id, including those without a role, which the tokenizer's own list omits.

    Args:
        tokenizer: The model's tokenizer.
    """
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def whole_length(encoding: Encoding, answers: Sequence[Sequence[int]]) -> int:
    """Returns the number of tokens of a prompt with its longest completion.

    Args:
        encoding: Encoding of the prompt.
        answers: Token ids of the completions.
    """
    return encoding["input_ids"].shape[1] + max(map(len, answers), default=0)


@dataclass
class ProcessorCollator(Conversation):
    """Makes an :class:`EncodedBatch` of examples with the model's processor; picklable, without weights.

    Attributes:
        question_length: Maximum number of tokens of the question for a Q-Former; 0 for models without one.
        images: How images are decoded.
        words: Number of tokens for which the model has embeddings; a tokenizer may have more.
    """

    question_length: int
    images: ImageSettings = field(default=ImageSettings(), kw_only=True)
    words: int = field(default=2**31, kw_only=True)

    def __call__(self, examples: Sequence[Example]) -> EncodedBatch:
        """Decodes the images and encodes prompts and completions.

        Raises:
            RecordError: A text contains a special token, is too long, or has a token without an embedding; or the
                processor or the image decoder rejects the image.
        """
        encodings, completions = [], []
        for example in examples:
            encoding, answers = self.encoded(example)
            encodings.append(encoding)
            completions.append(answers)
        questions = [example.question for example in examples]
        scored = any(completions) and self.thinking.opened
        return EncodedBatch(questions, encodings, completions, self.dropped_tokens() if scored else 0)

    def encoded(self, example: Example) -> tuple[Encoding, list[list[int]]]:
        """Returns the encoding of an example's prompt and the token ids of its completions.

        Args:
            example: The example; its image is read.

        Raises:
            RecordError: See :meth:`__call__`.
        """
        example = self.tokenizable(example)
        name = example.question.id
        try:
            encoding = self.encode(example.question)
        except RecordError:
            raise
        except ValueError as error:  # for example, an unsupported image shape
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RecordError(f"{name}: the model's processor can't take it ({reason})") from error
        answers = [self.completion_ids(encoding, text.strip()) for text in example.completions]
        if (length := whole_length(encoding, answers)) > self.max_length:
            raise RecordError(f"{name}: {length} tokens, the model takes {self.max_length}; shorten the question")
        if self.question_length and (length := encoding["qformer_input_ids"].shape[1]) > self.question_length:
            raise RecordError(
                f"{name}: {length} tokens, the Q-Former takes {self.question_length}; shorten the question"
            )
        highest = max([int(encoding["input_ids"].max()), *(token for answer in answers for token in answer)])
        if highest >= self.words:
            raise RecordError(f"{name}: its text has the token {highest}, the model has {self.words}; reword it")
        return encoding, answers

    def tokenizable(self, example: Example) -> Example:
        """Returns a copy of an example whose texts a tokenizer accepts.

        Args:
            example: The example; its image is not read.

        Raises:
            RecordError: A text contains a special token, or is far too long.
        """
        example = tokenizable_example(example, self.max_length)
        special = special_tokens(self.tokenizer).values()
        for text in (example.question.prompt, *example.completions):
            if found := [token for token in special if token in text]:
                raise RecordError(
                    f"{example.question.id}: its text contains the special token {found[0]!r}; leave it out"
                )
        return example

    def check_texts(self, example: Example) -> int:
        """Rejects an example whose texts the model can't process with any image.

        Args:
            example: The example; its image is not read, so that it may still be too long with it: :meth:`check_whole`.

        Returns:
            The number of tokens of its words.

        Raises:
            RecordError: See :meth:`tokenizable`; or the text without the image has more tokens than the model accepts.
        """
        example = self.tokenizable(example)
        prompt, *answers = (
            len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (example.question.prompt, *example.completions)
        )
        if (length := prompt + max(answers, default=0)) > self.max_length:
            raise RecordError(
                f"{example.question.id}: {length} tokens, the model takes {self.max_length}; shorten the question"
            )
        return length

    def check_whole(self, example: Example) -> int:
        """Rejects an example that the model can't take, as making a batch of it would.

        Args:
            example: The example; its image is read.

        Returns:
            How many more tokens would fit.

        Raises:
            RecordError: See :meth:`__call__`.
        """
        return self.max_length - whole_length(*self.encoded(example))

    def require_image_in_template(self, image_token_ids: set[int]) -> None:
        """Validates that the processor accepts the plain text template with an image.

        Args:
            image_token_ids: Ids of the placeholder tokens of images.

        Raises:
            ArgumentError: The processor rejects the template, or the encoded text has no placeholder for the image.
        """
        try:
            encoded = self.encode(Question("", "", "", None, "alignment", 0, "Safe?", "", "", ""))
            # Before transformers 5.23, not every processor counts the image placeholders of a text.
            if image_token_ids and not image_token_ids & set(encoded["input_ids"].flatten().tolist()):
                raise ValueError("the encoded text has no placeholder for the image")
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise ArgumentError(
                f"vlm.template: the model's processor rejects {self.template!r} with an image ({reason}); write "
                "where the image stands, as in '<image>{question}'"
            ) from error

    def encode(self, question: Question) -> Encoding:
        """Encodes one question and its image with the model's processor; a question without an image gets a blank one.

        Args:
            question: The question, with the path of its image.

        Returns:
            The processor's output, each tensor with a leading dimension of 1.

        Raises:
            RecordError: The image can't be decoded.
            ArgumentError: The chat template exceeds its limits.
        """
        path = question.image_path
        image = BLANK if path is None else open_image(path, question.id, self.images)
        if self.template is not None:
            text = self.template.format(question=question.prompt)
            encoding = dict(self.processor(images=image, text=text, return_tensors="pt"))
        else:
            self.written(self.messages(question.prompt), add_generation_prompt=True)  # raises beyond the limits
            encoding = dict(
                self.processor.apply_chat_template(
                    self.messages(question.prompt, image),
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    **self.template_arguments,
                )
            )
        encoding.pop("labels", None)  # a prompt has no labels
        return encoding
