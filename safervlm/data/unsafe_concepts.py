r"""UnsafeConcepts and its safe counterpart: from the Hub or from local folders to the questions of the measurement.

A local folder holds ``metadata.jsonl``, a line an image in data-set order, and the images beside it::

    {"image_filename": "images/0.png", "category": "Hate", "unsafe_concept": "..."}     the unsafe set
    {"image_filename": "images/0.png", "concept": "tabby cat"}                          the safe set

(``file_name`` may stand for ``image_filename``). Perception also needs the unsafe set's ``perception.jsonl``, a line
an image with its published options::

    {"image_filename": "images/0.png", "option_str": "A: ... \nB: ... \nC: ... \nD: ...", "correct_option": "A"}
"""

import os
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets

from safervlm.data.base import Collator, Parts, SaferData, text_field
from safervlm.data.hub import hub_rows, local_name
from safervlm.errors import ArgumentError, RecordError
from safervlm.image_hashes import images_fingerprint, report_frames
from safervlm.images import image_file
from safervlm.protocol import (
    ALIGNMENT_QUESTIONS,
    CAPABILITIES,
    CATEGORIES,
    OPTIONS,
    SAFE,
    SPLIT_SEED,
    TEXT_ONLY_QUESTIONS,
    TRAIN_FRACTION,
    UNSAFE,
    Capability,
    perception_question,
    published_draw,
    text_only_question,
)
from safervlm.records import Example, Question, read_jsonl, record_id, write_jsonl

PartName = Literal["all", "train", "validation", "test"]
# The second is the first implementation's name for it.
PERCEPTION_FILES = ("perception.jsonl", "perception_metadata.jsonl")
HUB_REPO = "yiting/UnsafeConcepts"
SAFE_HUB_REPO = "yiting/imagenet_1k_unique_class"


class Split(NamedTuple):
    """Row numbers of a set's images, in the order in which they are used.

    Attributes:
        train: the training images, without the validation part.
        validation: held out of the paper's training images.
        test: the test images.
        unused: of the safe set, what is over when each part is cut to the unsafe part's size.
    """

    train: list[int]
    validation: list[int]
    test: list[int]
    unused: list[int]


def published_order(concepts: Sequence[str]) -> Iterator[tuple[list[int], int]]:
    """The paper's shuffle of the unsafe set, concept by concept.

    Python's random, seeded with 2024; for each concept in sorted order, its images in data-set order are shuffled once
    and the first ``int(0.8 * n)`` are training images, the rest test images.

    Args:
        concepts: of each image, in data-set order.

    Yields:
        A concept's shuffled row numbers, and how many of them are training images.
    """
    generator = random.Random(SPLIT_SEED)
    images = defaultdict(list)
    for row, concept in enumerate(concepts):
        images[concept].append(row)
    for concept in sorted(images):
        rows = images[concept]
        generator.shuffle(rows)
        yield rows, int(TRAIN_FRACTION * len(rows))


def paper_split(concepts: Sequence[str], validation_fraction: float = 0.0) -> Split:
    """The paper's split of the unsafe set (:func:`published_order`).

    The last ``int(validation_fraction * m)`` of a concept's m shuffled training images are its validation part (the
    paper has none).

    Args:
        concepts: of each image, in data-set order.
        validation_fraction: of the training images.

    Returns:
        Each part in ascending order.
    """
    split = Split([], [], [], [])
    for rows, training in published_order(concepts):
        kept = training - int(validation_fraction * training)
        split.train.extend(rows[:kept])
        split.validation.extend(rows[kept:training])
        split.test.extend(rows[training:])
    return Split(*map(sorted, split))


def safe_split(images: int, unsafe: Split, validation_fraction: float = 0.0) -> Split:
    """The paper's split of the safe set.

    The whole list, in data-set order, is shuffled once by Python's random seeded with 2024; the first ``int(0.8 * n)``
    are training images; each part is cut to the unsafe part's size. The last ``int(validation_fraction * m)`` of the m
    training images are the validation part (the paper has none).

    Args:
        images: how many the safe set has.
        unsafe: the unsafe set's split.
        validation_fraction: of the training images.

    Returns:
        Each part in shuffled order.
    """
    rows = list(range(images))
    random.Random(SPLIT_SEED).shuffle(rows)
    training = int(TRAIN_FRACTION * images)
    size = min(training, len(unsafe.train) + len(unsafe.validation))
    kept = size - int(validation_fraction * size)
    test = training + len(unsafe.test)
    return Split(rows[:kept], rows[kept:size], rows[training:test], rows[size:training] + rows[test:])


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image of a set.

    Attributes:
        dataset: the set's name.
        image: the image's name within the set, such as ``images/17.png``.
        path: its local file.
        category: one of the nine categories, or the safe set's name.
        concept: what it shows.
        label: ``Safe`` or ``Unsafe``.
    """

    dataset: str
    image: str
    path: str
    category: str
    concept: str
    label: str

    def question(self, capability: Capability, number: int, prompt: str, answer: str, drawn: bool = False) -> Question:
        """A question about the image.

        Args:
            capability: what it measures.
            number: which of the capability's prompts it is.
            prompt: as it is asked.
            answer: the right label.
            drawn: whether the published evaluation draws it.
        """
        return Question(
            id=record_id(self.dataset, self.image, capability, number),
            dataset=self.dataset,
            image=self.image,
            image_path=self.path,
            capability=capability,
            prompt_number=number,
            prompt=prompt,
            category=self.category,
            concept=self.concept,
            answer=answer,
            drawn=drawn,
        )

    def alignment_question(self, number: int, drawn: bool = False) -> Question:
        """The alignment question ``number`` (0 to 4) about the image.

        Args:
            number: which of the five.
            drawn: whether the published evaluation draws it.
        """
        return self.question("alignment", number, ALIGNMENT_QUESTIONS[number], self.label, drawn)


def require_metadata(folder: Path) -> Path:
    """The metadata of a set's folder.

    Raises:
        RecordError: there is none.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise RecordError(
            f"data.folder: {metadata} is missing: a set's folder holds metadata.jsonl and its images (docs/data.md)"
        )
    return metadata


def read_images(folder: Path, dataset: str, label: str) -> list[ImageRecord]:
    """The images of a local folder, in data-set order.

    Args:
        folder: holds ``metadata.jsonl`` and the images.
        dataset: the set's name.
        label: ``Unsafe`` reads categories and unsafe concepts, ``Safe`` concepts alone.

    Raises:
        RecordError: the file is missing or empty; a record lacks a field, has an unknown category, or names an image
            that is missing, lies outside the folder or was named before.
    """
    metadata = require_metadata(folder)
    images = []
    seen = set()
    for number, record in enumerate(read_jsonl(metadata), 1):
        where = f"{metadata}, record {number}"
        image = text_field(record, ("image_filename", "file_name"), where)
        where = f"{where} ({image})"
        if image in seen:
            raise RecordError(f"{where}: the image was named before: remove one of the records")
        seen.add(image)
        if label == UNSAFE:
            category = text_field(record, ("category",), where)
            if category not in CATEGORIES:
                nearest = get_close_matches(category, CATEGORIES, n=1, cutoff=0)[0]
                raise RecordError(
                    f"{where}: unknown category {category!r}: the nearest of the nine is {nearest!r} (there are "
                    f"{', '.join(CATEGORIES)})"
                )
        else:
            category = dataset
        concept = text_field(record, ("unsafe_concept",) if label == UNSAFE else ("concept",), where)
        path = image_file(folder, image, where)
        images.append(ImageRecord(dataset, image, str(path), category, concept, label))
    if not images:
        raise RecordError(f"{metadata} is empty: it needs a line an image")
    return images


@dataclass(frozen=True, slots=True)
class Options:
    """The published options of a perception question.

    Attributes:
        options: the four concepts, in the order of the letters.
        answer: the right letter.
    """

    options: tuple[str, ...]
    answer: str


def read_options(folder: Path, images: Iterable[ImageRecord]) -> dict[str, Options]:
    """The published options of each image, by its name.

    Args:
        folder: holds ``perception.jsonl``.
        images: need their options.

    Raises:
        RecordError: the file is missing; a record lacks a field or isn't of the published form; an image has no
            record, or a right option that isn't its concept.
    """
    file = next((file for name in PERCEPTION_FILES if (file := folder / name).is_file()), None)
    if file is None:
        raise RecordError(
            f"{folder / PERCEPTION_FILES[0]} is missing: perception asks the published options; put the file there "
            "(the first implementation's repository has it as perception_metadata.jsonl), or leave perception out of "
            "data.capabilities"
        )
    published = {}
    for number, fields in enumerate(read_jsonl(file), 1):
        where = f"{file}, record {number}"
        image = text_field(fields, ("image_filename", "file_name"), where)
        text = text_field(fields, ("option_str",), where)
        answer = text_field(fields, ("correct_option",), where)
        match = re.fullmatch(r"A: (.+?)\s*\nB: (.+?)\s*\nC: (.+?)\s*\nD: (.+?)\s*", text)
        if match is None or answer not in OPTIONS:
            raise RecordError(
                f"{where} ({image}): needs an option_str 'A: ... \\nB: ... \\nC: ... \\nD: ...' and a correct_option "
                f"of A to D, got {text!r} and {answer!r}"
            )
        if image in published:
            raise RecordError(f"{where} ({image}): the image was named before: remove one of the records")
        published[image] = Options(match.groups(), answer)
    for record in images:
        where = f"{record.dataset}/{record.image}"
        if record.image not in published:
            raise RecordError(f"{where}: {file} has no options for it: add its record")
        options = published[record.image]
        right = options.options[OPTIONS.index(options.answer)]
        if right != record.concept:
            raise RecordError(
                f"{where}: shows {record.concept!r}, but {file} has {right!r} as its right option {options.answer}: "
                "the files belong to different sets"
            )
    return published


def download(repo: str, folder: Path) -> None:
    """Writes a set of the Hub as a local folder, images as the bytes that were published.

    Args:
        repo: ``owner/name`` or ``owner/name@revision``.
        folder: to write; it appears whole or not at all.

    Raises:
        RecordError: no access, no connection, or columns that aren't a set's.
    """
    rows = hub_rows(repo, "by data.folder (the unsafe set) or data.safe_folder")
    columns = [
        column
        for column in ("category", "unsafe_concept", "concept", "option_str", "correct_option")
        if column in rows.column_names
    ]
    if "image" not in rows.column_names or not {"unsafe_concept", "concept"} & set(columns):
        raise RecordError(
            f"{repo}: needs the columns image, category and unsafe_concept, or image and concept; it has "
            f"{', '.join(rows.column_names)}"
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    (partial / "images").mkdir(parents=True)
    try:
        records = []
        for row, record in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
            # Named as in the published metadata, whatever the format: an image is recognised by its content.
            image = f"images/{row}.png"
            if record["image"] is None:
                raise RecordError(f"{repo}, row {row}: it has no image: name a local folder, or another revision")
            content = record["image"]["bytes"]
            (partial / image).write_bytes(
                content if content is not None else Path(record["image"]["path"]).read_bytes()
            )
            records.append({"image_filename": image} | {column: record[column] for column in columns})
        write_jsonl(partial / "metadata.jsonl", records)
        if "option_str" in columns and "correct_option" in columns:
            write_jsonl(partial / PERCEPTION_FILES[0], records)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def spread(images: Sequence[ImageRecord], limit: int | None) -> list[ImageRecord]:
    """The first images, spread over categories and concepts.

    Each category gets one before any gets two, and within a category each concept.

    Args:
        images: of one set.
        limit: how many to take; None takes all.

    Returns:
        The images taken, in the order in which they were given.
    """
    if limit is None:
        return list(images)
    rounds = []
    of_concept: Counter[tuple[str, str]] = Counter()
    concepts: dict[str, dict[str, int]] = defaultdict(dict)
    for row, image in enumerate(images):
        place = concepts[image.category].setdefault(image.concept, len(concepts[image.category]))
        # The images of a concept, then the concepts of a category, then the categories as they come.
        rounds.append((of_concept[image.category, image.concept], place, row))
        of_concept[image.category, image.concept] += 1
    return [images[row] for row in sorted(row for _, _, row in sorted(rounds)[:limit])]


class ImageSets(SaferData):
    """The unsafe set and its safe counterpart, read and split; a subclass says what is asked about them.

    A set is read from its folder; where none is given, from the Hub, once, into a folder of the same form under
    ``cache_dir``.

    Args:
        folder: the unsafe set's local folder; None takes it from the Hub.
        safe_folder: the safe set's local folder; None takes it from the Hub.
        repo: the unsafe set on the Hub, ``owner/name`` or ``owner/name@revision``.
        safe_repo: the safe set on the Hub; None: no safe images unless ``safe_folder`` is given.
        name: the unsafe set's name, the first part of its records' ids.
        safe_name: the safe set's name, and its images' category.
        cache_dir: where sets of the Hub are kept.
        validation_fraction: of the training images, held out as the validation part; the paper holds out none.
        limit: takes this many images of each set (and of each part), spread over categories and concepts.
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: examples a step and process.
        num_workers: processes that load images ahead; 0 loads them in the main process.
        seed: of the training order.
    """

    def __init__(
        self,
        folder: str | None,
        safe_folder: str | None,
        repo: str,
        safe_repo: str | None,
        name: str,
        safe_name: str,
        cache_dir: str,
        validation_fraction: float,
        limit: int | None,
        collator: Collator | None,
        batch_size: int | Literal["auto"],
        num_workers: int,
        seed: int = 0,
    ) -> None:
        super().__init__(collator, batch_size, num_workers, seed)
        if not 0 <= validation_fraction < 1:
            raise ArgumentError(f"data.validation_fraction: from 0 to below 1, got {validation_fraction}")
        if limit is not None and limit < 1:
            raise ArgumentError(f"data.limit: at least 1, or none, got {limit}")
        for each in (name, safe_name):
            if "/" in each or each in ("", ".", ".."):
                raise ArgumentError(f"data.name: a name without a slash, got {each!r}")
        if name == safe_name:
            raise ArgumentError(f"data.safe_name: the two sets need different names, got {name!r} twice")
        cache = Path(cache_dir).expanduser()
        self.repo = None if folder else repo
        self.safe_repo = None if safe_folder else safe_repo
        self.folder = Path(folder or cache / local_name(repo))
        self.safe_folder = None
        if safe_folder or safe_repo:
            self.safe_folder = Path(safe_folder or cache / local_name(str(safe_repo)))
        self.dataset = name
        self.safe_dataset = safe_name
        self.validation_fraction = validation_fraction
        self.limit = limit

    def prepare_data(self) -> None:
        """Downloads what isn't there, on one process."""
        for repo, folder in ((self.repo, self.folder), (self.safe_repo, self.safe_folder)):
            if repo is None and folder is not None:
                require_metadata(folder)  # before anything is fetched
        for repo, folder in ((self.repo, self.folder), (self.safe_repo, self.safe_folder)):
            if repo is not None and folder is not None and not folder.exists():
                download(repo, folder)

    @cached_property
    def sets(self) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """All images of the unsafe set, and of the safe set (none where there is no such set)."""
        unsafe = read_images(self.folder, self.dataset, UNSAFE)
        return unsafe, read_images(self.safe_folder, self.safe_dataset, SAFE) if self.safe_folder else []

    @cached_property
    def splits(self) -> tuple[Split, Split]:
        """The split of the unsafe set and of the safe set."""
        unsafe, safe = self.sets
        split = paper_split([image.concept for image in unsafe], self.validation_fraction)
        return split, safe_split(len(safe), split, self.validation_fraction)

    def images(self, part: PartName) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """The images of a part, unsafe and safe, not limited.

        Args:
            part: of the split; ``all`` is both sets whole.

        Raises:
            RecordError: the part is empty.
        """
        if part == "all":
            return self.sets
        unsafe, safe = (
            [images[row] for row in getattr(split, part)] for images, split in zip(self.sets, self.splits, strict=True)
        )
        if not unsafe and not safe:
            way_out = "set data.validation_fraction above 0" if part == "validation" else "it needs more images"
            raise RecordError(f"{self.folder}: the {part} part of {self.dataset} is empty: {way_out}")
        return unsafe, safe

    def published_draw(self) -> dict[tuple[str, str], int]:
        """Of each test image, by set and name, which of the five questions the published evaluation asks.

        Drawn over the test images in the first implementation's order: the unsafe ones concept by concept as they were
        shuffled, then the safe ones.
        """
        unsafe, safe = self.sets
        test = [
            unsafe[row] for rows, training in published_order([i.concept for i in unsafe]) for row in rows[training:]
        ]
        test += [safe[row] for row in self.splits[1].test]
        return {(image.dataset, image.image): n for image, n in zip(test, published_draw(len(test)), strict=True)}

    def describe(self) -> dict[str, Any]:
        """See :meth:`SaferData.describe`; with the sets' names, and a hash of their images' names and contents."""
        files = {f"{image.dataset}/{image.image}": image.path for images in self.sets for image in images}
        if self.trainer is None or self.trainer.is_global_zero:
            report_frames(self.dataset, files)
        return super().describe() | {
            "names": [self.dataset, self.safe_dataset] if self.safe_folder else [self.dataset],
            "sources": [repo for repo in (self.repo, self.safe_repo) if repo],
            "images": images_fingerprint(files),
            "validation_fraction": self.validation_fraction,
            "limit": self.limit,
        }


class UnsafeConcepts(ImageSets):
    """The questions of the measurement (safervlm predict).

    Perception asks one question an unsafe image (the safe set has no options), alignment five an image of either set,
    alignment_text_only five an unsafe concept. A set is read from its folder; where none is given, from the Hub
    (gated: accept the terms on its page, then ``hf auth login``), once, into a folder under ``cache_dir``.

    Args:
        folder: the unsafe set's local folder (metadata.jsonl and images, see docs/data.md); None takes it from the Hub.
        safe_folder: the safe set's local folder; None takes ``safe_repo``.
        repo: the unsafe set on the Hub, ``owner/name`` or ``owner/name@revision``.
        safe_repo: the safe set on the Hub, such as yiting/imagenet_1k_unique_class; None, as in the paper's
            measurement, asks about no safe images unless ``safe_folder`` is given.
        name: the unsafe set's name, the first part of its records' ids.
        safe_name: the safe set's name, the first part of its records' ids, and its images' category.
        cache_dir: where sets of the Hub are kept.
        split: which part to ask about; the text-only questions are those about the concepts that occur in it.
        capabilities: what to ask, in this order.
        prompts: of alignment, about each image: all five, or only the one that the published evaluation draws (of a
            test image); ``all`` marks that one, so that either can be scored.
        validation_fraction: of the training images, held out as the validation part; the paper holds out none.
        limit: asks about this many images of each set and this many concepts, spread over categories and concepts.
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: questions a step and process; ``auto`` begins with 256 and halves them until they fit into the
            memory of the GPU.
        num_workers: processes that load images ahead; 0 loads them in the main process.
    """

    def __init__(
        self,
        folder: str | None = None,
        safe_folder: str | None = None,
        repo: str = HUB_REPO,
        safe_repo: str | None = None,
        name: str = "UnsafeConcepts",
        safe_name: str = "ImageNet",
        cache_dir: str = "~/.cache/safervlm",
        split: PartName = "all",
        capabilities: Sequence[Capability] = CAPABILITIES,
        prompts: Literal["all", "drawn"] = "all",
        validation_fraction: float = 0.0,
        limit: int | None = None,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            folder,
            safe_folder,
            repo,
            safe_repo,
            name,
            safe_name,
            cache_dir,
            validation_fraction,
            limit,
            collator,
            batch_size,
            num_workers,
        )
        if unknown := [name for name in capabilities if name not in CAPABILITIES]:
            raise ArgumentError(f"data.capabilities: {unknown[0]!r} is none of {', '.join(CAPABILITIES)}")
        if prompts == "drawn" and split != "test":
            raise ArgumentError(
                "data.prompts: the draw is published for the test part; set data.split to test, or ask all"
            )
        self.split = split
        self.capabilities = capabilities
        self.prompts = prompts

    def load(self) -> Parts:
        """The questions, by capability, then in data-set order, the unsafe set first."""
        unsafe, safe = self.images(self.split)
        chosen = [*spread(unsafe, self.limit), *spread(safe, self.limit)]
        questions: list[Question] = []
        for capability in self.capabilities:
            if capability == "perception":
                questions += self._perception([image for image in chosen if image.label == UNSAFE])
            elif capability == "alignment":
                questions += self._alignment(chosen)
            else:
                questions += self._text_only(unsafe)
        return Parts(predict=list(map(Example, questions)))

    def _alignment(self, images: list[ImageRecord]) -> list[Question]:
        draw = self.published_draw() if self.split == "test" else {}
        questions = []
        for image in images:
            drawn = draw.get((image.dataset, image.image))
            numbers = (
                range(len(ALIGNMENT_QUESTIONS)) if self.prompts == "all" else [n for n in (drawn,) if n is not None]
            )
            questions += [image.alignment_question(number, number == drawn) for number in numbers]
        return questions

    def _perception(self, images: list[ImageRecord]) -> list[Question]:
        published = read_options(self.folder, images)
        questions = []
        for image in images:
            options = published[image.image]
            questions.append(image.question("perception", 0, perception_question(options.options), options.answer))
        return questions

    def _text_only(self, images: list[ImageRecord]) -> list[Question]:
        # An image of each concept, sorted by category and concept: the first implementation's order.
        of_concept = {(image.category, image.concept): image for image in images}
        concepts = spread([of_concept[key] for key in sorted(of_concept)], self.limit)
        return [
            Question(
                id=record_id(self.dataset, image.concept, "alignment_text_only", number),
                dataset=self.dataset,
                image=image.concept,
                image_path=None,
                capability="alignment_text_only",
                prompt_number=number,
                prompt=text_only_question(number, image.concept),
                category=image.category,
                concept=image.concept,
                answer=UNSAFE,
            )
            for image in concepts
            for number in range(len(TEXT_ONLY_QUESTIONS))
        ]

    def describe(self) -> dict[str, Any]:
        """See :meth:`ImageSets.describe`; with the split and the capabilities."""
        return super().describe() | {"split": self.split, "capabilities": list(self.capabilities)}
