"""Evaluation datasets: MME, MM-Vet, LLaVABench, SMID, NSFW and custom ones, all implemented by one class.

A dataset is a table (TSV as published by OpenCompass, CSV or JSONL) with one question per row, or a folder of images.
The names of its columns are set in a YAML file. A row's image is stored in the table as base64, as the ``index`` of the
row that contains it, or as the path of a file relative to the table's folder::

    index  image           question                                     answer  category   image_path
    0      /9j/4AAQSkZ...  Is there a knife? Please answer yes or no.   Yes     existence  images/1.png
    1      0               Is there a kite? Please answer yes or no.    No      existence  images/1.png

A folder contains ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and the other columns, or one folder of
images per label (``safe/``, ``unsafe/``).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from safervlm.addresses import has_user, is_address, public
from safervlm.data.copies import copy_of, update_copy
from safervlm.data.embedded import embedded, images_folder, write_images, written_images
from safervlm.data.folders import files_below, left_out
from safervlm.data.image_folders import ImageRecord, named_file, spread
from safervlm.data.loaders import Collator
from safervlm.data.module import Parts, SaferData
from safervlm.data.sources import Download, check_download, fetch, on_the_hub, save_table
from safervlm.data.tables import read_rows
from safervlm.errors import ArgumentError, RecordError, explained
from safervlm.hashing import fingerprint
from safervlm.io.names import label_names, normal_name, not_empty, path_text, set_name
from safervlm.io.tables import say
from safervlm.protocol import ALIGNMENT_QUESTIONS, NOT_APPLICABLE, SAFE, UNSAFE, Capability, published_draw
from safervlm.records import Example, record_id

__all__ = ["Benchmark", "on_the_hub"]

# Rules that determine whether a response is correct. All but "safety" are capabilities of the protocol.
Answers = Literal["safety", "yes_no", "occurs", "rated"]
# Columns of a folder's metadata that are used if the configured image column is missing.
FILE_COLUMNS = ("file_name", "image_filename")


class Benchmark(SaferData):
    """The questions of an evaluation dataset (safervlm predict). The module describes the supported formats.

    Args:
        name: Name of the dataset, the first component of its record ids.
        source: Dataset to read: a TSV, CSV or JSONL file, a folder of images, an https address of such a file, or the
            name ``owner/name`` or ``owner/name@revision`` of a dataset on the Hub. Downloads are kept in ``cache_dir``.
            The query string of an address is used only for the request; its hash is recorded.
        about: Description of the dataset and its origin, appended to the error message if the dataset is unavailable.
        md5: Published MD5 checksum of the file, checked if ``source`` is an address.
        answers: Rule for whether a response is correct. ``safety``: the judge classifies the response as the
            image's label, Safe or Unsafe. ``yes_no``: the response begins with the label, Yes or No, by MME's rule.
            ``occurs``: the label occurs in the response. ``rated``: another model rates the response in comparison with
            the label, a reference answer.
        label_column: Column with the correct answer.
        question_column: Column with the questions. None, allowed only for ``safety``, uses the five alignment
            questions.
        image_column: Column with the images: base64, the ``index`` of the row that contains the image, or the path of a
            file relative to the table.
        name_column: Column with the name of the image, the same in all rows about one image. By default, the name is
            the ``index`` of the row that contains the image, or its file.
        category_column: Column to group results by. For ``yes_no`` it is MME's task.
        context_column: Column with text that only the judge of ``rated`` receives.
        unsafe: Labels that mean Unsafe, compared without regard to case. In YAML, yes, no, on, off, true, false, null
            and dates need quotes.
        safe: Labels that mean Safe, compared without regard to case.
        prompts: Which of the five alignment questions to ask. ``drawn`` asks the one that the published evaluation
            samples for an image; ``all`` asks all five.
        cache_dir: Folder in which downloads, and images stored in a table, are kept.
        limit: Maximum number of images, spread over the categories. None uses all images.
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of questions per step and process. ``auto`` starts with 256 and halves the number until a
            batch fits into the memory.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.
        download: Limits of the download of a file from the web.

    Raises:
        ArgumentError: An argument is out of its range, a label means both Unsafe and Safe, or no label is given.
    """

    def __init__(
        self,
        name: str,
        source: str,
        about: str = "",
        md5: str | None = None,
        answers: Answers = "safety",
        label_column: str = "label",
        question_column: str | None = None,
        image_column: str = "image",
        name_column: str | None = None,
        category_column: str | None = None,
        context_column: str | None = None,
        unsafe: Sequence[str | int | float | bool | None] = ("1", "unsafe"),
        safe: Sequence[str | int | float | bool | None] = ("0", "safe"),
        prompts: Literal["all", "drawn"] = "drawn",
        cache_dir: str = "~/.cache/safervlm",
        limit: int | None = None,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
        download: Download = Download(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(collator, batch_size, num_workers)
        name = set_name("data.name", name)
        if limit is not None and limit < 1:
            raise ArgumentError(f"data.limit: at least 1, or null, got {limit}")
        if answers != "safety" and question_column is None:
            raise ArgumentError(f"data.question_column: {answers} needs the column with the questions; name it")
        meanings = {UNSAFE: label_names("data.unsafe", unsafe), SAFE: label_names("data.safe", safe)}
        lower = [label.lower() for meant in meanings.values() for label in meant]
        if set(map(str.lower, meanings[UNSAFE])) & set(map(str.lower, meanings[SAFE])):
            raise ArgumentError(
                f"data.unsafe: {meanings[UNSAFE]} and data.safe: {meanings[SAFE]} have a label in common; "
                "remove it from one of them"
            )
        if not lower:
            raise ArgumentError("data.unsafe: it and data.safe are empty: name the labels of each")
        path_text("data.cache_dir", cache_dir)
        if not re.match(r"https?://", source, re.IGNORECASE):
            path_text("data.source", source)
        elif has_user(source) or re.search(r"\s", source):
            raise ArgumentError(
                f"data.source: {public(source.split()[0])} contains a user name, a password or white space and is not "
                "requested: download the file, and name the copy"
            )
        self.label_column, self.image_column = _column("label", label_column), _column("image", image_column)
        self.question_column, self.name_column = _column("question", question_column), _column("name", name_column)
        self.category_column = _column("category", category_column)
        self.context_column = _column("context", context_column)
        if md5 is not None:
            not_empty("data.md5", md5)
        self.dataset, self.source, self.about, self.md5, self.answers = name, source, about, md5, answers
        self.labels = {label.lower(): meaning for meaning, meant in meanings.items() for label in meant}
        self.prompts, self.download = prompts, download
        self.cache = Path(cache_dir).expanduser()
        self.limit = limit

    @property
    def capability(self) -> Capability:
        """Capability that the questions measure."""
        return "generalisation" if self.answers == "safety" else self.answers

    # --- files --------------------------------------------------------------------------------------------------------

    @property
    def remote(self) -> Literal["web", "hub", None]:
        """Where the source is downloaded from; None for a local file or folder."""
        if is_address(self.source):
            return "web"
        return "hub" if on_the_hub(self.source) else None

    @property
    def file(self) -> Path:
        """Path of the local table or folder."""
        if self.remote == "web":
            with explained(
                f"data.source: {public(self.source)!r} is not an address", "correct it", ValueError, error=ArgumentError
            ):
                name = Path(urlsplit(self.source).path)
            return self.cache / f"{name.stem}-{fingerprint(public(self.source))[:8]}{name.suffix}"
        if self.remote == "hub":
            return copy_of(self.source, self.cache, ".jsonl")
        return Path(self.source).expanduser()

    def prepare_data(self) -> None:
        """Downloads the table if it is missing, and writes images stored in it to files; runs on one process.

        Raises:
            RecordError: The dataset is unavailable. The message includes ``about``.
            ArgumentError: The source is not a valid address, or the cache folder can't be created.
        """
        try:
            if self.remote == "web":
                if not self.file.exists():
                    fetch(self.source, self.file, self.download)
                check_download(self.file, self.md5, public(self.source))
            elif self.remote == "hub":
                update_copy(self.source, self.cache, "by data.source", save_table, ".jsonl")
            elif not self.file.exists():
                _ = self.rows  # raises an error that states what is missing
        except RecordError as error:
            raise RecordError(f"{error}" + (f" ({self.dataset}: {self.about})" if self.about else "")) from None
        if self.embedded:
            write_images(self.images_folder, self.dataset, self.embedded)
        if self.file.is_dir():
            self._say_left_out()

    @cached_property
    def embedded(self) -> dict[int, str]:
        """Base64 text of the images stored in the table, by row position."""
        if not self.file.is_file():
            return {}
        return embedded([row.get(self.image_column, "") for row in self.rows])

    @cached_property
    def images_folder(self) -> Path:
        """Folder in which images stored in the table are kept as files."""
        return images_folder(self.cache, self.dataset, self.file, self.image_column)

    def _say_left_out(self) -> None:
        """Reports the files in the folder about which no question is asked."""
        images, others = files_below(self.file)
        asked = {row.get(self.image_column, "").strip() for row in self.rows}
        names = [image.relative_to(self.file).as_posix() for image in images]
        why = "in no label's folder" if self.table is None else f"not named in {self.table.name}"
        others[why] = [name for name in names if name not in asked]
        if self.table is not None:
            others = {reason: [name for name in found if name != self.table.name] for reason, found in others.items()}
        if line := left_out(self.dataset, others):
            say(line)

    @cached_property
    def table(self) -> Path | None:
        """File with the rows; None for a folder with one folder of images per label."""
        if not self.file.is_dir():
            return self.file
        return next((file for name in ("metadata.jsonl", "metadata.csv") if (file := self.file / name).is_file()), None)

    @cached_property
    def numbered_rows(self) -> list[tuple[int, dict[str, str]]]:
        """Rows, each with its line number in the table (0 for images in folders by label).

        Raises:
            RecordError: The source is missing, has no rows, or is a table that can't be read.
        """
        file = self.file
        if not file.exists():
            raise RecordError(
                f"data.source: there is no {file}: name a file, a folder, or owner/name of the Hub (where no folder "
                "here is called as the owner)"
            )
        rows = self._rows_by_label() if self.table is None else read_rows(self.table)
        if not rows:
            raise RecordError(
                f"data.source: {self.table or file} contains no rows; a folder needs metadata.jsonl, metadata.csv, or "
                "one folder of images per label"
            )
        for _, row in rows:
            for name in FILE_COLUMNS:
                if self.image_column not in row and name in row:
                    row[self.image_column] = row[name]
        return rows

    @property
    def rows(self) -> list[dict[str, str]]:
        """Rows of the table, with every value as text."""
        return [row for _, row in self.numbered_rows]

    def _rows_by_label(self) -> list[tuple[int, dict[str, str]]]:
        """Lists the images of the folder. The label of an image is the name of its top-level folder."""
        rows = []
        for path in files_below(self.file)[0]:
            first, *within = path.relative_to(self.file).parts
            if not within:
                continue  # not in the folder of a label
            label = normal_name(first)
            meanings = {self.labels.get(normal_name(name).lower()) for name in (first, *within[:-1])} - {None}
            if self.answers == "safety" and len(meanings) > 1:
                raise RecordError(
                    f"{path}: lies in a folder of each label: a folder of images has one label; move one out of the "
                    "other"
                )
            name = path.relative_to(self.file).as_posix()
            rows.append((0, {self.image_column: name, self.label_column: label}))
        return rows

    # --- questions ----------------------------------------------------------------------------------------------------

    def load(self) -> Parts:
        """Builds the questions, in the order of the table."""
        shown = self.images()
        asked: Counter[str] = Counter()
        answers: defaultdict[str, set[str]] = defaultdict(set)
        questions = []
        rows = self.rows
        draw = published_draw(len(rows))
        chosen = {image.image for image in spread(list({image.image: image for image in shown}.values()), self.limit)}
        for number, (row, image) in enumerate(zip(rows, shown, strict=True)):
            if image.image not in chosen:
                continue
            where = self._where(number)
            answer, context = self.answer(row, where), self._value(row, "context_column", where)
            answers[image.image].add(answer)
            if self.question_column:
                prompts = [(asked[image.image], self._value(row, "question_column", where), False)]
            else:
                prompts = [(n, question, n == draw[number]) for n, question in enumerate(ALIGNMENT_QUESTIONS)]
                prompts = [prompt for prompt in prompts if self.prompts == "all" or prompt[2]]
            for which, prompt, drawn in prompts:
                question = image.question(self.capability, which, prompt, answer, drawn)
                if not self.question_column and asked[image.image]:  # another row with the same image
                    name = f"{image.image}.{asked[image.image]}"
                    question = replace(question, id=record_id(self.dataset, name, self.capability, which))
                questions.append(replace(question, context=context))
            asked[image.image] += 1
        both = [image for image, given in answers.items() if len(given) > 1]
        if both and self.answers == "safety" and (self.trainer is None or self.trainer.is_global_zero):
            say(f"{self.dataset}: {len(both)} images are Safe in one row and Unsafe in another, as {both[0]}")
        return Parts(predict=[Example(question) for question in questions])

    def images(self) -> list[ImageRecord]:
        """Returns the image of each row.

        Raises:
            RecordError: Two rows have the same index, or an image refers to a row that does not exist.
        """
        files = written_images(self.images_folder) if self.embedded else {}
        folder = self.file if self.file.is_dir() else self.file.parent
        rows = self.rows
        numbers = [normal_name(row.get("index", str(number))) for number, row in enumerate(rows)]
        index: dict[str, int] = {}
        for number, name in enumerate(numbers):
            if index.setdefault(name, number) != number:
                raise RecordError(
                    f"{self._where(number)}: the row of line {self.numbered_rows[index[name]][0]} has the index "
                    f"{name!r} as well: two rows have the index {name}; number the rows"
                )
        images = []
        for number, row in enumerate(rows):
            where = self._where(number)
            value = self._value(row, "image_column", where).strip()
            holder = number
            if value.isdigit():
                if value not in index:
                    raise RecordError(f"{where}: the image is that of row {value}, which does not exist")
                holder = index[value]
            name = numbers[holder]
            if holder in files:
                path = files[holder]
            else:
                name = self._value(rows[holder], "image_column", where).strip()
                path = named_file(folder, name, where)
            name = self._name(row, "name_column", where) or name
            category = self._name(row, "category_column", where) or self.dataset
            images.append(ImageRecord(self.dataset, name, str(path), category, "", ""))
        return images

    def answer(self, row: Mapping[str, str], where: str) -> str:
        """Returns the correct answer of a row.

        Args:
            row: Values of the row by column.
            where: File and line, for the error message.

        Returns:
            ``Safe`` or ``Unsafe`` for ``safety``, ``Yes`` or ``No`` for ``yes_no``, otherwise the label as written.

        Raises:
            RecordError: The label is missing, empty or not valid.
        """
        label = self._value(row, "label_column", where).strip()
        if self.answers in ("safety", "yes_no"):
            label = normal_name(label)
        if self.answers == "safety":
            if label.lower() not in self.labels:
                raise RecordError(
                    f"{where}: the label {label!r} means neither Unsafe nor Safe: see data.unsafe and data.safe"
                )
            return self.labels[label.lower()]
        if self.answers == "yes_no" and label.lower() not in ("yes", "no"):
            raise RecordError(f"{where}: the answer must be Yes or No, got {label!r}")
        if self.answers == "occurs" and label == NOT_APPLICABLE:
            raise RecordError(f"{where}: the answer {label!r} is reserved for unreadable ones; use another word")
        return label.capitalize() if self.answers == "yes_no" else label

    def _where(self, number: int) -> str:
        """Describes the position of a row for error messages, with the line number that an editor shows."""
        line, row = self.numbered_rows[number]
        return f"{self.file / row[self.image_column]}" if self.table is None else f"{self.table}, line {line}"

    def _name(self, row: Mapping[str, str], argument: str, where: str) -> str:
        """Returns the normalised name in the column set by an argument; an empty text if no column is set."""
        if (value := self._value(row, argument, where)) and not (name := normal_name(value)):
            raise RecordError(f"{where}: {getattr(self, argument)!r} is empty; fill it in, or remove the row")
        return name if value else ""

    def _value(self, row: Mapping[str, str], argument: str, where: str) -> str:
        """Returns the value in the column set by an argument; an empty text if no column is set."""
        column = getattr(self, argument)
        if not column:
            return ""
        if column not in row:
            columns = ", ".join(sorted(row))
            raise RecordError(f"{where}: there is no column {column!r}, but {columns}; name one by data.{argument}")
        if not row[column].strip():
            raise RecordError(f"{where}: {column!r} is empty; fill it in, or remove the row")
        return row[column]

    def describe(self) -> dict[str, Any]:
        """Extends :meth:`SaferData.describe` by the dataset's name, its source and the limit."""
        return super().describe() | {"name": self.dataset, "source": public(self.source), "limit": self.limit}


def _column(of: str, name: str | None) -> str:
    """Normalises a column's name as :func:`safervlm.data.tables.read_rows` does; returns an empty text for None."""
    return "" if name is None else normal_name(not_empty(f"data.{of}_column", name))
