"""What the stages hand to each other: questions, responses and verdicts, each a line of JSON with a stable id.

The id of a question is written ``{data set}/{image}/{capability}/{prompt number}``, for example
``UnsafeConcepts/images/17.png/alignment/3``; about a concept's name alone the concept stands in the image's place
(``UnsafeConcepts/Swastika/alignment_text_only/0``). A response and a verdict carry the id of the question they belong
to. Nothing is ever matched by position.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, get_args

from safervlm.errors import RecordError, first_line
from safervlm.hashing import fingerprint
from safervlm.io.files import write_atomically
from safervlm.io.reading import json_text, numbered_jsonl, parse_json
from safervlm.protocol import Capability

# In a run folder: the answers.
RESPONSES = "responses.jsonl"
# The questions that have no answer, and why.
FAILED = "responses-failed.jsonl"
# What the judges read in the answers.
VERDICTS = "verdicts.jsonl"
# The answers that no judge could classify, and why.
UNJUDGED = "verdicts-failed.jsonl"
# JSON's kinds of values in words.
KINDS = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    type(None): "null",
}


def record_id(dataset: str, image: str, capability: str, prompt_number: int) -> str:
    """The id of a question (see the module's docstring for the scheme)."""
    return f"{dataset}/{image}/{capability}/{prompt_number}"


def _check(record: Mapping[str, Any], /, **kinds: type | tuple[type, ...]) -> None:
    """Raises a KeyError for a field that a record lacks, and a RecordError for a value of another type."""
    for name, kind in kinds.items():
        value = record[name]
        # True is no number, although Python's bool is an int.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            allowed = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(KINDS.get(each, "null") for each in allowed)
            raise RecordError(f"the field {name!r} must be {expected}, got {value!r:.80}")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image, or about a concept's name.

    Attributes:
        id: see :func:`record_id`.
        dataset: the data set's name, the first part of the id.
        image: the image's name within the data set (``images/17.png``); the concept for a question about its name.
        image_path: the local file that holds the image; None for a question about a name (a VLM that needs an image
            is shown a blank white one).
        capability: what the question measures.
        prompt_number: which of the capability's prompts it is, from 0.
        prompt: the question as the VLM is asked it, without any conversation template.
        category: one of the nine categories, or the name of the safe set.
        concept: what the image shows.
        answer: the right label: ``Safe`` or ``Unsafe``, a letter for perception, ``Yes`` or ``No`` for ``yes_no``; the
            expected answer for ``occurs``, the reference answer for ``rated``.
        context: what only the judge is told of the image (LLaVABench's caption).
        drawn: whether it is the one of an image's questions that the published evaluation draws.
    """

    id: str
    dataset: str
    image: str
    image_path: str | None
    capability: Capability
    prompt_number: int
    prompt: str
    category: str
    concept: str
    answer: str
    context: str = ""
    drawn: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something: the last two stand only in the records of an evaluation."""
        record = asdict(self)
        return {name: record[name] for name in record if record[name] or name not in ("context", "drawn")}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote, among other fields.

        Raises:
            KeyError: a field is missing.
            RecordError: a field has a value of another type.
        """
        _check(record, image_path=(str, type(None)), prompt_number=int, capability=str)
        _check(record, **dict.fromkeys(("id", "dataset", "image", "prompt", "category", "concept", "answer"), str))
        _check({"context": "", "drawn": False} | dict(record), context=str, drawn=bool)
        if record["capability"] not in get_args(Capability):
            raise RecordError(f"the field 'capability' must be one of the protocol's, got {record['capability']!r}")
        there = {field.name: record[field.name] for field in fields(cls) if field.name not in ("context", "drawn")}
        return cls(**there, context=record.get("context", ""), drawn=record.get("drawn", False))


@dataclass(frozen=True, slots=True)
class Example:
    """A question with the completions that an objective wants scored.

    Attributes:
        question: what is asked.
        completions: none to generate (measuring, PPO), one for SFT (the target), two for DPO (chosen, rejected).
    """

    question: Question
    completions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """A VLM's answer to a question.

    Attributes:
        question: the question, whole: a response file can be read and judged alone.
        response: the generated text, without special tokens.
        finish_reason: ``stop`` when the VLM ended its answer, ``length`` when the limit of new tokens did; ``refusal``
            when a server marks the answer as one, ``content_filter`` when its filter cut the answer, mostly to nothing.
            Any other is a server's own word (``eos``, ``end_turn``) for an answer that ended by itself.
        tokens: the number of generated tokens, the end token included; 0 where it is not known.
    """

    question: Question
    response: str
    finish_reason: str
    tokens: int

    @property
    def id(self) -> str:
        """The question's id."""
        return self.question.id

    def to_dict(self) -> dict[str, Any]:
        """The flat record of ``responses.jsonl``."""
        answer = {"response": self.response, "finish_reason": self.finish_reason, "tokens": self.tokens}
        return self.question.to_dict() | answer

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote, among other fields.

        Raises:
            KeyError: a field is missing.
            RecordError: a field has a value of another type.
        """
        _check(record, response=str, finish_reason=str, tokens=int)
        return cls(Question.from_dict(record), record["response"], record["finish_reason"], record["tokens"])


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that has no answer.

    Attributes:
        question: the question.
        reason: why, in one line.
    """

    question: Question
    reason: str

    @property
    def id(self) -> str:
        """The question's id."""
        return self.question.id

    def to_dict(self) -> dict[str, Any]:
        """The record of ``responses-failed.jsonl``."""
        return self.question.to_dict() | {"reason": self.reason}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote, among other fields.

        Raises:
            KeyError: a field is missing.
            RecordError: a field has a value of another type.
        """
        _check(record, reason=str)
        return cls(Question.from_dict(record), record["reason"])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge read in a response.

    Attributes:
        id: the question's id.
        label: the most probable label.
        probabilities: of every label, summing to 1.
        judge: the fingerprint of the judge's weights (see :func:`fingerprint`).
        answer: the fingerprint of the answer's text (:meth:`fingerprint_of`); empty in a file of version 0.1, which
            doesn't have it. Whether such a verdict is about the text that is there now, nobody can tell: whatever
            judges judges the text again, ``verify`` leaves the verdict out, and whatever makes tables of it says so
            in a line.
    """

    id: str
    label: str
    probabilities: dict[str, float]
    judge: str
    answer: str = ""

    @staticmethod
    def fingerprint_of(text: str) -> str:
        """What tells an answer's text from another; also where it can't be encoded (half a surrogate)."""
        return fingerprint(text.encode("utf-8", "surrogatepass"))

    def is_of(self, text: str) -> bool:
        """Whether the verdict is about this text; of a file of version 0.1 nobody knows."""
        return self.answer == self.fingerprint_of(text)

    def to_dict(self) -> dict[str, Any]:
        """The record of ``verdicts.jsonl``."""
        record = asdict(self)
        return record if self.answer else {name: record[name] for name in record if name != "answer"}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            KeyError: a field is missing.
            RecordError: a field has a value of another type, or is unknown; or the verdict contradicts itself: its
                probabilities are no numbers from 0 to 1 that sum to 1, or its label is not the most probable one.
        """
        names = [field.name for field in fields(cls)]
        if unknown := set(record) - set(names):
            raise RecordError(f"the field {min(unknown)!r} is unknown; a verdict has {', '.join(names)}")
        _check(record, id=str, label=str, judge=str)
        try:
            _check({"answer": "", **record}, probabilities=dict, answer=str)
        except RecordError as error:
            raise RecordError(f"the verdict on {record['id']!r}: {error}; judge again") from None
        verdict = cls(**record)
        if problem := verdict.contradiction():
            raise RecordError(f"the verdict on {verdict.id!r}: {problem}; judge again")
        return verdict

    def contradiction(self) -> str | None:
        """How the verdict contradicts itself, in one line; None where it doesn't."""
        if not self.probabilities:
            return "it has no probabilities"
        for label, value in self.probabilities.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -1e-3 <= value <= 1 + 1e-3:  # NaN is neither
                return f"the probability {value!r} of {label!r} is not a number from 0 to 1"
        if abs((total := sum(self.probabilities.values())) - 1) > 1e-3:
            return f"its probabilities sum to {total:.4g}, not 1"
        if self.probabilities.get(self.label, -1) < max(self.probabilities.values()):
            likely = max(self.probabilities, key=self.probabilities.__getitem__)
            return f"its label is {self.label!r}, but its most probable label is {likely!r}"
        return None


class Stored(Protocol):
    """A kind of record that a file of a run folder holds."""

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Reads a line of the file."""


Kind = TypeVar("Kind", bound=Stored)
Named = TypeVar("Named", Response, Verdict)


def read_records(path: str | Path, kind: type[Kind], torn: bool = False) -> list[Kind]:
    """The records of a run folder's file.

    Args:
        path: the JSONL file.
        kind: of the records, for example :class:`Response`.
        torn: whether the last line may be cut off, as its writer may have died (:func:`read_torn_jsonl`).

    Raises:
        RecordError: a line that is no such record: a field is missing, unknown or of another type. The message names
            file and line.
    """
    records = []
    for number, record in enumerate(read_torn_jsonl(Path(path)), 1) if torn else numbered_jsonl(path):
        try:
            records.append(kind.from_dict(record))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else first_line(error)
            name = f" ({record['id']})" if isinstance(record.get("id"), str) else ""
            raise RecordError(
                f"{path}, line {number}{name}: no {kind.__name__.lower()}: {reason}; correct or remove the line"
            ) from None
    return records


def by_id(path: Path, there: Iterable[Named]) -> dict[str, Named]:
    """Records by their ids.

    Args:
        path: the file that they are from, for the error.
        there: the records.

    Raises:
        RecordError: an id is there twice; the message names file and id.
    """
    records: dict[str, Named] = {}
    for record in there:
        if record.id in records:
            raise RecordError(f"{path}: {record.id!r} is there twice; remove one of the two lines")
        records[record.id] = record
    return records


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file (see :func:`safervlm.io.reading.numbered_jsonl`).

    Raises:
        RecordError: a line that is not a JSON object, naming file and line.
    """
    return (record for _, record in numbered_jsonl(path))


def read_torn_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file whose writer may have died in the middle of the last one.

    Raises:
        RecordError: another line is damaged; the message names file and line.
    """
    content = path.read_bytes()
    records = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x}); remove the line") from None
        record = parse_json(text, where, "remove the line")
        if not isinstance(record, dict):
            raise RecordError(f"{where}: not a JSON object: {text[:80]!r}; remove the line")
        records.append(record)
    return records


def to_line(record: Mapping[str, Any]) -> str:
    """The JSON line of a record, its newline included (see :func:`safervlm.io.reading.json_text`).

    Raises:
        RecordError: a number of the record is NaN or infinite; the message names its id.
    """
    return json_text(record, name=str(record.get("id", ""))) + "\n"


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as JSONL, whole or not at all."""
    write_atomically(path, lambda file: file.write_text("".join(map(to_line, records)), encoding="utf-8"))
