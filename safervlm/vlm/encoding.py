"""Encodes questions and completions with a Hugging Face processor: texts and images to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import BLANK, ImageSettings, open_image
from safervlm.limits import SECONDS, computing_limit
from safervlm.records import Example, Question
from safervlm.vlm.base import CHARACTERS, Batch, tokenizable_example
from safervlm.vlm.prefix import Encoding


class EncodedBatch(Batch):
    """Questions that the model's processor has encoded one by one.

    Args:
        questions: The B questions.
        encodings: For each question, the processor's output: ``input_ids`` (1, prompt tokens) and family-specific
            inputs.
        completions: For each question, the token ids of its completions; empty for generation.
    """

    def __init__(
        self, questions: list[Question], encodings: list[Encoding], completions: list[list[list[int]]]
    ) -> None:
        super().__init__(questions)
        self.encodings, self.completions = encodings, completions

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device; called by Lightning.

        Args:
            device: The target device.
        """
        encodings: list[Encoding] = [
            {name: tensor.to(device) for name, tensor in encoding.items()} for encoding in self.encodings
        ]
        return type(self)(self.questions, encodings, self.completions)

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
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Returns the special tokens by id, including those without a role, which the tokenizer's own list omits.

    Args:
        tokenizer: The model's tokenizer.
    """
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


@dataclass
class ProcessorCollator:
    """Makes an :class:`EncodedBatch` of examples with the model's processor; picklable, without weights.

    Attributes:
        processor: The model's processor.
        template: Prompt text with ``{question}``, for a model without a chat template; None for the chat template.
        system: System prompt of the conversation; empty for none.
        eos_token_ids: Tokens that end a response.
        max_length: Maximum number of tokens of a prompt with its completion. Longer ones are rejected, never truncated.
        question_length: Maximum number of tokens of the question for a Q-Former; 0 for models without one.
        images: How images are decoded.
        words: Number of tokens that the model has embeddings for; a tokenizer may have more.
        seconds: Maximum CPU time of rendering the chat template.
    """

    processor: ProcessorMixin
    template: str | None
    system: str
    eos_token_ids: list[int]
    max_length: int
    question_length: int
    images: ImageSettings = field(default=ImageSettings(), kw_only=True)
    words: int = field(default=2**31, kw_only=True)
    seconds: float = field(default=SECONDS, kw_only=True)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def __call__(self, examples: Sequence[Example]) -> EncodedBatch:
        """Decodes the images and encodes prompts and completions.

        Raises:
            RecordError: A text contains a special token, is too long, or has a token without an embedding; or the
                processor or the image decoder rejects the image.
        """
        encodings, completions = [], []
        questions = [example.question for example in examples]
        examples = [tokenizable_example(example, self.max_length) for example in examples]
        special = special_tokens(self.tokenizer).values()
        for example in examples:
            name = example.question.id
            for text in (example.question.prompt, *example.completions):
                found = [token for token in special if token in text]
                if found:
                    raise RecordError(f"{name}: its text contains the special token {found[0]!r}; leave it out")
            try:
                encoding = self.encode(example.question)
            except RecordError:
                raise
            except ValueError as error:  # for example, an unsupported image shape
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise RecordError(f"{name}: the model's processor can't take it ({reason})") from error
            answers = [self.completion_ids(encoding, text.strip()) for text in example.completions]
            length = encoding["input_ids"].shape[1] + max(map(len, answers), default=0)
            if length > self.max_length:
                raise RecordError(f"{name}: {length} tokens, the model takes {self.max_length}; shorten the question")
            if self.question_length and (length := encoding["qformer_input_ids"].shape[1]) > self.question_length:
                raise RecordError(
                    f"{name}: {length} tokens, the Q-Former takes {self.question_length}; shorten the question"
                )
            highest = max([int(encoding["input_ids"].max()), *(token for answer in answers for token in answer)])
            if highest >= self.words:
                raise RecordError(f"{name}: its text has the token {highest}, the model has {self.words}; reword it")
            encodings.append(encoding)
            completions.append(answers)
        return EncodedBatch(questions, encodings, completions)

    def messages(self, question: str, image: Any = None) -> list[dict[str, Any]]:
        """Returns the conversation up to the response, in the format of chat templates.

        Args:
            question: Text of the question.
            image: The image; None for a placeholder without pixels.
        """
        shown = {"type": "image"} if image is None else {"type": "image", "image": image}
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        return [*system, {"role": "user", "content": [shown, {"type": "text", "text": question}]}]

    def written(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Renders a conversation with the chat template, a program that comes with the model, within limits.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether to append the beginning of a response.

        Raises:
            ArgumentError: The template takes too long, or its output is too long.
        """
        remedy = "give vlm.template in its place, or use another model"
        slow = f"vlm.model: its chat template computes for too long (vlm.limits.seconds: {self.seconds:g})"
        with computing_limit(f"{slow}; {remedy}", self.seconds):
            text: str = self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        given = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        if len(text) - given > CHARACTERS * self.max_length:
            raise ArgumentError(f"vlm.model: its chat template writes {len(text)} characters; {remedy}")
        return text

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
                )
            )
        encoding.pop("labels", None)  # a prompt has no labels
        return encoding

    def completion_ids(self, prompt: Encoding, answer: str) -> list[int]:
        """Returns the token ids of a response as they follow its prompt, including the end token.

        Args:
            prompt: Encoding of the prompt.
            answer: Text of the response.

        Raises:
            ArgumentError: The chat template writes a given response differently from a generated one, or the tokenizer
                merges the end of the prompt with the beginning of the response.
        """
        if self.template is not None:
            stem = self.tokenizer.decode(prompt["input_ids"][0, -1:])
            whole = f"{stem}{answer}" if stem[-1:].isspace() else f"{stem} {answer}"
        else:
            asked = self.messages("?")
            answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            stem, whole = self.written(asked, add_generation_prompt=True), self.written(answered)
            if not whole.startswith(stem) or answer not in whole[len(stem) :]:
                raise ArgumentError(
                    "the chat template writes another beginning before an answer that is given than before one that "
                    "is generated, so answers can't be scored; use a model whose template doesn't"
                )
        end = whole.index(answer, len(stem)) + len(answer)
        before, ids, behind = (
            self.tokenizer(text, add_special_tokens=False).input_ids for text in (stem, whole[:end], whole[end:])
        )
        if ids[: len(before)] != before:
            raise ArgumentError(
                f"the tokenizer merges the prompt with the answer {answer[:40]!r}; its family needs a module"
            )
        # The end token that the template writes, or else the model's first end token.
        last = next((token for token in behind if token in self.eos_token_ids), self.eos_token_ids[0])
        return [*ids[len(before) :], last]
