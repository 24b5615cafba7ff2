"""Thinking models: detects the marks around a model's reasoning, and separates its reasoning from its answer.

A thinking model writes its reasoning before its answer, between two marks (``<think>`` and ``</think>``). The answer is
the text after the last closing mark. The chat template may write the opening mark at the end of the prompt, and may
write a given answer without reasoning. All functions of this module process texts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safervlm.errors import ArgumentError
from safervlm.records import THINKING_UNFINISHED, Response


@dataclass(frozen=True)
class Marks:
    """The two marks around reasoning.

    Attributes:
        opening: The opening mark; empty if the prompt always ends with it.
        closing: The closing mark.
    """

    opening: str
    closing: str

    @property
    def pieces(self) -> set[str]:
        """The parts of the marks that may be single tokens of a tokenizer."""
        return set(re.findall(r"<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷]+▷", self.opening + self.closing))


# The marks of published thinking models.
COMMON = (
    Marks("<think>", "</think>"),  # Qwen, GLM, DeepSeek, InternVL
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("◁think▷", "◁/think▷"),  # Kimi-VL
    Marks("[THINK]", "[/THINK]"),  # Mistral
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|channel>thought", "<channel|>"),  # Gemma 4
    Marks("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),  # gpt-oss
)
# The setting ``vlm.thinking``: the two marks, or how they are found.
Setting = list[str] | Literal["detected", "none"]
Source = Literal["argument", "template", "tokenizer", "common marks", "none"]
# Share of responses with unfinished thinking above which tables warn.
MANY = 0.05


@dataclass(frozen=True)
class SplitResponse:
    """A response, separated into reasoning and answer.

    Attributes:
        reasoning: The text between the marks; empty for a response without reasoning.
        answer: The text after the last closing mark; empty if the thinking is unfinished.
        unfinished: Whether the response ended inside its reasoning.
    """

    reasoning: str
    answer: str
    unfinished: bool = False


@dataclass(frozen=True)
class Thinking:
    """How a model marks its reasoning.

    Attributes:
        marks: The possible marks; none for a model that doesn't think, several for a server.
        opened: Whether the prompt ends inside the reasoning.
        closed: Whether the prompt ends after an empty block, so that the model answers without reasoning.
        source: Where the marks were found.
        unknown: Without marks: a possible opening mark at the end of the prompt; empty for none.
    """

    marks: tuple[Marks, ...] = ()
    opened: bool = False
    closed: bool = False
    source: Source = "none"
    unknown: str = ""

    @property
    def expected(self) -> bool:
        """Whether the model reasons in its responses: the template or an argument has the marks.

        A tokenizer may have the marks of the family's thinking models although the model itself doesn't think.
        """
        return bool(self.marks) and not self.closed and (self.opened or self.source in ("argument", "template"))

    def split(self, text: str, beside: bool = False) -> SplitResponse:
        """Separates a response into reasoning and answer.

        Args:
            text: The response with its marks.
            beside: Whether the reasoning was returned separately, so that the text doesn't begin inside it.
        """
        return split(text, self.marks, self.opened and not beside)

    def mark_tokens(self, special: Mapping[int, str]) -> dict[int, str]:
        """Returns the special tokens that belong to the marks, which the model must be able to generate.

        Args:
            special: The tokenizer's special tokens by id.
        """
        pieces = {piece for marks in self.marks for piece in (*marks.pieces, marks.opening, marks.closing)}
        return {number: token for number, token in special.items() if token in pieces}

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the separation, as plain JSON values; empty for a model without marks."""
        if not self.marks:
            return {}
        marks = [[each.opening, each.closing] for each in self.marks]
        return {"thinking": {"marks": marks, "opened": self.opened, "closed": self.closed, "source": self.source}}

    def report(self) -> str | None:
        """Returns one line about the marks and the prompt; None if there are no marks or only a tokenizer has them."""
        if self.unknown:
            closing = f"{self.unknown[0]}/{self.unknown[1:]}"
            return (
                f"vlm.thinking: the prompt ends with {self.unknown}; if it opens reasoning, give both marks, "
                f"[{self.unknown}, {closing}], so that only the answer is judged"
            )
        if not self.marks or not (self.expected or self.closed):
            return None
        marks = " or ".join(f"{each.opening} and {each.closing}" for each in self.marks)
        where = "vlm.thinking" if self.source == "argument" else f"the {self.source}"
        state = "; the prompt opens it" if self.opened else ""
        if self.closed:
            state = "; the prompt ends with an empty block: thinking is off (vlm.template_arguments)"
        return f"vlm.thinking: reasoning between {marks} ({where}) is stored beside the answer{state}"


def chosen(setting: Setting) -> tuple[Marks, ...] | None:
    """Returns the marks of the setting ``vlm.thinking``; None if they are to be detected.

    Args:
        setting: Two marks, ``detected`` or ``none``.

    Raises:
        ArgumentError: The setting is neither of them.
    """
    if setting == "detected":
        return None
    if setting == "none":
        return ()
    if isinstance(setting, str) or len(setting) != 2 or not setting[1].strip() or setting[0] == setting[1]:
        raise ArgumentError(
            f"vlm.thinking: the opening and the closing mark ([<think>, </think>]), detected or none, got {setting!r}"
        )
    return (Marks(*setting),)


def valid_setting(setting: Setting) -> Setting:
    """Returns the setting ``vlm.thinking`` if it is valid.

    Args:
        setting: Two marks, ``detected`` or ``none``.

    Raises:
        ArgumentError: The setting is neither of them.
    """
    chosen(setting)
    return setting


def detect(setting: Setting, template: str, tokens: Iterable[str], beginning: str = "") -> Thinking:
    """Finds the marks of a model, and whether its prompt ends inside or after them.

    Args:
        setting: Two marks, ``detected`` or ``none``.
        template: Source of the chat template; empty if there is none.
        tokens: Added tokens of the tokenizer.
        beginning: The end of a prompt, from the end of the question to the beginning of the response.

    Raises:
        ArgumentError: The setting is invalid.
    """
    marks, source = chosen(setting), "argument"
    if marks is None:
        added = set(tokens)
        in_template = [each for each in COMMON if each.opening in template or each.closing in template]
        in_tokens = [each for each in COMMON if each.pieces <= added]
        marks, source = tuple((in_template or in_tokens)[:1]), "template" if in_template else "tokenizer"
    if not marks:
        return Thinking()
    opening, closing = marks[0].opening, marks[0].closing
    closed = closing in beginning and not (opening and beginning.rfind(opening) > beginning.rfind(closing))
    opened = not closed and (not opening or opening in beginning)
    return Thinking(marks, opened, closed, source)  # type: ignore[arg-type]


def unknown_mark(prompt: str, answered: str) -> str:
    """Returns a tag at the end of a prompt that the template doesn't write before a given answer; empty for none.

    Args:
        prompt: A conversation with the beginning of a response.
        answered: The same conversation with a given answer.
    """
    found = re.search(r"(<[^\W\d][\w:-]*>|\[[^\W\d][\w:-]*\])\s*\Z", prompt)
    given = found is None or answered.startswith(prompt[: found.end(1)])
    return "" if found is None or given else found[1]


def for_server(setting: Setting) -> Thinking:
    """Returns how the responses of a server are separated, whose template is unknown: by all common marks.

    Args:
        setting: Two marks, ``detected`` or ``none``.

    Raises:
        ArgumentError: The setting is invalid.
    """
    marks = chosen(setting)
    if marks is None:
        return Thinking(COMMON, source="common marks")
    return Thinking(marks, opened=any(not each.opening for each in marks), source="argument")


def unopened_closing_mark(text: str, thinking: Thinking) -> str | None:
    """Returns the closing mark of a server's response that lacks the opening one, as the prompt opens the reasoning.

    Args:
        text: The response with its marks.
        thinking: The possible marks.

    Returns:
        The mark; None if there is none, or if an argument states how a response begins.
    """
    if thinking.source != "common marks":
        return None
    return next((m.closing for m in thinking.marks if m.closing in text and m.opening not in text), None)


def split(text: str, marks: Sequence[Marks], opened: bool = False) -> SplitResponse:
    """Separates a response into reasoning and answer.

    Args:
        text: The response with its marks.
        marks: The possible marks.
        opened: Whether the prompt ended inside the reasoning.

    Returns:
        The separated response. Its thinking is unfinished if a mark is open at its end, however the response ended.
    """
    ends = [(text.rfind(each.closing), len(each.closing)) for each in marks if each.closing in text]
    place, length = max(ends, default=(0, 0))
    rest = text[place + length :]
    if any(each.opening and each.opening in rest for each in marks) or (not ends and opened):
        return SplitResponse(_unmarked(text, marks), "", True)
    return SplitResponse(_unmarked(text[:place], marks), rest.strip())


def _unmarked(reasoning: str, marks: Sequence[Marks]) -> str:
    """Removes the opening mark at the beginning."""
    reasoning = reasoning.strip()
    for each in marks:
        reasoning = reasoning.removeprefix(each.opening).strip()
    return reasoning


def answer_of(text: str) -> str:
    """Returns the answer in a stored response that may still contain reasoning between common marks.

    Judges, rules and raters use it, so that they classify only the answer, whichever program stored the response.

    Args:
        text: The response.
    """
    return split(text, COMMON).answer


def thinking_unfinished(response: Response) -> bool:
    """Returns whether a stored response ended inside its reasoning, so that it has no answer.

    Args:
        response: The response; one that was stored without its reasoning may contain an open mark.
    """
    return response.finish_reason == THINKING_UNFINISHED or split(response.response, COMMON).unfinished


def many_unfinished(name: str, unfinished: int, responses: int) -> str | None:
    """Returns a warning if many responses ended inside their reasoning; None otherwise.

    Args:
        name: Name of the run.
        unfinished: Number of these unfinished responses.
        responses: Number of all responses.
    """
    if unfinished <= MANY * responses:
        return None
    return (
        f"{name}: thinking unfinished in {unfinished} of {responses} responses ({unfinished / responses:.0%}), which "
        "have no answer; increase sampling.max_new_tokens"
    )


# --- given answers ----------------------------------------------------------------------------------------------------
