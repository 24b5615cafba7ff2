"""Images of a set, and the folder that holds them: metadata.jsonl and the files, or the same from the Hub."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from safervlm.data.folders import files_below
from safervlm.data.hub import hub_rows
from safervlm.data.module import name_field, text_field
from safervlm.errors import RecordError, explained
from safervlm.io.caches import build_folder
from safervlm.io.images import image_file
from safervlm.io.names import normal_name
from safervlm.io.reading import numbered_jsonl
from safervlm.io.tables import say
from safervlm.protocol import ALIGNMENT_QUESTIONS, CATEGORIES, UNSAFE, Capability
from safervlm.records import Question, read_jsonl, record_id, write_jsonl

# The options of perception; the second is the first implementation's name for the file.
PERCEPTION_FILES = ("perception.jsonl", "perception_metadata.jsonl")


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
    for number, record in numbered_jsonl(metadata):
        where = f"{metadata}, line {number}"
        image = text_field(record, ("image_filename", "file_name"), where)
        where = f"{where} ({image!r})" if not image.isprintable() else f"{where} ({image})"
        if image in seen:
            raise RecordError(f"{where}: the image was named before: remove one of the records")
        seen.add(image)
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
        raise RecordError(f"{metadata} is empty: it needs a line an image")
    return images


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
    for column in columns:
        if any(not isinstance(value, str) or not normal_name(value) for value in rows[column]):
            raise RecordError(f"{repo}: a row has no text in {column!r}: name a local folder, or another set")

    def build(aside: Path) -> None:
        (aside / "images").mkdir()
        records = []
        for row, record in enumerate(rows):
            # Named as in the published metadata, whatever the format: an image is recognised by its content.
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
    """The file of an image that a record names (see :func:`safervlm.io.images.image_file`).

    Raises:
        RecordError: there is none, it lies outside the folder, or the name can't be that of a file.
    """
    with explained(f"{where}: the image {image[:80]!r} can't be a file's name", "correct it", OSError, ValueError):
        return image_file(folder, image, where)


def say_unnamed(dataset: str, folder: Path) -> None:
    """Says how many images of a folder its metadata doesn't name.

    Args:
        dataset: the set's name.
        folder: holds ``metadata.jsonl`` and the images.
    """
    named = {record.get("image_filename", record.get("file_name")) for record in read_jsonl(require_metadata(folder))}
    images, _ = files_below(folder)
    if unnamed := [name for image in images if (name := image.relative_to(folder).as_posix()) not in named]:
        say(f"{dataset}: metadata.jsonl doesn't name {len(unnamed)} images of {folder}, such as {unnamed[0]!r}")


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
