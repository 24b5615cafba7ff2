"""Writes conversations with a model's chat template: the prompt, and the template's own form of a given answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from safervlm.errors import ArgumentError, explained
from safervlm.limits import SECONDS, computing_limit
from safervlm.vlm.base import CHARACTERS
from safervlm.vlm.prefix import Encoding
from safervlm.vlm.template_forms import GivenForm, default_system, given_form
from safervlm.vlm.thinking import Setting, Thinking, detect, unknown_mark

# Arguments of the processor's apply_chat_template that are not variables of a template.
TEMPLATE_SETTINGS = {
    *("conversation", "chat_template", "add_generation_prompt", "continue_final_message", "messages"),
    *("return_assistant_tokens_mask", "tokenize", "return_dict", "return_tensors", "load_audio_from_video"),
    *("processor_kwargs", "images", "videos", "audio", "text"),
}
PROBE = "SaferVLM-probe"  # a system prompt that no template contains
ANSWER = "Yes."  # a given answer, to see the form in which a template writes it


class TemplateFailsError(ArgumentError):
    """Raised if a chat template fails, for example because it rejects a role or lacks a variable."""


def template_arguments_of(arguments: Mapping[str, Any] | None, template: str | None) -> dict[str, Any]:
    """Returns the variables of a chat template.

    Args:
        arguments: The setting ``vlm.template_arguments``.
        template: The setting ``vlm.template``.

    Raises:
        ArgumentError: One of them is not a variable, or there is no chat template.
    """
    if taken := sorted((arguments or {}).keys() & TEMPLATE_SETTINGS):
        raise ArgumentError(f"vlm.template_arguments: {taken[0]!r} is set by SaferVLM; remove it")
    if arguments and template is not None:
        raise ArgumentError("vlm.template_arguments: vlm.template replaces the chat template; give one of the two")
    return dict(arguments or {})


def require_used_variables(source: str, arguments: Mapping[str, Any]) -> None:
    """Rejects a variable that a chat template never uses, for example a misspelt one.

    Args:
        source: Source of the chat template.
        arguments: Values of its variables.

    Raises:
        ArgumentError: The template lacks one.
    """
    words = set(re.findall(r"[^\W\d]\w*", source))
    for name in arguments.keys() - words:
        close = get_close_matches(name, words, n=1)
        hint = f"did you mean {close[0]}?" if close else "remove it"
        raise ArgumentError(f"vlm.template_arguments: the model's chat template has no variable {name!r}; {hint}")


@dataclass
class Conversation:
    """A conversation of one question and its answer, in the form that a model was trained on; picklable.

    Attributes:
        processor: The model's processor.
        template: Prompt text with ``{question}``, for a model without a chat template; None for the chat template.
        system: System prompt of the conversation; empty for none.
        eos_token_ids: Tokens that end a response.
        max_length: Maximum number of tokens of a prompt with its completion.
        seconds: Maximum CPU time of rendering the chat template.
        thinking: How the model marks its reasoning; set by :meth:`begin`.
        turn_end: Token with which the chat template ends a response, if the model's settings omit it; set by
            :meth:`begin`, which adds it to ``eos_token_ids``.
        template_arguments: Further variables of the chat template.
    """

    processor: ProcessorMixin
    template: str | None
    system: str
    eos_token_ids: list[int]
    max_length: int
    seconds: float = field(default=SECONDS, kw_only=True)
    thinking: Thinking = field(default=Thinking(), kw_only=True)
    turn_end: int | None = field(default=None, kw_only=True)
    template_arguments: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def begin(self, setting: Setting) -> None:
        """Renders the chat template once, and finds the marks of reasoning and the token that ends a response.

        Args:
            setting: The setting ``vlm.thinking``.

        Raises:
            ArgumentError: The template fails, exceeds its limits, or lacks a variable that an argument names.
        """
        source = beginning = ""
        if self.template is None:
            given = self.processor.chat_template
            source = given if isinstance(given, str) else given.get("default", "")
            require_used_variables(source, self.template_arguments)
            question = "Safe?"
            beginning = self.written(self.messages(question), add_generation_prompt=True).rpartition(question)[2]
        self.thinking = detect(setting, source, self.tokenizer.get_added_vocab(), beginning)
        if not self.thinking.marks and setting == "detected":
            self.thinking = Thinking(unknown=self._unknown_mark())
        self.turn_end = self._turn_end()
        self.eos_token_ids = [*self.eos_token_ids, *([] if self.turn_end is None else [self.turn_end])]

    def _unknown_mark(self) -> str:
        """Returns a mark at the end of the prompt that the template doesn't write before a given answer, or ''."""
        if self.template is not None:
            return ""
        asked = self.messages("Safe?")
        given = [*asked, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
        try:
            return unknown_mark(self.written(asked, add_generation_prompt=True), self.written(given))
        except ArgumentError:  # reported where a given answer is needed
            return ""

    def _turn_end(self) -> int | None:
        """Returns the token with which the chat template ends a response, if the model's settings omit it; or None.

        It ended the responses that the model was trained on. Otherwise it would be suppressed, as special tokens are.
        """
        if self.template is not None:
            return None
        try:
            rest = self.given_form({}, ANSWER).rest
        except ArgumentError:  # reported where a given answer is needed
            return None
        first = next(iter(self.token_ids(rest.lstrip())), None)
        known = first in self.eos_token_ids or first not in self.tokenizer.added_tokens_decoder
        return None if known else first

    def default_system(self) -> str:
        """Returns the system prompt that the chat template inserts into a conversation without one; empty for none."""
        if self.template is not None or self.system:
            return ""
        messages, system = self.messages("Safe?"), {"type": "text", "text": PROBE}
        try:
            probed = self.written([{"role": "system", "content": [system]}, *messages])
        except TemplateFailsError:  # it accepts no system prompt
            return ""
        return default_system(probed, self.written(messages), PROBE)

    def describe(self, setting: Setting) -> dict[str, Any]:
        """Returns the JSON values that, in addition to the system prompt, determine the text of a prompt and response.

        Args:
            setting: The setting ``vlm.thinking``.
        """
        system = self.default_system()
        described: dict[str, Any] = {"template_arguments": self.template_arguments} if self.template_arguments else {}
        described |= {"default_system": system} if system else {}
        return described | ({"thinking": "none"} if setting == "none" else self.thinking.describe())

    def require_thinking_preserved(self) -> None:
        """Validates that training on given answers doesn't train a thinking model not to think.

        Raises:
            ArgumentError: Training on given answers would train the model not to think.
        """
        if not self.thinking.marks:
            return
        if self.thinking.expected if self.template is not None else self.given_form({}, ANSWER).trains_without_thinking:
            raise ArgumentError(
                "vlm.train_without_thinking: the chat template writes a given response without reasoning, so training "
                "on responses would train the model not to think; set it to true, turn thinking off "
                "(vlm.template_arguments), or train by PPO"
            )

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
            ArgumentError: The template takes too long, its output is too long, or it fails.
        """
        remedy = "give vlm.template in its place, or use another model"
        fails = "vlm.model: its chat template fails"
        needed = "leave vlm.system empty" if self.system else "give what it needs as vlm.template_arguments"
        slow = f"vlm.model: its chat template computes for too long (vlm.limits.seconds: {self.seconds:g})"
        with (
            explained(fails, f"{needed}, {remedy}", Exception, error=TemplateFailsError),
            computing_limit(f"{slow}; {remedy}", self.seconds),
        ):
            text: str = self.processor.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, **self.template_arguments
            )
        given = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        if len(text) - given > CHARACTERS * self.max_length:
            raise ArgumentError(f"vlm.model: its chat template writes {len(text)} characters; {remedy}")
        return text

    def given_form(self, prompt: Encoding, answer: str) -> GivenForm:
        """Returns how the template writes a given answer.

        Args:
            prompt: Encoding of the prompt.
            answer: Text of the answer.

        Raises:
            ArgumentError: The chat template writes a given answer differently from a generated one, by more than a
                block of reasoning.
        """
        if self.template is not None:
            stem = self.tokenizer.decode(prompt["input_ids"][0, -1:])
            gap = "" if stem[-1:].isspace() else " "
            return GivenForm(stem, f"{gap}{answer}", "", trains_without_thinking=self.thinking.expected)
        asked = self.messages("?")
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        form = given_form(
            self.written(asked, add_generation_prompt=True), self.written(answered), answer, self.thinking
        )
        if form is None:
            raise ArgumentError(
                "vlm.model: its chat template writes another beginning before a response that is given than before one "
                "that is generated, so responses can't be scored; give vlm.thinking if the beginning opens reasoning, "
                "or use another model"
            )
        return form

    def dropped_tokens(self) -> int:
        """Returns the number of tokens at the end of each prompt that a given answer doesn't follow.

        Raises:
            ArgumentError: The tokenizer merges them with the tokens before.
        """
        if self.template is not None:
            return 0
        form = self.given_form({}, ANSWER)
        if not form.dropped:
            return 0
        whole, stem = map(self.token_ids, (form.stem + form.dropped, form.stem))
        if whole[: len(stem)] != stem:
            raise ArgumentError(
                f"the tokenizer joins the end of the prompt and {form.dropped.strip()!r} into one token; its family "
                "needs a class of its own"
            )
        return len(whole) - len(stem)

    def token_ids(self, text: str) -> list[int]:
        """Returns the token ids of a text, without the tokens that begin and end a sequence.

        Args:
            text: The text.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def completion_ids(self, prompt: Encoding, answer: str) -> list[int]:
        """Returns the token ids of an answer as they follow its prompt, including the end token.

        Args:
            prompt: Encoding of the prompt.
            answer: Text of the answer.

        Raises:
            ArgumentError: See :meth:`given_form`; or the tokenizer merges the end of the prompt with the beginning of
                the answer.
        """
        form = self.given_form(prompt, answer)
        before, ids = self.token_ids(form.stem), self.token_ids(form.stem + form.continuation)
        if ids[: len(before)] == before:
            tokens = ids[len(before) :]
        elif form.block:  # the white space in an empty block of reasoning, which a generated block separates, too
            tokens = self.token_ids(form.continuation)
        else:
            raise ArgumentError(
                f"the tokenizer merges the prompt with the response {answer[:40]!r}; its family needs a module"
            )
        # The end token that the template writes, or else the model's first end token.
        last = next(
            (token for token in self.token_ids(form.rest) if token in self.eos_token_ids), self.eos_token_ids[0]
        )
        return [*tokens, last]
