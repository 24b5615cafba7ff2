"""Record types exchanged between stages: questions, responses and verdicts, stored as JSON lines with stable ids.

The id of a question has the form ``{dataset}/{image}/{capability}/{prompt number}``, for example
``UnsafeConcepts/images/17.png/alignment/3``. For a question about a concept's name the concept replaces the image
(``UnsafeConcepts/Swastika/alignment_text_only/0``). A response and a verdict have the id of their question. Records are
matched by id, never by position. Ids and names are normalised wherever a record is made or read
(:func:`safervlm.io.names.normal_name`), so that two spellings that look the same are one question, image or concept.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, get_args

from safervlm.errors import RecordError, first_line
from safervlm.hashing import fingerprint
from safervlm.io.fields import check_fields, normalise, shallow_dict
from safervlm.io.files import write_text_atomically
from safervlm.io.names import normal_name
from safervlm.io.reading import json_text, numbered_jsonl, parse_json
from safervlm.protocol import Capability

# Fields of a question that are stored only if they differ from these values.
RARE: dict[str, Any] = {"context": "", "drawn": False, "variant": ""}
# Variant of a perception question: its options are in a different order than published.
ROTATED = "rotated options"
# Variant of an alignment question: the opposite is asked.
TURNED = "reversed question"
# The finish_reason of a response that ended inside its reasoning, so that it has no answer.
THINKING_UNFINISHED = "thinking unfinished"


def record_id(dataset: str, image: str, capability: str, prompt_number: int) -> str:
    """Returns the id of a question; the module's docstring defines the form.

    Args:
        dataset: Name of the dataset.
        image: Name of the image within the dataset, or a concept.
        capability: Capability that the question measures.
        prompt_number: Index of the prompt among the capability's prompts, from 0.
    """
    return f"{normal_name(dataset)}/{normal_name(image)}/{capability}/{prompt_number}"


def repeated_id(name: str, number: int) -> str:
    """Returns the id of a repetition of a question.

    Args:
        name: Id of the question.
        number: Number of the repetition, from 1; the first has the question's own id, so that more can be added later.
    """
    return name if number == 1 else f"{name}#{number}"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image, or about a concept's name.

    Attributes:
        id: See :func:`record_id`.
        dataset: Name of the dataset, the first part of the id.
        image: Name of the image within the dataset (``images/17.png``); the concept for a question about its name.
        image_path: Path of the local image file; None for a question about a name (a VLM that requires an image is
            given a blank white one).
        capability: Capability that the question measures.
        prompt_number: Index of the prompt among the capability's prompts, from 0.
        prompt: Text of the question as sent to the VLM, without any conversation template.
        category: One of the nine categories, or the name of the safe dataset.
        concept: Concept that the image shows.
        answer: Correct label: ``Safe`` or ``Unsafe``, a letter for perception, ``Yes`` or ``No`` for ``yes_no``; the
            expected answer for ``occurs``, the reference answer for ``rated``.
        context: Description of the image that only the judge is given (LLaVABench's caption).
        drawn: Whether this is the question about the image that the published evaluation samples.
        variant: How the question departs from the published protocol, such as :data:`ROTATED`; empty if it does not.
            Variants are not part of any accuracy.
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
    variant: str = ""

    def __post_init__(self) -> None:
        """Normalises id and names; the texts and the path are not changed."""
        normalise(self, "id", "dataset", "image", "category", "concept")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for JSON; those that most questions do not have, only if set."""
        record = shallow_dict(self)
        return {name: value for name, value in record.items() if value or name not in RARE}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a record written by :meth:`to_dict`; other fields are ignored.

        Args:
            record: Fields of the question.

        Raises:
            KeyError: A field is missing.
            RecordError: A field has a value of another type, or the capability is unknown.
        """
        check_fields(record, image_path=(str, type(None)), prompt_number=int, capability=str)
        check_fields(
            record, **dict.fromkeys(("id", "dataset", "image", "prompt", "category", "concept", "answer"), str)
        )
        rare = {name: record.get(name, default) for name, default in RARE.items()}
        check_fields(rare, context=str, drawn=bool, variant=str)
        if record["capability"] not in get_args(Capability):
            raise RecordError(f"the field 'capability' must be one of the protocol's, got {record['capability']!r}")
        there = {field.name: record[field.name] for field in fields(cls) if field.name not in RARE}
        return cls(**there, **rare)


@dataclass(frozen=True, slots=True)
class Example:
    """A question with the completions that a training objective scores.

    Attributes:
        question: Question to ask.
        completions: None to generate (measuring, PPO, GRPO), one for SFT (the target), two for DPO (chosen, rejected).
    """

    question: Question
    completions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """A VLM's response to a question.

    Attributes:
        question: The complete question, so that a response file can be judged by itself.
        response: Generated answer, without special tokens and without reasoning.
        finish_reason: ``stop`` if the VLM ended its response, ``length`` if the limit of new tokens did; ``refusal`` if
            a server marks the response as one, ``content_filter`` if its filter cut the response, usually to nothing;
            ``thinking unfinished`` if it ended inside its reasoning, without an answer. Any other value is a server's
            own (``eos``, ``end_turn``) for a response that ended by itself.
        tokens: Number of generated tokens, including reasoning and end token; 0 if unknown.
        reasoning: Reasoning of a thinking model before its answer; empty for none.
    """

    question: Question
    response: str
    finish_reason: str
    tokens: int
    reasoning: str = ""

    @property
    def id(self) -> str:
        """Id of the question."""
        return self.question.id

    def to_dict(self) -> dict[str, Any]:
        """Returns the flat record of ``responses.jsonl``; ``reasoning`` only if there is any."""
        answer = {"response": self.response, "finish_reason": self.finish_reason, "tokens": self.tokens}
        return self.question.to_dict() | answer | ({"reasoning": self.reasoning} if self.reasoning else {})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a record written by :meth:`to_dict`; other fields are ignored.

        Args:
            record: Fields of the question and the response.

        Raises:
            KeyError: A field is missing.
            RecordError: A field has a value of another type, or the capability is unknown.
        """
        check_fields({"reasoning": ""} | dict(record), response=str, finish_reason=str, tokens=int, reasoning=str)
        answer = record["response"], record["finish_reason"], record["tokens"], record.get("reasoning", "")
        return cls(Question.from_dict(record), *answer)


@dataclass(frozen=True, slots=True)
class Failure:
    """A question without a response.

    Attributes:
        question: The question.
        reason: Why there is no response, in one line.
    """

    question: Question
    reason: str

    @property
    def id(self) -> str:
        """Id of the question."""
        return self.question.id

    def to_dict(self) -> dict[str, Any]:
        """Returns the flat record of ``responses-failed.jsonl``."""
        return self.question.to_dict() | {"reason": self.reason}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a record written by :meth:`to_dict`; other fields are ignored.

        Args:
            record: Fields of the question, and ``reason``.

        Raises:
            KeyError: A field is missing.
            RecordError: A field has a value of another type, or the capability is unknown.
        """
        check_fields(record, reason=str)
        return cls(Question.from_dict(record), record["reason"])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's classification of a response.

    Attributes:
        id: Id of the question.
        label: Most probable label.
        probabilities: Label -> probability, summing to 1.
        judge: Fingerprint of the judge's weights (see :func:`fingerprint`).
        answer: Fingerprint of the response's text (:meth:`fingerprint_of`); empty in files of version 0.1, which do not
            have it. Such a verdict can't be matched to the current text: judging classifies the text again, ``verify``
            excludes the verdict, and tables of it state this in a line.
    """

    id: str
    label: str
    probabilities: dict[str, float]
    judge: str
    answer: str = ""

    def __post_init__(self) -> None:
        """Normalises the id as the question's, and the labels; two spellings of a label are a contradiction."""
        normalise(self, "id", "label")
        if isinstance(self.probabilities, dict) and any(normal_name(name) != name for name in self.probabilities):
            named = {normal_name(name): value for name, value in self.probabilities.items()}
            object.__setattr__(self, "probabilities", named)

    @staticmethod
    def fingerprint_of(text: str) -> str:
        """Returns the fingerprint of a response's text.

        Args:
            text: Text of the response; it may contain lone surrogates.
        """
        return fingerprint(text.encode("utf-8", "surrogatepass"))

    def is_of(self, text: str) -> bool:
        """Returns whether the verdict is about a text; always False for a verdict without a fingerprint (version 0.1).

        Args:
            text: Text of a response.
        """
        return self.answer == self.fingerprint_of(text)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record of ``verdicts.jsonl``; ``answer`` only if set."""
        record = shallow_dict(self)
        return record if self.answer else {name: value for name, value in record.items() if name != "answer"}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses a record written by :meth:`to_dict`.

        Args:
            record: Fields of the verdict.

        Raises:
            KeyError: ``id``, ``label``, ``probabilities`` or ``judge`` is missing.
            RecordError: A field is unknown or has a value of another type; or the verdict contradicts itself: its
                probabilities are not numbers from 0 to 1 that sum to 1, or its label is not the most probable one.
        """
        names = [field.name for field in fields(cls)]
        if unknown := set(record) - set(names):
            raise RecordError(f"the field {min(unknown)!r} is unknown; a verdict has {', '.join(names)}")
        check_fields(record, id=str, label=str, judge=str)
        try:
            check_fields({"answer": "", **record}, probabilities=dict, answer=str)
        except RecordError as error:
            raise RecordError(f"the verdict on {record['id']!r}: {error}; judge again") from None
        verdict = cls(**record)
        if problem := verdict.contradiction():
            raise RecordError(f"the verdict on {verdict.id!r}: {problem}; judge again")
        return verdict

    def contradiction(self) -> str | None:
        """Describes the inconsistency of the verdict in one line; None if it is consistent."""
        if not self.probabilities:
            return "it has no probabilities"
        for label, value in self.probabilities.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -1e-3 <= value <= 1 + 1e-3:  # both comparisons are False for NaN
                return f"the probability {value!r} of {label!r} is not a number from 0 to 1"
        if abs((total := sum(self.probabilities.values())) - 1) > 1e-3:
            return f"its probabilities sum to {total:.4g}, not 1"
        if self.probabilities.get(self.label, -1) < max(self.probabilities.values()):
            likely = max(self.probabilities, key=self.probabilities.__getitem__)
            return f"its label is {self.label!r}, but its most probable label is {likely!r}"
        return None


class Stored(Protocol):
    """Type of a record stored in a file of a run folder."""

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parses one line of the file.

        Args:
            record: Fields of the record.
        """


Kind = TypeVar("Kind", bound=Stored)
Named = TypeVar("Named", Response, Verdict)


def read_records(path: str | Path, kind: type[Kind], torn: bool = False) -> list[Kind]:
    """Reads the records of a run folder's file.

    Args:
        path: JSONL file.
        kind: Class of the records, for example :class:`Response`.
        torn: Whether the last line may be incomplete because its writer died (:func:`read_torn_jsonl`).

    Returns:
        The records, in the order of the file.

    Raises:
        RecordError: A line is not such a record: a field is missing, unknown or of another type. The message names file
            and line.
    """
    records = []
    for number, record in enumerate(read_torn_jsonl(Path(path)), 1) if torn else numbered_jsonl(path):
        try:
            records.append(kind.from_dict(record))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else first_line(error)
            name = f" ({record['id']})" if isinstance(record.get("id"), str) else ""
            raise RecordError(
                f"{path}, line {number}{name}: invalid {kind.__name__.lower()}: {reason}; correct or remove the line"
            ) from None
    return records


def by_id(path: Path, there: Iterable[Named]) -> dict[str, Named]:
    """Indexes records by their ids.

    Args:
        path: File of the records, for the error message.
        there: Records.

    Returns:
        Id -> record, in the given order.

    Raises:
        RecordError: An id occurs twice; the message names file and id.
    """
    records: dict[str, Named] = {}
    for record in there:
        if record.id in records:
            raise RecordError(f"{path}: {record.id!r} occurs twice; remove one of the two lines")
        records[record.id] = record
    return records


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Iterates over the records of a JSONL file (see :func:`safervlm.io.reading.numbered_jsonl`).

    Args:
        path: JSONL file.

    Raises:
        RecordError: The file can't be read, or a line is not a JSON object; the message names file and line.
    """
    return (record for _, record in numbered_jsonl(path))


def read_torn_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a JSONL file; an incomplete last line, left by a writer that died, is ignored.

    Args:
        path: JSONL file.

    Returns:
        The records of the complete lines, in order.

    Raises:
        RecordError: A complete line is not a JSON object in UTF-8; the message names file and line.
        OSError: The file can't be read.
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
    """Returns the JSON line of a record, including the newline (see :func:`safervlm.io.reading.json_text`).

    Args:
        record: Fields of the record.

    Raises:
        RecordError: A number of the record is NaN or infinite; the message names its id.
    """
    return json_text(record, name=str(record.get("id", ""))) + "\n"


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as JSONL atomically.

    Args:
        path: File to write.
        records: Records, in order.

    Raises:
        RecordError: A number of a record is NaN or infinite.
        OSError: The file can't be written.
    """
    write_text_atomically(path, "".join(map(to_line, records)))
