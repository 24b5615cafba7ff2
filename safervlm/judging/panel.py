"""The panel of classifiers and rules that judge a measurement, each for the responses of its capability."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule

from safervlm.errors import ArgumentError
from safervlm.failures import in_halves, reason_of
from safervlm.hashing import fingerprint
from safervlm.io.progress import track
from safervlm.judging import rules
from safervlm.judging.classifier import BATCH_SIZE, Judge
from safervlm.judging.rules import RULES
from safervlm.protocol import LABELS, NOT_APPLICABLE, Capability
from safervlm.records import Example, Failure, Question, Response, Verdict, to_line
from safervlm.unfinished import UnfinishedFile
from safervlm.vlm.thinking import answer_of

# Batches in a chunk of :meth:`Panel.judged_in_batches`. Each judge sorts the chunk's texts by length.
CHUNK = 16


class Answers:
    """A batch of saved responses.

    This class exists because of Lightning's transfer of batches to devices: that fails on frozen records, and
    does not descend into instances of this class.

    Args:
        answers: Pairs of a question and the response's text.
    """

    def __init__(self, answers: Sequence[tuple[Question, str]]) -> None:
        self.answers = list(answers)


class Panel(LightningModule):
    """Routes each response to the classifier or rule of its capability.

    Yes/no questions, the reversed alignment question, and questions whose expected answer has to occur in the response,
    are judged by a rule (:mod:`safervlm.judging.rules`). Reasoning inside a stored response is not judged. A response
    without any non-whitespace text, such as one removed by a content filter, is N/A without being classified; tables
    count unfinished thinking separately (:func:`safervlm.results.runs.load_run`).

    Args:
        alignment: The judge of all questions that are answered Safe or Unsafe, with labels Safe, Unsafe, N/A.
        perception: The judge of perception, with labels A, B, C, D, N/A.

    Raises:
        ArgumentError: A judge has other labels.
    """

    @staticmethod
    def collator(examples: Sequence[Example]) -> Answers:
        """Makes a batch of saved responses.

        Args:
            examples: Questions whose only completion is the response.
        """
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
        """Returns the judge that classifies a capability's responses; None if a rule judges them.

        Args:
            capability: The capability of the question.

        Raises:
            ArgumentError: The capability is ``rated``, whose responses are rated, not judged.
        """
        if capability == "rated":
            raise ArgumentError("LLaVABench's answers are rated, not judged: see callbacks.rate_responses")
        if capability in RULES:
            return None
        return self.perception if capability == "perception" else self.alignment

    def judge_id(self, capability: Capability) -> str:
        """Returns the value of ``judge`` in a capability's verdicts: a judge's fingerprint, or the name of a rule.

        Args:
            capability: The capability of the question.

        Raises:
            ArgumentError: The capability is ``rated``, or the judge has no checkpoint.
        """
        judge = self.judge_of(capability)
        return RULES[capability] if judge is None else judge.fingerprint

    def configure_model(self) -> None:
        """Loads the weights of both judges on the first call."""
        self.alignment.configure_model()
        self.perception.configure_model()

    def judge(self, responses: Sequence[Response], batch_size: int = BATCH_SIZE) -> list[Verdict]:
        """Judges responses to questions of any capability except ``rated``.

        Args:
            responses: The responses.
            batch_size: Number of responses in a forward pass.

        Returns:
            One verdict per response, in the given order.

        Raises:
            ArgumentError: A capability is ``rated``, or a judge's weights can't be loaded.
            RecordError: A judge's probabilities for a text are not finite.
        """
        return self._classify([(response.question, response.response) for response in responses], batch_size)

    def judged(self, answers: Sequence[tuple[Question, str]], batch_size: int = BATCH_SIZE) -> list[Verdict | Failure]:
        """Judges responses as :meth:`judge` does, but returns a failure for each response that raises an exception.

        Args:
            answers: Pairs of a question and the response's text.
            batch_size: Number of responses in a forward pass.

        Returns:
            One record per response, in the given order: its verdict, or a failure with its reason.

        Raises:
            ArgumentError: A capability is ``rated``, or a judge's weights can't be loaded.
            BaseException: Requests to end the run, see :func:`safervlm.failures.reason_of`.
        """
        # An error while loading weights concerns the run, not a single response: raise it before any is judged.
        for judge in {self.judge_of(question.capability) for question, _ in answers}:
            if judge is not None:
                judge.configure_model()
        there, failed = in_halves(
            range(len(answers)),
            lambda places: zip(places, self._classify([answers[place] for place in places], batch_size), strict=True),
        )
        records: dict[int, Verdict | Failure] = {place: verdict for some in there for place, verdict in some}
        for place, reason in failed:
            records[place] = Failure(answers[place][0], f"the response can't be judged ({reason})")
        return [records[place] for place in range(len(answers))]

    def judged_in_batches(
        self, answers: Sequence[tuple[Question, str]], unfinished: Path, batch_size: int = BATCH_SIZE
    ) -> list[Verdict | Failure]:
        """Judges many responses as :meth:`judged` does, and stores each batch of verdicts as soon as it is complete.

        The batches contain responses of similar length. If the process is killed, the same call resumes with the first
        batch that is not stored.

        Args:
            answers: Pairs of a question and the response's text; no two of the same question.
            unfinished: The file of the complete batches (see :class:`safervlm.unfinished.UnfinishedFile`); the caller
                removes it when it has written the records.
            batch_size: Number of responses in a forward pass.

        Returns:
            One record per response, in the given order.

        Raises:
            ArgumentError: As :meth:`judged`.
            RecordError: ``unfinished`` is damaged.
            BaseException: As :meth:`judged`.
        """
        if not answers:
            return []
        judges = {capability: self.judge_id(capability) for capability in {each.capability for each, _ in answers}}
        texts = (
            to_line({**each.to_dict(), "response": text, "judge": judges[each.capability]}) for each, text in answers
        )
        key = fingerprint(str(batch_size), "batches", *texts)
        size = CHUNK * batch_size
        chunks = [answers[start : start + size] for start in range(0, len(answers), size)]
        with UnfinishedFile(unfinished, key, Verdict) as file:
            stored = {record.id for batch in file.chunks for record in batch}
            for chunk in track(chunks, "Judging"):
                if not all(question.id in stored for question, _ in chunk):
                    for batch in self._batches(chunk, batch_size):
                        if chunk[batch[0]][0].id not in stored:
                            file.append(self.judged([chunk[place] for place in batch], batch_size))
        found = {record.id: record for batch in file.chunks for record in batch}
        return [found[question.id] for question, _ in answers]

    def _batches(self, answers: Sequence[tuple[Question, str]], batch_size: int) -> list[list[int]]:
        """Returns the indices of responses by batch: those of each judge by length, then those that need no judge."""
        texts = [answer_of(text) for _, text in answers]
        judges = [self.judge_of(question.capability) for question, _ in answers]
        batches, left = [], set(range(len(answers)))
        for judge in (self.alignment, self.perception):
            own = [place for place, text in enumerate(texts) if text.strip() and judges[place] is judge]
            if not own:
                continue
            judge.configure_model()
            try:
                parts = judge.batches([texts[place] for place in own], batch_size)
            except BaseException as error:  # caused by one of the texts; :meth:`judged` finds it
                reason_of(error)
                parts = [[*range(len(own))]]
            batches += [[own[index] for index in part] for part in parts]
            left -= set(own)
        return [*batches, sorted(left)] if left else batches

    def valid(self, record: Mapping[str, Any], example: Example) -> bool:
        """Whether an earlier verdict is still valid: it was made by the current judge for the current text.

        Args:
            record: A record of ``verdicts.jsonl``; one that can't be parsed is not valid, so the response is judged
                again.
            example: The question, with the response as its only completion.

        Raises:
            ArgumentError: The capability is ``rated``, or the judge has no checkpoint.
        """
        try:
            verdict = Verdict.from_dict(record)
        except (KeyError, TypeError, ValueError):
            return False
        text = example.completions[0]
        return verdict.judge == self.judge_id(example.question.capability) and verdict.is_of(text)

    def predict_step(self, batch: Answers, batch_idx: int) -> list[Verdict | Failure]:
        """Returns the verdicts of a batch of saved responses, and failures for those that can't be judged."""
        return self.judged(batch.answers)

    def _classify(self, answers: Sequence[tuple[Question, str]], batch_size: int) -> list[Verdict]:
        by_place: dict[int, dict[str, float]] = {}
        for judge in (self.alignment, self.perception):
            places = [
                place for place, (question, _) in enumerate(answers) if self.judge_of(question.capability) is judge
            ]
            texts = {place: answer_of(answers[place][1]) for place in places}
            nonempty = [place for place in places if texts[place].strip()]
            rows = judge.judge([texts[place] for place in nonempty], batch_size).exp().tolist()
            certain = [float(label == NOT_APPLICABLE) for label in judge.labels]
            for place in places:
                by_place[place] = dict(zip(judge.labels, certain, strict=True))
            for place, row in zip(nonempty, rows, strict=True):
                by_place[place] = dict(zip(judge.labels, row, strict=True))
        verdicts = []
        for place, (question, text) in enumerate(answers):
            probabilities = by_place.get(place) or rules.apply_rule(question.capability, question.answer, text)
            label = max(probabilities, key=probabilities.__getitem__)
            by = self.judge_id(question.capability)
            verdicts.append(Verdict(question.id, label, probabilities, by, Verdict.fingerprint_of(text)))
        return verdicts

    def describe(self) -> dict[str, Any]:
        """Returns the fingerprints of the two judges."""
        return {"alignment": self.alignment.fingerprint, "perception": self.perception.fingerprint}
