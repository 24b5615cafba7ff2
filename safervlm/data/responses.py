"""Saved responses to be judged: those of a run of this package, or files of the first implementation.

The first implementation's files are lists of ``{"prompt": ..., "image_fname": ..., "output": ...}``: one folder per VLM
(``{vlm}/{capability}/response_prompt_{n}.json``) or one file (``{set}_result.json``). They contain no ids, and the
order of their records is not reliable (see :func:`match_first_implementation`).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from safervlm.data.folders import files_below, left_out
from safervlm.data.loaders import Collator, limited
from safervlm.data.module import Parts, SaferData
from safervlm.errors import RecordError
from safervlm.io.names import normal_name, path_text
from safervlm.io.reading import read_json
from safervlm.io.tables import say
from safervlm.records import Example, Question, Response, by_id, read_records, write_jsonl
from safervlm.run_folder import RunFolder


def read_responses(path: str | Path, may_be_empty: bool = False) -> list[Response]:
    """Reads ``responses.jsonl``.

    Args:
        path: The file, or the run folder that contains it.
        may_be_empty: Whether to accept a file without responses. Every question of a run may have failed.

    Returns:
        The responses, in the order of the file.

    Raises:
        RecordError: The file is missing or empty, a record is not a response, or an id occurs twice (the message names
            it).
    """
    path = Path(path)
    file = RunFolder(path).responses if path.is_dir() else path
    if not file.is_file():
        raise RecordError(f"{file} is missing: a measurement writes it when it is complete; give its run folder")
    responses = list(by_id(file, read_records(file, Response)).values())
    if not responses and not may_be_empty:
        raise RecordError(f"{file}: is empty: it needs one response per line")
    return responses


def files_of_first_implementation(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Lists the response files in the folder of one VLM, and the skipped files by reason.

    Args:
        folder: Folder with all ``response_prompt_{n}.json``, which may be in subfolders.

    Raises:
        RecordError: A folder can't be read.
    """
    return files_below(
        folder, lambda name: fnmatchcase(name, "response_prompt_*.json"), "not named response_prompt_*.json"
    )


def read_first_implementation(path: str | Path) -> list[tuple[Path, int, dict[str, Any]]]:
    """Reads JSON files of the first implementation.

    Args:
        path: Folder of one VLM, of which all ``response_prompt_{n}.json`` are read, or one JSON file.

    Returns:
        For each record, its file, its number in the file (from 0) and the record.

    Raises:
        RecordError: There are no files or records, a file is not valid JSON, or a record is malformed (the message
            names it).
    """
    path = Path(path)
    files = files_of_first_implementation(path)[0] if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise RecordError(
            f"data.responses: no responses in {path}; give a run folder (it has responses.jsonl when its measurement "
            "is complete) or the first implementation's JSON"
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
        raise RecordError(f"data.responses: {path} has no records: it needs one record per response")
    return records


def match_first_implementation(
    records: Iterable[tuple[Path, int, dict[str, Any]]], questions: Sequence[Question]
) -> tuple[list[Response], list[Question]]:
    """Finds the question of each record by content: the text of the question and the image.

    A question about a concept's name is identified by its text alone, which contains the concept (those records have
    the name of the blank image). If two datasets have equal images, the dataset is the one named like the folder above
    the capability's folder. The position in the file is never used.

    Args:
        records: Records (see :func:`read_first_implementation`).
        questions: All questions that may have been asked.

    Returns:
        The responses in the order of the records, with ``finish_reason`` "stop" and 0 ``tokens`` because neither was
        recorded; and the questions whose output is null, which have no response to judge.

    Raises:
        RecordError: A record matches no question, several questions, or a question that another record has matched.
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
        image, prompt = normal_name(record["image_fname"]), _words(record["prompt"])
        found = about_names.get(prompt) or about_images.get((image, prompt), [])
        if not found:
            if prompt in prompts and image not in images:
                reason = f"the image {image!r} is not in the dataset"
            elif image in images:
                reason = f"the dataset asks nothing like {record['prompt']!r} about {image!r}"
            else:
                reason = f"the dataset has neither the question {record['prompt']!r} nor the image {image!r}"
            raise RecordError(
                f"{where}: {reason}; is it the dataset (and are these the capabilities) in data.questions?"
            )
        if len(found) > 1:
            found = [question for question in found if question.dataset == file.parent.parent.name] or found
        if len(found) > 1:
            candidates = " or ".join(question.id for question in found)
            raise RecordError(
                f"{where}: it may be a response to {candidates}: name a dataset in data.questions that asks one, or "
                "put the file into DATASET/CAPABILITY/"
            )
        question = found[0]
        if question.id in answered:
            raise RecordError(
                f"{where}: {question.id} has its response in {answered[question.id]}; name the responses of one VLM"
            )
        answered[question.id] = where
        if record["output"] is None:
            missing.append(question)
        else:
            responses.append(Response(question, record["output"], "stop", 0))
    return responses, missing


def _names(question: Question) -> list[str]:
    """Returns the possible names of an image: its name in the dataset, and its path relative to each parent folder."""
    path = Path(str(question.image_path)).resolve().parts
    names = ["/".join(path[start:]) for start in range(1, len(path))]
    names = [normal_name(name) for name in names]
    return [question.image, *(name for name in names if name.endswith(f"/{question.image}"))]


def _words(prompt: str) -> str:
    """Replaces each run of white space by one space, strips the ends, and composes characters."""
    return normal_name(" ".join(prompt.split()))


class SavedResponses(SaferData):
    """Saved responses, to be judged by safervlm.judging.panel.Panel (safervlm predict).

    The responses are written to the run folder as ``responses.jsonl``, unless the file exists, so that tables and
    reports find responses and verdicts together. Records of the first implementation with null instead of a response
    are skipped and count as neither correct nor incorrect. Their number is printed, as is that of the files in the
    folder that are not named ``response_prompt_{n}.json``.

    Args:
        responses: Responses to judge: a run folder or a responses.jsonl of this package, or files of the first
            implementation (the folder of one VLM, with one folder per capability, or one JSON file).
        questions: Dataset that the first implementation asked about, with all questions that may have been asked. Not
            needed for responses of this package, which contain their questions.
        collator: Function that turns examples into a batch. The command line sets the judges' collator.
        batch_size: Number of responses per step and process.
        num_workers: Number of processes that prepare batches in advance. Text needs none.
        limit: Maximum number of responses per dataset and capability. None judges all.

    Raises:
        ArgumentError: The limit is below 1, or ``responses`` is not a valid path.
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
        """Responses, limited, and the questions without a response (null in the file).

        Raises:
            RecordError: A record can't be read or matched with its question. The message names it.
        """
        responses, missing = self.all_answers
        return limited(responses, self.limit, lambda each: (each.question.dataset, each.question.capability)), missing

    @property
    def has_ids(self) -> bool:
        """Whether the responses are files of this package, not of the first implementation."""
        return self.path.suffix == ".jsonl" or RunFolder(self.path).responses.is_file()

    @cached_property
    def all_answers(self) -> tuple[list[Response], list[Question]]:
        """As :attr:`answers`, but without the limit.

        Raises:
            RecordError: The records have no ids, and no dataset is named that they may be responses to.
        """
        if self.has_ids:
            return read_responses(self.path), []
        records = read_first_implementation(self.path)
        if self.questions is None:
            raise RecordError(
                f"data.questions: {self.path} contains no ids; name the dataset that was asked, such as "
                "safervlm.data.unsafe_concepts.UnsafeConcepts"
            )
        asked = [example.question for example in self.questions.parts.predict]
        return match_first_implementation(records, asked)

    def prepare_data(self) -> None:
        """Writes the responses to the run folder, on one process; reports missing responses and skipped files.

        Raises:
            RecordError: The run folder contains other responses, or the responses can't be read.
        """
        if self.questions is not None:
            self.questions.prepare_data()
        responses, missing = self.answers
        if missing:
            total = len(responses) + len(missing)
            say(f"{len(missing)} of {total} responses are missing (output null) and excluded")
        skipped = {} if self.has_ids or self.path.is_file() else files_of_first_implementation(self.path)[1]
        if line := left_out(str(self.path), skipped):
            say(line)
        if self.trainer is None:
            return
        file = RunFolder(self.trainer.default_root_dir).responses
        if not file.exists():
            write_jsonl(file, [response.to_dict() for response in responses])
        elif read_responses(file) != responses:
            hint = "" if self.limit is None else f" with data.limit {self.limit}"
            raise RecordError(f"{file} contains other responses than {self.path}{hint}: use another run folder (--run)")

    def image_files(self) -> dict[str, str]:
        """Returns no files: judges of responses use no images, and image paths in external records are not opened."""
        return {}

    def load(self) -> Parts:
        """Builds one example per response: its question, and the response as the only completion.

        Responses of the capability ``rated`` are excluded: they are rated by another model, not classified by a judge.
        """
        responses = [response for response in self.answers[0] if response.question.capability != "rated"]
        return Parts(predict=[Example(response.question, (response.response,)) for response in responses])
