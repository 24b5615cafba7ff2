r"""UnsafeConcepts and its safe counterpart: from the Hub or from local folders to the questions of the measurement.

A local folder holds ``metadata.jsonl``, a line an image in data-set order, and the images beside it::

    {"image_filename": "images/0.png", "category": "Hate", "unsafe_concept": "..."}     the unsafe set
    {"image_filename": "images/0.png", "concept": "tabby cat"}                          the safe set

(``file_name`` may stand for ``image_filename``). Perception also needs the unsafe set's ``perception.jsonl``, a line
an image with its published options::

    {"image_filename": "images/0.png", "option_str": "A: ... \nB: ... \nC: ... \nD: ...", "correct_option": "A"}
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safervlm.data.hub import local_name
from safervlm.data.image_folders import (
    PERCEPTION_FILES,
    ImageRecord,
    download,
    read_images,
    require_metadata,
    say_unnamed,
    spread,
)
from safervlm.data.loaders import Collator
from safervlm.data.module import Parts, SaferData, name_field, text_field
from safervlm.data.splits import Split, paper_split, published_order, safe_split
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.names import normal_name, path_text, set_name
from safervlm.io.reading import numbered_jsonl
from safervlm.protocol import (
    ALIGNMENT_QUESTIONS,
    CAPABILITIES,
    OPTIONS,
    SAFE,
    TEXT_ONLY_QUESTIONS,
    UNSAFE,
    Capability,
    perception_question,
    published_draw,
    text_only_question,
)
from safervlm.ranges import in_range
from safervlm.records import Example, Question, record_id

__all__ = [
    "ImageRecord",
    "ImageSets",
    "UnsafeConcepts",
    "download",
    "paper_split",
    "read_images",
    "safe_split",
    "spread",
]

PartName = Literal["all", "train", "validation", "test"]
HUB_REPO = "yiting/UnsafeConcepts"
SAFE_HUB_REPO = "yiting/imagenet_1k_unique_class"


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
    for number, fields in numbered_jsonl(file):
        where = f"{file}, line {number}"
        image = text_field(fields, ("image_filename", "file_name"), where)
        text = text_field(fields, ("option_str",), where)
        answer = name_field(fields, ("correct_option",), where)
        match = re.fullmatch(r"A: (.+?)\s*\nB: (.+?)\s*\nC: (.+?)\s*\nD: (.+?)\s*", text)
        if match is None or answer not in OPTIONS:
            raise RecordError(
                f"{where} ({image}): needs an option_str 'A: ... \\nB: ... \\nC: ... \\nD: ...' and a correct_option "
                f"of A to D, got {text!r} and {answer!r}"
            )
        if image in published:
            raise RecordError(f"{where} ({image}): the image was named before: remove one of the records")
        published[image] = Options(match.groups(), answer)
    if not published:
        raise RecordError(f"{file}: is empty: it needs a line an image")
    for record in images:
        where = f"{record.dataset}/{record.image}"
        if record.image not in published:
            raise RecordError(f"{where}: {file} has no options for it: add its record")
        options = published[record.image]
        right = normal_name(options.options[OPTIONS.index(options.answer)])
        if right != record.concept:
            raise RecordError(
                f"{where}: shows {record.concept!r}, but {file} has {right!r} as its right option {options.answer}: "
                "the files belong to different sets"
            )
    return published


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
        in_range("data", least=0, below=1, validation_fraction=validation_fraction)
        if limit is not None and limit < 1:
            raise ArgumentError(f"data.limit: at least 1, or none, got {limit}")
        paths = {"folder": folder, "safe_folder": safe_folder, "repo": repo, "safe_repo": safe_repo}
        for argument, path in (paths | {"cache_dir": cache_dir}).items():
            if path is not None:
                path_text(f"data.{argument}", path)
        name, safe_name = set_name("data.name", name), set_name("data.safe_name", safe_name)
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
        for name, folder in ((self.dataset, self.folder), (self.safe_dataset, self.safe_folder)):
            if folder is not None:
                say_unnamed(name, folder)

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

    def image_files(self) -> dict[str, str]:
        """The file of each image of both sets, asked about or not."""
        return {f"{image.dataset}/{image.image}": image.path for images in self.sets for image in images}

    def describe(self) -> dict[str, Any]:
        """See :meth:`SaferData.describe`; with the sets' names, and how they are split."""
        return super().describe() | {
            "names": [self.dataset, self.safe_dataset] if self.safe_folder else [self.dataset],
            "sources": [repo for repo in (self.repo, self.safe_repo) if repo],
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
        if not capabilities:
            raise ArgumentError(f"data.capabilities: at least one of {', '.join(CAPABILITIES)}, got []")
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
