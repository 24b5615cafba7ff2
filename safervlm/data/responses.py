"""Saved answers, to be judged: ours, or those that the first implementation wrote.

The first implementation's files are lists of ``{"prompt": ..., "image_fname": ..., "output": ...}``, a folder a VLM
(``{vlm}/{capability}/response_prompt_{n}.json``) or one file (``{set}_result.json``). They hold no ids, and the order
of their records isn't to be relied on (see :func:`match_first_implementation`).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safervlm.data.loaders import Collator, limited
from safervlm.data.module import Parts, SaferData
from safervlm.errors import RecordError
from safervlm.io.names import path_text
from safervlm.io.reading import read_json
from safervlm.io.tables import say
from safervlm.records import RESPONSES, Example, Question, Response, by_id, read_records, write_jsonl


def read_responses(path: str | Path, may_be_empty: bool = False) -> list[Response]:
    """Reads ``responses.jsonl``.

    Args:
        path: the file, or the run folder that holds it.
        may_be_empty: whether a file without a response is fine: every question of the run may have failed.

    Raises:
        RecordError: the file is missing or empty, a record isn't a response, or an id is there twice, naming it.
    """
    path = Path(path)
    file = path / RESPONSES if path.is_dir() else path
    if not file.is_file():
        raise RecordError(f"{file} is missing: a measurement writes it when it is complete; give its run folder")
    responses = list(by_id(file, read_records(file, Response)).values())
    if not responses and not may_be_empty:
        raise RecordError(f"{file}: is empty: it needs a response a line")
    return responses


def read_first_implementation(path: str | Path) -> list[tuple[Path, int, dict[str, Any]]]:
    """Reads the first implementation's JSON.

    Args:
        path: a VLM's folder, all of whose ``response_prompt_{n}.json`` are read, or one JSON file.

    Returns:
        The file and number, from 0, of each record, and the record.

    Raises:
        RecordError: nothing to read, no JSON, or a record of another form, naming it.
    """
    path = Path(path)
    files = sorted(path.rglob("response_prompt_*.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise RecordError(
            f"data.responses: no answers in {path}; give a run folder (it has {RESPONSES} when its measurement is "
            "complete) or the first implementation's JSON"
        )
    records = []
    for file in files:
        content = read_json(file)
        if not isinstance(content, list):
            raise RecordError(f"{file}: not a list of records")
        for number, record in enumerate(content):
            where = f"{file}, record {number}"
            fields = record if isinstance(record, dict) else {}
            for name in "prompt", "image_fname":
                if not isinstance(fields.get(name), str):
                    raise RecordError(f"{where}: the field {name!r} must be a text, got {fields.get(name)!r}")
            if "output" not in fields or not isinstance(fields["output"], str | None):
                raise RecordError(f"{where}: the field 'output' must be a text or null, got {fields.get('output')!r}")
            records.append((file, number, fields))
    if not records:
        raise RecordError(f"data.responses: {path} has no records: it needs a record an answer")
    return records


def match_first_implementation(
    records: Iterable[tuple[Path, int, dict[str, Any]]], questions: Sequence[Question]
) -> tuple[list[Response], list[Question]]:
    """Finds the question that each record answers, by content: what was asked, and about which image.

    A question about a concept's name is found by its words alone, for the concept is one of them (those records carry
    the blank image's name). Of two sets with equal images that is meant whose name the folder above the capability's
    has. The position in the file is never used.

    Args:
        records: see :func:`read_first_implementation`.
        questions: all that may have been asked.

    Returns:
        The responses, with ``finish_reason`` "stop" and 0 ``tokens`` (neither was recorded), in the order of the
        records; and the questions whose output is null: an answer that was never given is no answer to be judged.

    Raises:
        RecordError: a record that answers no question, several, or one that another record answers.
    """
    about_images: dict[tuple[str, str], list[Question]] = defaultdict(list)
    about_names: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        if question.capability == "alignment_text_only":
            about_names[_words(question.prompt)].append(question)
        else:
            for name in _names(question):
                about_images[name, _words(question.prompt)].append(question)
    images = {image for image, _ in about_images}
    prompts = {prompt for _, prompt in about_images}

    responses, missing = [], []
    answered: dict[str, str] = {}
    for file, number, record in records:
        where = f"{file}, record {number}"
        image, prompt = record["image_fname"], _words(record["prompt"])
        found = about_names.get(prompt) or about_images.get((image, prompt), [])
        if not found:
            if prompt in prompts and image not in images:
                reason = f"the image {image!r} is not in the data set"
            elif image in images:
                reason = f"the data set asks nothing like {record['prompt']!r} about {image!r}"
            else:
                reason = f"the data set has neither the question {record['prompt']!r} nor the image {image!r}"
            raise RecordError(f"{where}: {reason}; is it the set (and are these the capabilities) in data.questions?")
        if len(found) > 1:
            found = [question for question in found if question.dataset == file.parent.parent.name] or found
        if len(found) > 1:
            candidates = " or ".join(question.id for question in found)
            raise RecordError(
                f"{where}: it may answer {candidates}: name a data set in data.questions that asks one, or put the "
                "file into DATA_SET/CAPABILITY/"
            )
        question = found[0]
        if question.id in answered:
            raise RecordError(
                f"{where}: {question.id} has its answer in {answered[question.id]}; give the answers of one VLM"
            )
        answered[question.id] = where
        if record["output"] is None:
            missing.append(question)
        else:
            responses.append(Response(question, record["output"], "stop", 0))
    return responses, missing


def _names(question: Question) -> list[str]:
    """What an image may be called: its name in the set, or its path from any folder above it (an export's names)."""
    path = Path(str(question.image_path)).resolve().parts
    names = ["/".join(path[start:]) for start in range(1, len(path))]
    return [question.image, *(name for name in names if name.endswith(f"/{question.image}"))]


def _words(prompt: str) -> str:
    """The prompt with any white space between words made one blank."""
    return " ".join(prompt.split())


class SavedResponses(SaferData):
    """Saved answers, to be judged by safervlm.judging.panel.Panel (safervlm predict).

    The run folder gets the answers as ``responses.jsonl`` where it isn't where they come from, so that tables and
    reports find answers and verdicts together. Where the first implementation saved null instead of an answer, the
    record is left out, neither right nor wrong; how many there are is printed.

    Args:
        responses: Answers of ours (a run folder or a responses.jsonl), or of the first implementation: the folder of
            one VLM, which holds a folder a capability, or one JSON file.
        questions: The data set that the first implementation asked about, with all that it may have asked; not
            needed for answers of ours, which carry their questions.
        collator: Makes a batch of answers; the panel's, set by the command line.
        batch_size: Answers a step and process.
        num_workers: Processes that prepare batches ahead; text needs none.
        limit: Judges this many answers of each data set and capability; None judges all.

    Raises:
        RecordError: a record that can't be read or matched with its question, naming it.
    """

    def __init__(
        self,
        responses: str,
        questions: SaferData | None = None,
        collator: Collator | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(collator, batch_size, num_workers)
        self.limit = limit
        limited((), limit, hash)
        self.path = Path(path_text("data.responses", responses))
        self.questions = questions

    @cached_property
    def answers(self) -> tuple[list[Response], list[Question]]:
        """The responses, and the questions that have none (null instead of an answer)."""
        responses, missing = self.all_answers
        return limited(responses, self.limit, lambda each: (each.question.dataset, each.question.capability)), missing

    @cached_property
    def all_answers(self) -> tuple[list[Response], list[Question]]:
        """As :attr:`answers`, not limited."""
        if self.path.suffix == ".jsonl" or (self.path / RESPONSES).is_file():
            return read_responses(self.path), []
        records = read_first_implementation(self.path)
        if self.questions is None:
            raise RecordError(
                f"data.questions: {self.path} holds no ids; name the data set it answers, such as "
                "safervlm.data.unsafe_concepts.UnsafeConcepts"
            )
        asked = [example.question for example in self.questions.parts.predict]
        return match_first_implementation(records, asked)

    def prepare_data(self) -> None:
        """Puts the answers into the run folder, on one process, and says how many are missing.

        Raises:
            RecordError: the run folder holds other answers.
        """
        if self.questions is not None:
            self.questions.prepare_data()
        responses, missing = self.answers
        if missing:
            total = len(responses) + len(missing)
            say(f"{len(missing)} of {total} answers are missing (output null) and left out")
        if self.trainer is None:
            return
        file = Path(self.trainer.default_root_dir) / RESPONSES
        if not file.exists():
            write_jsonl(file, [response.to_dict() for response in responses])
        elif read_responses(file) != responses:
            hint = "" if self.limit is None else f" with data.limit {self.limit}"
            raise RecordError(f"{file} holds other answers than {self.path}{hint}: use another run folder (--run)")

    def image_files(self) -> dict[str, str]:
        """None: a judge of answers sees no image, and those that somebody else's records name are not read."""
        return {}

    def load(self) -> Parts:
        """An example an answer that is judged, not rated: its question, and the answer as the only completion."""
        responses = [response for response in self.answers[0] if response.question.capability != "rated"]
        return Parts(predict=[Example(response.question, (response.response,)) for response in responses])
