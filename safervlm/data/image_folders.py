"""Images of a dataset and the folder that contains them: metadata.jsonl and image files, local or from the Hub."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from safervlm.data.folders import files_below
from safervlm.data.module import name_field, text_field
from safervlm.errors import RecordError, explained
from safervlm.io.caches import build_folder
from safervlm.io.fields import normalise
from safervlm.io.images import image_file
from safervlm.io.names import normal_name
from safervlm.io.reading import numbered_jsonl
from safervlm.io.tables import say
from safervlm.protocol import ALIGNMENT_QUESTIONS, CATEGORIES, UNSAFE, Capability
from safervlm.records import Question, read_jsonl, record_id, write_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

# Files with the options of the perception questions. The second is the first implementation's name.
PERCEPTION_FILES = ("perception.jsonl", "perception_metadata.jsonl")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image of a dataset.

    Attributes:
        dataset: Name of the dataset.
        image: Name of the image within the dataset, such as ``images/17.png``.
        path: Local file of the image.
        category: One of the nine categories, or the name of the safe dataset.
        concept: Concept that the image shows.
        label: ``Safe`` or ``Unsafe``.
    """

    dataset: str
    image: str
    path: str
    category: str
    concept: str
    label: str

    def __post_init__(self) -> None:
        """Normalises the names; the path is unchanged."""
        normalise(self, "dataset", "image", "category", "concept")

    def question(
        self,
        capability: Capability,
        number: int,
        prompt: str,
        answer: str,
        drawn: bool = False,
        variant: str = "",
    ) -> Question:
        """Builds a question about the image.

        Args:
            capability: Capability that the question measures.
            number: Number of the capability's prompt, from 0.
            prompt: Text of the question.
            answer: Correct label.
            drawn: Whether the published evaluation samples this question.
            variant: How the question differs from the published protocol.
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
            variant=variant,
        )

    def alignment_question(self, number: int, drawn: bool = False) -> Question:
        """Builds one of the five alignment questions about the image.

        Args:
            number: Number of the question, 0 to 4.
            drawn: Whether the published evaluation samples this question.
        """
        return self.question("alignment", number, ALIGNMENT_QUESTIONS[number], self.label, drawn)


def require_metadata(folder: Path) -> Path:
    """Returns the path of a dataset's metadata file.

    Args:
        folder: Folder of the dataset.

    Raises:
        RecordError: The file is missing.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise RecordError(
            f"data.folder: {metadata} is missing: a dataset's folder has metadata.jsonl and its images (docs/data.md)"
        )
    return metadata


def read_images(folder: Path, dataset: str, label: str) -> list[ImageRecord]:
    """Reads the images of a local folder, in dataset order.

    Args:
        folder: Folder that contains ``metadata.jsonl`` and the images.
        dataset: Name of the dataset.
        label: Label of all images. ``Unsafe`` reads categories and unsafe concepts, ``Safe`` reads only concepts.

    Returns:
        One record per line of the metadata.

    Raises:
        RecordError: The file is missing or empty; a record lacks a field, has an unknown category, or names an image
            that is outside the folder or named by an earlier record.
    """
    metadata = require_metadata(folder)
    images = []
    seen = set()
    for number, record in numbered_jsonl(metadata):
        where = f"{metadata}, line {number}"
        image = text_field(record, ("image_filename", "file_name"), where)
        where = f"{where} ({image!r})" if not image.isprintable() else f"{where} ({image})"
        if normal_name(image) in seen:
            raise RecordError(f"{where}: the image was named before: remove one of the records")
        seen.add(normal_name(image))
        if label == UNSAFE:
            category = name_field(record, ("category",), where)
            if category not in CATEGORIES:
                nearest = get_close_matches(category, CATEGORIES, n=1, cutoff=0)[0]
                raise RecordError(
                    f"{where}: unknown category {category!r}: the nearest of the nine is {nearest!r} (there are "
                    f"{', '.join(CATEGORIES)})"
                )
        else:
            category = dataset
        concept = name_field(record, ("unsafe_concept",) if label == UNSAFE else ("concept",), where)
        path = named_file(folder, image, where)
        images.append(ImageRecord(dataset, image, str(path), category, concept, label))
    if not images:
        raise RecordError(f"{metadata} is empty: it needs one line per image")
    return images


def save_images(repo: str, rows: "Dataset", folder: Path) -> None:
    """Writes the rows of a dataset of the Hub as a local folder. Images keep the published bytes.

    Args:
        repo: Name of the dataset, for error messages.
        rows: Rows of the dataset.
        folder: Folder to create. It is written completely or not at all.

    Raises:
        RecordError: The columns are not those of a dataset of images, or a row has no image.
        ArgumentError: The folder can't be created.
    """
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
    for column in columns:
        if any(not isinstance(value, str) or not normal_name(value) for value in rows[column]):
            raise RecordError(f"{repo}: a row has no text in {column!r}: name a local folder, or another dataset")

    def build(aside: Path) -> None:
        (aside / "images").mkdir()
        records = []
        for row, record in enumerate(rows):
            # Named as in the published metadata, regardless of the format, which is detected from the content.
            image = f"images/{row}.png"
            if record["image"] is None:
                raise RecordError(f"{repo}, row {row}: it has no image: name a local folder, or another revision")
            content = record["image"]["bytes"]
            (aside / image).write_bytes(content if content is not None else Path(record["image"]["path"]).read_bytes())
            records.append({"image_filename": image} | {column: record[column] for column in columns})
        write_jsonl(aside / "metadata.jsonl", records)
        if "option_str" in columns and "correct_option" in columns:
            write_jsonl(aside / PERCEPTION_FILES[0], records)

    build_folder(folder, build)


def named_file(folder: Path, image: str, where: str) -> Path:
    """Returns the file of an image that a record names (see :func:`safervlm.io.images.image_file`).

    Args:
        folder: Folder of the dataset.
        image: Name of the image, relative to the folder.
        where: File and line of the record, for the error message.

    Raises:
        RecordError: The file is outside the folder, or the name is not a valid file name.
    """
    with explained(f"{where}: the image {image[:80]!r} is not a valid file name", "correct it", OSError, ValueError):
        return image_file(folder, image, where)


def report_unnamed_images(dataset: str, folder: Path) -> None:
    """Reports how many images of a folder are not named in its metadata.

    Args:
        dataset: Name of the dataset.
        folder: Folder that contains ``metadata.jsonl`` and the images.

    Raises:
        RecordError: The metadata file is missing.
    """
    there = read_jsonl(require_metadata(folder))
    named = {normal_name(str(record.get("image_filename", record.get("file_name")))) for record in there}
    images, _ = files_below(folder)
    if unnamed := [name for image in images if normal_name(name := image.relative_to(folder).as_posix()) not in named]:
        say(f"{dataset}: metadata.jsonl doesn't name {len(unnamed)} images of {folder}, such as {unnamed[0]!r}")


def spread(images: Sequence[ImageRecord], limit: int | None) -> list[ImageRecord]:
    """Selects a limited number of images, spread over categories and concepts.

    Each category gets one image before any category gets two; the same applies to the concepts within a category.

    Args:
        images: Images of one dataset.
        limit: Maximum number of images. None returns all.

    Returns:
        The selected images, in the order of ``images``.
    """
    if limit is None:
        return list(images)
    rounds = []
    of_concept: Counter[tuple[str, str]] = Counter()
    concepts: dict[str, dict[str, int]] = defaultdict(dict)
    for row, image in enumerate(images):
        place = concepts[image.category].setdefault(image.concept, len(concepts[image.category]))
        # Sorted by the image's number within its concept, then the concept's within its category, then the row.
        rounds.append((of_concept[image.category, image.concept], place, row))
        of_concept[image.category, image.concept] += 1
    return [images[row] for row in sorted(row for _, _, row in sorted(rounds)[:limit])]
