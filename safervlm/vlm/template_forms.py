"""What a chat template writes around a given answer, and the system prompt that it inserts by itself.

Both are found by comparing rendered conversations; everything here is a function of texts.
"""

import re
from dataclasses import dataclass, field

from safervlm.vlm.thinking import Marks, Thinking


@dataclass(frozen=True)
class GivenForm:
    """How a chat template writes a given answer.

    Attributes:
        stem: The text after which the answer is scored.
        continuation: The text from there to the end of the answer.
        rest: The text after the answer.
        dropped: The end of the prompt that the template doesn't write before a given answer, a mark that opens the
            reasoning; empty if the answer follows the prompt.
        trains_without_thinking: Whether a model that is trained on it learns to answer without thinking.
        block: The empty block of reasoning at the beginning of the continuation.
    """

    stem: str
    continuation: str
    rest: str
    dropped: str = field(default="")
    trains_without_thinking: bool = False
    block: str = ""


def given_form(prompt: str, answered: str, answer: str, thinking: Thinking) -> GivenForm | None:
    """Compares how a template writes the beginning of a response with how it writes a given answer.

    Args:
        prompt: A conversation with the beginning of a response.
        answered: The same conversation with a given answer.
        answer: The answer.
        thinking: How the model marks its reasoning.

    Returns:
        The form; None if the two beginnings differ by more than a block of reasoning.
    """
    marks = thinking.marks[0] if thinking.marks else None
    if answered.startswith(prompt):
        behind = answered[len(prompt) :]
        block = _empty_block(marks, behind) if marks else ""
        place = behind.find(answer, len(block))
        if place < 0:
            return None
        end = place + len(answer)
        return GivenForm(prompt, behind[:end], behind[end:], "", bool(block) or thinking.expected, block)
    if marks is None or not marks.opening:
        return None
    # The prompt ends with a block of reasoning, open or empty, that the given answer lacks.
    opening, closing = re.escape(marks.opening), re.escape(marks.closing)
    found = re.search(rf"{opening}\s*({closing}\s*)?\Z", prompt)
    if found is None or not answered.startswith(head := prompt[: found.start()]):
        return None
    behind = answered[len(head) :]
    if not behind.startswith(answer):
        return None
    rest = behind[len(answer) :]
    if found[1]:  # an empty block: generated answers follow it, too
        return GivenForm(prompt, answer, rest)
    return GivenForm(head, answer, rest, found[0], trains_without_thinking=True)


def _empty_block(marks: Marks, text: str) -> str:
    """Returns the empty block of reasoning, or what remains of it after the prompt, at the beginning of a text."""
    opening, closing = re.escape(marks.opening), re.escape(marks.closing)
    found = re.match(rf"\s*(?:{opening}\s*)?{closing}\s*", text)
    return found[0] if found else ""


def default_system(with_system: str, plain: str, probe: str) -> str:
    """Returns the system prompt that a chat template inserts into a conversation without one; empty if it inserts none.

    Args:
        with_system: A conversation with ``probe`` as its system prompt.
        plain: The same conversation without a system prompt.
        probe: A text that occurs nowhere else.
    """
    before, found, behind = with_system.partition(probe)
    fits = bool(found) and plain.startswith(before) and plain.endswith(behind)
    return plain[len(before) : len(plain) - len(behind)].strip() if fits else ""
