r"""Sets that a trained model is evaluated on: MME, MM-Vet, LLaVABench, SMID, NSFW, and your own, all of one class.

A set is a table (TSV as OpenCompass publishes them, CSV or JSONL), a row a question, or a folder of images. Its columns
have names that a YAML gives; the image stands in the table as base64, as the ``index`` of the row that holds it, or as
a file relative to the table's folder::

    index  image           question                                     answer  category   image_path
    0      /9j/4AAQSkZ...  Is there a knife? Please answer yes or no.   Yes     existence  images/1.png
    1      0               Is there a kite? Please answer yes or no.    No      existence  images/1.png

A folder holds ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and the other columns, or a folder of images a
label (``safe/``, ``unsafe/``).
"""

import base64
import binascii
import hashlib
import json
import os
import re
import shutil
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import datasets
import pandas as pd
from rich.console import Console
from rich.progress import track, wrap_file

from safervlm.data.base import Collator, Parts, SaferData
from safervlm.data.hub import hub_rows, local_name
from safervlm.data.unsafe_concepts import ImageRecord, spread
from safervlm.errors import ArgumentError, RecordError
from safervlm.image_hashes import images_fingerprint, report_frames
from safervlm.images import BROKEN, IMAGE_ENDINGS, image_file, image_kind
from safervlm.protocol import ALIGNMENT_QUESTIONS, SAFE, UNSAFE, Capability, published_draw
from safervlm.records import Example, fingerprint, read_jsonl, record_id, write_atomically

# What makes an answer right; each is a capability of the protocol.
Answers = Literal["safety", "yes_no", "occurs", "rated"]
TABLES = (".tsv", ".csv", ".jsonl")
# Of a folder's metadata, besides the column that is named.
FILE_COLUMNS = ("file_name", "image_filename")


class Benchmark(SaferData):
    """The questions of a benchmark (safervlm predict): see the module for the forms that a set may have.

    Args:
        name: the set's name, the first part of its records' ids.
        source: a TSV, CSV or JSONL file, a folder of images, an https address of such a file, or ``owner/name`` or
            ``owner/name@revision`` of a data set on the Hub. What is fetched is kept in ``cache_dir``.
        about: what the set is and where it comes from, for the line that is printed where it can't be had.
        md5: the published checksum of a file that is fetched.
        answers: what makes an answer right: ``safety``, the judge reads the image's label, Safe or Unsafe, in it;
            ``yes_no``, it begins with the label, Yes or No, by MME's rule; ``occurs``, the label occurs in it;
            ``rated``, another model rates it beside the label, a reference answer.
        label_column: what is right.
        question_column: what is asked; None, of ``safety`` only, asks the five alignment questions.
        image_column: the image: base64, the ``index`` of the row that holds it, or a file relative to the table.
        name_column: what an image is called, the same in all rows about it; by default the ``index`` of the row that
            holds it, or its file.
        category_column: of ``yes_no``, MME's task; otherwise a name to group by.
        context_column: what only the judge of ``rated`` is told.
        unsafe: labels that mean Unsafe.
        safe: labels that mean Safe.
        prompts: of the five alignment questions, ``drawn`` asks the one that the published evaluation draws for an
            image, ``all`` asks all five.
        cache_dir: where what is fetched, and images that stand in a table, are kept.
        limit: asks about this many images, spread over the categories.
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: questions a step and process; ``auto`` begins with 256 and halves them until they fit.
        num_workers: processes that load images ahead; 0 loads them in the main process.
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
        unsafe: Sequence[str] = ("1", "unsafe"),
        safe: Sequence[str] = ("0", "safe"),
        prompts: Literal["all", "drawn"] = "drawn",
        cache_dir: str = "~/.cache/safervlm",
        limit: int | None = None,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(collator, batch_size, num_workers)
        if "/" in name or not name:
            raise ArgumentError(f"data.name: a name without a slash, got {name!r}")
        if limit is not None and limit < 1:
            raise ArgumentError(f"data.limit: at least 1, or none, got {limit}")
        if answers != "safety" and question_column is None:
            raise ArgumentError(f"data.question_column: {answers} needs the column with the questions; name it")
        labels = [*map(str.lower, unsafe), *map(str.lower, safe)]
        if len(set(labels)) < len(labels):
            raise ArgumentError(f"data.unsafe: {unsafe} and data.safe: {safe} have a label in common; tell them apart")
        self.dataset, self.source, self.about, self.md5, self.answers = name, source, about, md5, answers
        self.label_column, self.question_column, self.image_column = label_column, question_column, image_column
        self.name_column, self.category_column, self.context_column = name_column, category_column, context_column
        self.labels = {label.lower(): UNSAFE for label in unsafe} | {label.lower(): SAFE for label in safe}
        self.prompts = prompts
        self.cache = Path(cache_dir).expanduser()
        self.limit = limit

    @property
    def capability(self) -> Capability:
        """Of its questions."""
        return "generalisation" if self.answers == "safety" else self.answers

    # --- files --------------------------------------------------------------------------------------------------------

    @property
    def remote(self) -> Literal["web", "hub", None]:
        """Where the source is fetched from; None for a file or a folder here."""
        if re.match(r"https?://", self.source):
            return "web"
        return "hub" if on_the_hub(self.source) else None

    @property
    def file(self) -> Path:
        """The local table, or the folder."""
        if self.remote == "web":
            name = Path(urlsplit(self.source).path)
            return self.cache / f"{name.stem}-{fingerprint(self.source)[:8]}{name.suffix}"
        if self.remote == "hub":
            return self.cache / f"{local_name(self.source)}.tsv"
        return Path(self.source).expanduser()

    def prepare_data(self) -> None:
        """Fetches the table if it isn't there, and writes the images that stand in it to files, on one process.

        Raises:
            RecordError: the set can't be had; the message says what it is and where it comes from.
        """
        try:
            if self.remote == "web":
                if not self.file.exists():
                    fetch(self.source, self.file)
                check(self.file, self.md5, self.source)
            elif not self.file.exists():
                if self.remote == "hub":
                    save_table(self.source, self.file, self.image_column)
                else:
                    _ = self.rows  # says what is missing
        except RecordError as error:
            raise RecordError(f"{error}" + (f" ({self.dataset}: {self.about})" if self.about else "")) from None
        if self.file.is_file() and not self.images_folder.exists():
            self._write_images()

    @cached_property
    def images_folder(self) -> Path:
        """Where the images that stand in the table are kept as files."""
        return self.cache / f"{self.dataset}-{fingerprint(self.file)}"

    def _write_images(self) -> None:
        """Writes the images of the table, all or none, and which file each row's is."""
        partial = self.images_folder.with_name(f".{self.images_folder.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            files = {}
            rows = list(enumerate(self.rows))
            for number, row in track(rows, f"{self.dataset}: images", console=Console(stderr=True), transient=True):
                value = row.get(self.image_column, "")
                if not value.isdigit() and not self._is_file(value):
                    content, ending = decoded(value)
                    files[str(number)] = f"{number}{ending}"
                    (partial / files[str(number)]).write_bytes(content)
            (partial / "files.json").write_text(json.dumps(files), encoding="utf-8")
            partial.replace(self.images_folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _is_file(self, value: str) -> bool:
        return value.lower().endswith(IMAGE_ENDINGS) and len(value) < 1000

    @cached_property
    def table(self) -> Path | None:
        """The file that holds the rows; None for a folder of images by label."""
        if not self.file.is_dir():
            return self.file
        return next((file for name in ("metadata.jsonl", "metadata.csv") if (file := self.file / name).is_file()), None)

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """The rows of the table, every value a text; of a folder without metadata its images by label."""
        file = self.file
        if not file.exists():
            raise RecordError(
                f"data.source: there is no {file}: name a file, a folder, or owner/name of the Hub (where no folder "
                "here is called as the owner)"
            )
        if self.table is None:
            folders = sorted(path for path in file.iterdir() if path.is_dir())
            images = [path for folder in folders for path in sorted(folder.iterdir())]
            rows = [
                {self.image_column: str(path.relative_to(file)), self.label_column: path.parent.name}
                for path in images
                if path.suffix.lower() in IMAGE_ENDINGS
            ]
        else:
            rows = read_table(self.table)
        if not rows:
            raise RecordError(
                f"data.source: {file} holds no rows; a folder has metadata.jsonl, metadata.csv, or a folder of "
                "images a label"
            )
        for row in rows:
            for name in FILE_COLUMNS:
                if self.image_column not in row and name in row:
                    row[self.image_column] = row[name]
        return rows

    # --- questions ----------------------------------------------------------------------------------------------------

    def load(self) -> Parts:
        """The questions, in the order of the table."""
        shown = self.images()
        asked: Counter[str] = Counter()
        answers: defaultdict[str, set[str]] = defaultdict(set)
        questions = []
        draw = published_draw(len(self.rows))
        chosen = {image.image for image in spread(list({image.image: image for image in shown}.values()), self.limit)}
        for number, (row, image) in enumerate(zip(self.rows, shown, strict=True)):
            if image.image not in chosen:
                continue
            where = self._where(number)
            answer, context = self.answer(row, where), self._value(row, "context_column", where)
            answers[image.image].add(answer)
            if self.question_column is not None:
                prompts = [(asked[image.image], self._value(row, "question_column", where), False)]
            else:
                prompts = [(n, question, n == draw[number]) for n, question in enumerate(ALIGNMENT_QUESTIONS)]
                prompts = [prompt for prompt in prompts if self.prompts == "all" or prompt[2]]
            for which, prompt, drawn in prompts:
                question = image.question(self.capability, which, prompt, answer, drawn)
                if self.question_column is None and asked[image.image]:  # another row with the same image
                    name = f"{image.image}.{asked[image.image]}"
                    question = replace(question, id=record_id(self.dataset, name, self.capability, which))
                questions.append(replace(question, context=context))
            asked[image.image] += 1
        both = [image for image, labels in answers.items() if len(labels) > 1]
        if both and self.answers == "safety" and (self.trainer is None or self.trainer.is_global_zero):
            print(f"{self.dataset}: {len(both)} images are Safe in one row and Unsafe in another, as {both[0]}")
        return Parts(predict=[Example(question) for question in questions])

    def images(self) -> list[ImageRecord]:
        """The image of each row."""
        kept = self.images_folder / "files.json" if self.file.is_file() else None
        files = json.loads(kept.read_text(encoding="utf-8")) if kept is not None and kept.is_file() else {}
        folder = self.file if self.file.is_dir() else self.file.parent
        index = {row.get("index", str(number)): number for number, row in enumerate(self.rows)}
        if len(index) < len(self.rows):
            twice = Counter(row["index"] for row in self.rows).most_common(1)[0][0]
            raise RecordError(f"{self.file}: two rows have the index {twice}; number the rows")
        images = []
        for number, row in enumerate(self.rows):
            where = self._where(number)
            value = self._value(row, "image_column", where)
            holder = number
            if value.isdigit():
                if value not in index:
                    raise RecordError(f"{where}: the image is that of the row with index {value}, which there isn't")
                holder = index[value]
            name = self.rows[holder].get("index", str(holder))
            if str(holder) in files:
                path = self.images_folder / files[str(holder)]
            else:
                name = self._value(self.rows[holder], "image_column", where)
                path = image_file(folder, name, where)
            name = self._value(row, "name_column", where) or name
            category = self._value(row, "category_column", where) or self.dataset
            images.append(ImageRecord(self.dataset, name, str(path), category, "", ""))
        return images

    def answer(self, row: Mapping[str, str], where: str) -> str:
        """The right answer of a row.

        Raises:
            RecordError: a label that isn't one.
        """
        label = self._value(row, "label_column", where).strip()
        if self.answers == "safety":
            if label.lower() not in self.labels:
                raise RecordError(
                    f"{where}: the label {label!r} means neither Unsafe nor Safe: see data.unsafe and data.safe"
                )
            return self.labels[label.lower()]
        if self.answers == "yes_no" and label.lower() not in ("yes", "no"):
            raise RecordError(f"{where}: the answer must be Yes or No, got {label!r}")
        return label.capitalize() if self.answers == "yes_no" else label

    def _where(self, number: int) -> str:
        """A row as an editor or a spreadsheet counts it, for an error."""
        if self.table is None:
            return f"{self.file / self.rows[number][self.image_column]}"
        return f"{self.table}, " + (f"line {number + 1}" if self.table.suffix == ".jsonl" else f"row {number + 2}")

    def _value(self, row: Mapping[str, str], argument: str, where: str) -> str:
        """What stands in the column that an argument names."""
        column = getattr(self, argument)
        if column is None:
            return ""
        if column not in row:
            columns = ", ".join(sorted(row))
            raise RecordError(f"{where}: there is no column {column!r}, but {columns}; name one by data.{argument}")
        if not row[column].strip():
            raise RecordError(f"{where}: {column!r} is empty; fill it in, or remove the row")
        return row[column]

    def describe(self) -> dict[str, Any]:
        """See :meth:`SaferData.describe`; with what the images are."""
        files = {example.question.image: example.question.image_path for example in self.parts.predict}
        if self.trainer is None or self.trainer.is_global_zero:
            report_frames(self.dataset, files)
        images = images_fingerprint(files)
        return super().describe() | {"name": self.dataset, "source": self.source, "images": images, "limit": self.limit}


def on_the_hub(source: str) -> bool:
    """Whether a source is the name of a data set there: neither it nor its folder is here, and it is no table."""
    path = Path(source).expanduser()
    here = path.exists() or path.parent.is_dir() or path.suffix in TABLES
    return not here and re.fullmatch(r"[\w-]+/[\w.-]+(@[\w./-]+)?", source) is not None


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a TSV, CSV or JSONL file, every value a text.

    Raises:
        RecordError: the file can't be read.
    """
    if file.suffix == ".jsonl":
        rows = read_jsonl(file)
        return [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    if file.suffix not in TABLES:
        raise RecordError(f"data.source: {file} is none of {', '.join(TABLES)}")
    try:
        table = pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise RecordError(f"data.source: {file} can't be read ({str(error).splitlines()[0]})") from None
    return cast(list[dict[str, str]], table.to_dict("records"))


def decoded(value: str) -> tuple[bytes, str]:
    """The bytes of an image in base64, and its kind's ending; what is none is kept, to fail when it is asked about."""
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return value.encode(), BROKEN
    kind = image_kind(content)
    return (value.encode(), BROKEN) if kind is None else (content, f".{kind}")


def fetch(address: str, file: Path) -> None:
    """Fetches a file of the web, whole or not at all.

    Args:
        address: where it is.
        file: where it is kept.

    Raises:
        RecordError: it can't be had.
    """

    def write(path: Path) -> None:
        with urllib.request.urlopen(address, timeout=60) as response, path.open("wb") as out:  # noqa: S310
            size = int(response.headers.get("Content-Length") or 0)
            with wrap_file(response, size, description=f"fetching {file.name}") as body:
                shutil.copyfileobj(body, out)
            if size and out.tell() != size:
                raise OSError(f"{out.tell()} of {size} bytes came")

    try:
        write_atomically(file, write)
    except OSError as error:
        reason = str(error).splitlines()[0].strip("<>").removeprefix("urlopen error ")
        raise RecordError(
            f"{address} can't be fetched ({reason}): fetch it by other means to {file}, or name the file as data.source"
        ) from None


def check(file: Path, md5: str | None, address: str) -> None:
    """Refuses a file that isn't the published one.

    Args:
        file: that was fetched, by us or by other means.
        md5: its published checksum.
        address: where it comes from.

    Raises:
        RecordError: it is another file.
    """
    with file.open("rb") as content:
        found = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 is not None and found != md5:
        raise RecordError(
            f"{file}: its MD5 is {found}, that of {address} is {md5}: another file; remove it and try again"
        )


def save_table(repo: str, file: Path, image_column: str) -> None:
    """Writes a data set of the Hub as a TSV, its images as base64.

    Args:
        repo: ``owner/name`` or ``owner/name@revision``.
        file: the TSV.
        image_column: base64 texts, or images.
    """
    rows = hub_rows(repo, "by data.source")
    if isinstance(rows.features.get(image_column), datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    table = rows.to_pandas()
    if image_column in table:
        table[image_column] = [
            base64.b64encode(value["bytes"]).decode() if isinstance(value, dict) else str(value)
            for value in table[image_column]
        ]
    write_atomically(file, lambda path: table.to_csv(path, sep="\t", index=False))
