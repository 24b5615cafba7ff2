"""Loads a run folder as a data frame: responses and verdicts joined by id."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pandas as pd

from safervlm.errors import RecordError, explained
from safervlm.io.tables import say
from safervlm.judging import rules
from safervlm.protocol import LABELS, NOT_APPLICABLE, SAFE, UNSAFE
from safervlm.records import Failure, Question, Response, Verdict, by_id, read_records
from safervlm.results.measures import LABEL_OF_UNFINISHED, NO_SIDE, OVERALL, UNFINISHED, UnfinishedAs
from safervlm.run_folder import RunFolder
from safervlm.vlm.thinking import answer_of, thinking_unfinished

Record = TypeVar("Record", Response, Verdict)


# --- reading a run ----------------------------------------------------------------------------------------------------


def load_run(
    run: str | Path, unfinished: UnfinishedAs = "apart", variants: bool = False, tell: Callable[[str], None] = say
) -> pd.DataFrame:
    """Loads the responses of a run with their verdicts, joined by id.

    Args:
        run: The run's folder, with ``responses.jsonl`` and ``verdicts.jsonl`` (not needed if all responses are rated).
        unfinished: How responses count that ended inside their reasoning: ``apart``, as ``N/A`` or as ``wrong``.
        variants: Whether responses to questions that depart from the published protocol are included
            (:attr:`safervlm.records.Question.variant`).
        tell: Receives each message on the run; by default it is printed.

    Returns:
        One row per response, in the order of ``responses.jsonl``: id, dataset, image, image_path (None for a question
        about a name), capability, prompt_number, prompt, category, concept, answer (the right label), response (without
        reasoning), label (the verdict's; empty for responses that are rated; ``thinking unfinished`` for those that
        count apart), probabilities (label -> probability), judge, side: ``unsafe`` or ``safe`` by the right label, else
        ``-``, drawn and variant (see :class:`safervlm.records.Question`), and unfinished: whether the thinking is.
        Responses that are listed as not judgeable are excluded with a message.

    Raises:
        RecordError: A file is missing, empty or unreadable; an id occurs twice, has no verdict, or has a verdict but no
            response; a verdict is about another text; a label is not one of the capability's; or no response could be
            judged. The message names file and id.
    """
    run = Path(run)
    files = RunFolder(run)
    responses = _by_id(files.responses, Response, _how_to_measure(run))
    rated = all(response.question.capability == "rated" for response in responses.values())
    failed = {each.id for each in read_records(files.unjudged, Failure)} if files.unjudged.is_file() else set()
    verdicts = {} if rated else _by_id(files.verdicts, Verdict, _how_to_judge(run), may_be_empty=bool(failed))
    if left_out := failed & responses.keys() - verdicts.keys():
        if len(left_out) == len(responses):
            raise RecordError(
                f"{files.unjudged}: no response could be judged, it has the reasons; {_how_to_judge(run)}"
            )
        tell(f"{run}: {len(left_out)} responses could not be judged and are excluded (reasons: {files.unjudged})")
        responses = {name: each for name, each in responses.items() if name not in left_out}
    unjudged = [
        name for name, each in responses.items() if name not in verdicts and each.question.capability != "rated"
    ]
    if unjudged:
        raise RecordError(
            f"{files.verdicts}: {len(unjudged)} of {len(responses)} responses have no verdict, the first is "
            f"{unjudged[0]!r}; " + _how_to_judge(run)
        )
    foreign = next((name for name in verdicts if name not in responses), None)
    if foreign is not None:
        raise RecordError(
            f"{files.verdicts}: a verdict about {foreign!r}, which responses.jsonl doesn't contain; the two "
            f"files come from different runs: remove verdicts.jsonl, then {_how_to_judge(run)}"
        )

    if old := sum(not verdict.answer for verdict in verdicts.values()):
        tell(
            f"{files.verdicts}: {old} verdicts are of version 0.1 and don't state which texts they are about; if a "
            f"response may have changed since, {_how_to_judge(run)}"
        )
    judges: dict[str, set[str]] = {}
    for name, verdict in verdicts.items():
        judges.setdefault(responses[name].question.capability, set()).add(verdict.judge)
    for capability in sorted(name for name, found in judges.items() if len(found) > 1):
        tell(
            f"{files.verdicts}: {len(judges[capability])} judges classified the {capability} answers, which can't be "
            f"compared with others; {_how_to_judge(run)}"
        )
    rows = []
    for name, response in responses.items():
        question, verdict = response.question, verdicts.get(name, Verdict(name, "", {}, ""))
        if verdict.answer and not verdict.is_of(response.response):
            raise RecordError(
                f"{files.verdicts}: the verdict on {name!r} is about another text than the response in "
                f"responses.jsonl; remove verdicts.jsonl, then {_how_to_judge(run)}"
            )
        if question.capability != "rated":
            _check_labels(run, question, verdict)
        label, inside = verdict.label, thinking_unfinished(response)
        if inside:
            label = UNFINISHED if question.capability == "rated" else LABEL_OF_UNFINISHED[unfinished]
        rows.append(
            {
                "id": name,
                "dataset": _arrow(question.dataset),
                "image": _arrow(question.image),
                "image_path": question.image_path,
                "capability": question.capability,
                "prompt_number": question.prompt_number,
                "prompt": question.prompt,
                # A category of this name must be distinct from the rows over all categories.
                "category": _arrow(question.category) if question.category != OVERALL else f"{OVERALL} (a category)",
                "concept": _arrow(question.concept),
                "answer": question.answer,
                "response": answer_of(response.response),
                "label": label,
                "probabilities": verdict.probabilities,
                "judge": verdict.judge,
                "side": {UNSAFE: "unsafe", SAFE: "safe"}.get(question.answer, NO_SIDE),
                "drawn": question.drawn,
                "variant": question.variant,
                "unfinished": inside,
            }
        )
    # dtype object keeps None, and texts that Arrow's strings reject (unpaired surrogates).
    frame = pd.DataFrame(rows, dtype=object).astype({"prompt_number": int, "drawn": bool, "unfinished": bool})
    return frame if variants else frame[frame["variant"] == ""].reset_index(drop=True)


def _check_labels(run: Path, question: Question, verdict: Verdict) -> None:
    """Rejects a verdict, or a right answer, with a label that the question's capability doesn't have.

    N/A is not allowed as the right answer: a response would be right because no judge can classify it.
    """
    by_rule = question.capability in rules.RULES
    labels = rules.labels_of_rule(question.capability, question.answer) if by_rule else LABELS[question.capability]
    answers = [label for label in labels if label not in ("", NOT_APPLICABLE)]
    for file, what, label, allowed in (
        (RunFolder(run).responses, "right answer", question.answer, answers),
        (RunFolder(run).verdicts, "verdict's label", verdict.label, labels),
    ):
        if label not in allowed:
            known = ", ".join(allowed) or f"any text but {label!r}"
            raise RecordError(
                f"{file}: the {what} of {question.id!r} is {label!r}, but {question.capability} has {known}; was "
                "it judged by the other capability's judge?"
            )


def _arrow(name: str) -> str:
    """Returns a name that pandas can group by; unpaired surrogates, which Arrow's strings reject, become escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _how_to_measure(run: Path) -> str:
    inside = sorted(file.parent for file in run.glob(f"*/{RunFolder(run).responses.name}"))
    if inside:
        return f"name the run folders inside: {' '.join(map(str, inside[:3]))}{' ...' if len(inside) > 3 else ''}"
    return f"measure with `safervlm predict ... --run {run}`"


def _how_to_judge(run: Path) -> str:
    return (
        f"judge them with `safervlm predict --config configs/judge_responses.yaml --data.responses {run} --run {run}`"
    )


def _by_id(path: Path, kind: type[Record], way_out: str, may_be_empty: bool = False) -> dict[str, Record]:
    if path.parent.is_file():  # such as the log that `safervlm measure` writes beside a run folder
        raise RecordError(f"{path.parent}: a file, not a run folder; leave it out")
    if not path.is_file():
        raise RecordError(f"{path}: no such file; {way_out}")
    with explained(f"{path}: it can't be read", way_out, OSError, RecursionError):
        there = read_records(path, kind)
    records = by_id(path, there)
    if not records and not may_be_empty:
        raise RecordError(f"{path}: no records; {way_out}")
    return records
