"""The classifiers and rules of a measurement, each for the responses of its capability."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning import LightningModule

from safervlm.errors import ArgumentError
from safervlm.failures import in_halves
from safervlm.judging import rules
from safervlm.judging.classifier import BATCH_SIZE, Judge
from safervlm.judging.rules import RULES
from safervlm.protocol import LABELS, NOT_APPLICABLE, Capability
from safervlm.records import Example, Failure, Question, Response, Verdict


class Answers:
    """A batch of saved answers.

    A class of its own: Lightning, which moves batches to devices, refuses to look into frozen records, and does not
    look into this.

    Args:
        answers: each the question and the answer's text.
    """

    def __init__(self, answers: Sequence[tuple[Question, str]]) -> None:
        self.answers = list(answers)


class Panel(LightningModule):
    """Which judge reads which answer.

    Yes or no, and whether an expected answer occurs, is read by a rule (:mod:`safervlm.judging.rules`). An answer
    without a word, such as a content filter leaves, is N/A by rule too.

    Args:
        alignment: The judge of all that is answered Safe or Unsafe, whose labels are Safe, Unsafe, N/A.
        perception: The judge of perception, whose labels are A, B, C, D, N/A.
    """

    @staticmethod
    def collator(examples: Sequence[Example]) -> Answers:
        """Makes a batch of saved answers: questions whose only completion is the answer."""
        return Answers([(example.question, example.completions[0]) for example in examples])

    def __init__(self, alignment: Judge, perception: Judge) -> None:
        super().__init__()
        judges: dict[Capability, Judge] = {"alignment": alignment, "perception": perception}
        for name, judge in judges.items():
            labels = LABELS[name]
            if judge.labels != labels:
                raise ArgumentError(
                    f"{name}: its judge has the labels {', '.join(judge.labels)}; "
                    f"{', '.join(labels)} are needed, in this order"
                )
        self.alignment = alignment
        self.perception = perception

    def judge_of(self, capability: Capability) -> Judge | None:
        """The judge that reads a capability's answers; None where a rule does.

        Raises:
            ArgumentError: they are rated, not judged.
        """
        if capability == "rated":
            raise ArgumentError("LLaVABench's answers are rated, not judged: see callbacks.rate_responses")
        if capability in RULES:
            return None
        return self.perception if capability == "perception" else self.alignment

    def reader(self, capability: Capability) -> str:
        """What stands as judge in the verdicts of a capability: a judge's fingerprint, or a rule."""
        judge = self.judge_of(capability)
        return RULES[capability] if judge is None else judge.fingerprint

    def configure_model(self) -> None:
        """Loads both judges, once."""
        self.alignment.configure_model()
        self.perception.configure_model()

    def judge(self, responses: Sequence[Response], batch_size: int = BATCH_SIZE) -> list[Verdict]:
        """Reads answers to questions of any capability but ``rated``.

        Args:
            responses: the answers.
            batch_size: how many are read at once.

        Returns:
            A verdict a response, in the order given.
        """
        return self._read([(response.question, response.response) for response in responses], batch_size)

    def judged(self, answers: Sequence[tuple[Question, str]], batch_size: int = BATCH_SIZE) -> list[Verdict | Failure]:
        """Reads answers as :meth:`judge` does; one that raises an exception ends nothing.

        Args:
            answers: each the question and the answer's text.
            batch_size: how many are read at once.

        Returns:
            One an answer, in the order given: the verdict, or why there is none.
        """
        # Weights that can't be loaded are no answer's fault.
        for judge in {self.judge_of(question.capability) for question, _ in answers}:
            if judge is not None:
                judge.configure_model()
        there, failed = in_halves(
            range(len(answers)),
            lambda places: zip(places, self._read([answers[place] for place in places], batch_size), strict=True),
        )
        records: dict[int, Verdict | Failure] = {place: verdict for some in there for place, verdict in some}
        for place, reason in failed:
            records[place] = Failure(answers[place][0], f"the answer can't be judged ({reason})")
        return [records[place] for place in range(len(answers))]

    def valid(self, record: Mapping[str, Any], example: Example) -> bool:
        """Whether a verdict of before still holds: it is by this judge, and on this text.

        Args:
            record: of ``verdicts.jsonl``.
            example: the question, with the answer as its only completion.
        """
        try:
            verdict = Verdict.from_dict(record)
        except (KeyError, TypeError, ValueError):
            return False  # judged again
        text = example.completions[0]
        return verdict.judge == self.reader(example.question.capability) and verdict.is_of(text)

    def predict_step(self, batch: Answers, batch_idx: int) -> list[Verdict | Failure]:
        """The verdicts of a batch of saved answers, and the answers that can't be judged."""
        return self.judged(batch.answers)

    def _read(self, answers: Sequence[tuple[Question, str]], batch_size: int) -> list[Verdict]:
        read: dict[int, dict[str, float]] = {}
        for judge in (self.alignment, self.perception):
            places = [
                place for place, (question, _) in enumerate(answers) if self.judge_of(question.capability) is judge
            ]
            worded = [place for place in places if answers[place][1].strip()]
            rows = judge.judge([answers[place][1] for place in worded], batch_size).exp().tolist()
            certain = [float(label == NOT_APPLICABLE) for label in judge.labels]
            for place in places:
                read[place] = dict(zip(judge.labels, certain, strict=True))
            for place, row in zip(worded, rows, strict=True):
                read[place] = dict(zip(judge.labels, row, strict=True))
        verdicts = []
        for place, (question, text) in enumerate(answers):
            probabilities = read.get(place) or rules.apply_rule(question.capability, question.answer, text)
            label = max(probabilities, key=probabilities.__getitem__)
            by = self.reader(question.capability)
            verdicts.append(Verdict(question.id, label, probabilities, by, Verdict.fingerprint_of(text)))
        return verdicts

    def describe(self) -> dict[str, Any]:
        """Which judges read."""
        return {"alignment": self.alignment.fingerprint, "perception": self.perception.fingerprint}
