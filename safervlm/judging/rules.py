"""Rules for responses that the paper's classifiers do not judge: yes or no, and occurrence of the expected answer.

They apply to the answer, without the reasoning that a stored response may contain (:mod:`safervlm.vlm.thinking`).
"""

from typing import Literal

from safervlm.protocol import NOT_APPLICABLE, Capability
from safervlm.vlm.thinking import answer_of

YES, NO = "Yes", "No"
# Value of the field ``judge`` in the verdicts of each rule.
RULES: dict[Capability, str] = {"yes_no": "rule: MME's yes or no", "occurs": "rule: the expected answer occurs"}


def yes_or_no(response: str) -> Literal["Yes", "No", "N/A"]:
    """Classifies a response as Yes, No or N/A, as MME's evaluation does.

    The first four characters decide, in lower case: Yes if they contain "yes", else No if they contain "no" ("None" and
    "not" are No, "I know" is neither), else N/A, which counts as wrong.

    Source: ``parse_pred_ans`` of ``calculation.py`` in MME's ``tools/eval_tool.zip``, of which only one version exists
    (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation, commit 1c1d69e, July 2023;
    arXiv:2306.13394). The responses of LaVIN that it includes have the same scores with both, task by task.

    Args:
        response: the model's response.
    """
    begin = answer_of(response).lower()[:4]
    return YES if "yes" in begin else NO if "no" in begin else NOT_APPLICABLE  # type: ignore[return-value]


def occurs(expected: str, response: str) -> bool:
    """Whether the expected answer occurs in the response as a substring, case-sensitively: the published shortcut.

    Source: the first implementation's evaluation of what it calls MME (arXiv:2507.11155). It finds "No" in "Not sure".

    Args:
        expected: the right answer.
        response: the model's response.
    """
    return expected in answer_of(response)


def labels_of_rule(capability: Capability, expected: str) -> tuple[str, ...]:
    """Returns the labels that a rule can assign.

    Args:
        capability: ``yes_no`` or ``occurs``.
        expected: the right answer; used for ``occurs`` only.
    """
    return (YES, NO, NOT_APPLICABLE) if capability == "yes_no" else (expected, NOT_APPLICABLE)


def apply_rule(capability: Capability, expected: str, response: str) -> dict[str, float]:
    """Judges a response by the rule of its capability.

    Args:
        capability: ``yes_no``, with labels Yes, No and N/A, or ``occurs``, with the expected answer and N/A as labels.
        expected: the right answer; used for ``occurs`` only.
        response: the model's response.

    Returns:
        Label -> probability, each 0 or 1.
    """
    if capability == "yes_no":
        label = yes_or_no(response)
        return {name: float(name == label) for name in (YES, NO, NOT_APPLICABLE)}
    found = occurs(expected, response)
    return {expected: float(found), NOT_APPLICABLE: float(not found)}
