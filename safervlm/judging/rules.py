"""Answers that a rule reads, where the paper's classifiers don't: yes or no, and whether the expected answer occurs."""

from typing import Literal

from safervlm.protocol import NOT_APPLICABLE, Capability

YES, NO = "Yes", "No"
# What stands as judge in a verdict.
RULES: dict[Capability, str] = {"yes_no": "rule: MME's yes or no", "occurs": "rule: the expected answer occurs"}


def yes_or_no(response: str) -> Literal["Yes", "No", "N/A"]:
    """What MME's evaluation reads in an answer.

    In lower case: "yes" or "no" itself; else whether its first four characters hold "yes", then whether they hold "no"
    ("None" and "not" are a no, "I know" is neither); else neither, which is wrong.

    Source: ``parse_pred_ans`` of ``calculation.py`` in MME's ``tools/eval_tool.zip``, the one version of it there is
    (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation, commit 1c1d69e, July 2023;
    arXiv:2306.13394). The answers of LaVIN that lie beside it score the same here and there, task by task.
    """
    begin = response.lower()[:4]
    return YES if "yes" in begin else NO if "no" in begin else NOT_APPLICABLE  # type: ignore[return-value]


def occurs(expected: str, response: str) -> bool:
    """The published shortcut: right if the expected answer occurs in the response, letter by letter.

    Source: the first implementation's evaluation of what it calls MME (arXiv:2507.11155). It finds "No" in "Not sure".
    """
    return expected in response


def labels_of_rule(capability: Capability, expected: str) -> tuple[str, ...]:
    """What a rule may say of an answer.

    Args:
        capability: ``yes_no`` or ``occurs``.
        expected: the right answer.
    """
    return (YES, NO, NOT_APPLICABLE) if capability == "yes_no" else (expected, NOT_APPLICABLE)


def apply_rule(capability: Capability, expected: str, response: str) -> dict[str, float]:
    """The probabilities of a verdict by rule, all 0 or 1.

    Args:
        capability: ``yes_no`` or ``occurs``, whose labels are the expected answer and N/A.
        expected: the right answer.
        response: the model's.
    """
    if capability == "yes_no":
        label = yes_or_no(response)
        return {name: float(name == label) for name in (YES, NO, NOT_APPLICABLE)}
    found = occurs(expected, response)
    return {expected: float(found), NOT_APPLICABLE: float(not found)}
