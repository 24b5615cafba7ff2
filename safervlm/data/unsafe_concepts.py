r"""The questions about UnsafeConcepts and its safe counterpart.

A local folder contains the images and ``metadata.jsonl``, with one line per image in dataset order::

    {"image_filename": "images/0.png", "category": "Hate", "unsafe_concept": "..."}     the unsafe dataset
    {"image_filename": "images/0.png", "concept": "tabby cat"}                          the safe dataset

``file_name`` is accepted instead of ``image_filename``. Perception also needs the unsafe dataset's
``perception.jsonl``, with one line per image and its published options::

    {"image_filename": "images/0.png", "option_str": "A: ... \nB: ... \nC: ... \nD: ...", "correct_option": "A"}
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safervlm import legacy
from safervlm.data.image_folders import PERCEPTION_FILES, ImageRecord, spread
from safervlm.data.image_sets import HUB_REPO, ImageSets, PartName
from safervlm.data.loaders import Collator
from safervlm.data.module import Parts, name_field, text_field
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.names import normal_name
from safervlm.io.reading import numbered_jsonl
from safervlm.protocol import (
    ALIGNMENT_QUESTIONS,
    CAPABILITIES,
    OPTIONS,
    REVERSED,
    REVERSED_NUMBER,
    REVERSED_QUESTION,
    TEXT_ONLY_QUESTIONS,
    UNSAFE,
    Capability,
    perception_question,
    text_only_question,
)
from safervlm.ranges import in_range
from safervlm.records import ROTATED, TURNED, Example, Question, record_id


@dataclass(frozen=True, slots=True)
class Options:
    """Published options of a perception question.

    Attributes:
        options: The four concepts, in the order of the letters.
        answer: Letter of the correct option.
    """

    options: tuple[str, ...]
    answer: str


def read_options(folder: Path, images: Iterable[ImageRecord]) -> dict[str, Options]:
    """Reads the published options of the perception questions.

    Args:
        folder: Folder that contains ``perception.jsonl`` (or ``perception_metadata.jsonl``).
        images: Images that need options.

    Returns:
        The options by image name.

    Raises:
        RecordError: The file is missing or empty; a record lacks a field, is malformed or repeats an image; an image
            has no record, or its correct option is not its concept.
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
        image = name_field(fields, ("image_filename", "file_name"), where)
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
        raise RecordError(f"{file}: is empty: it needs one line per image")
    for record in images:
        where = f"{record.dataset}/{record.image}"
        if record.image not in published:
            raise RecordError(f"{where}: {file} has no options for it: add its record")
        options = published[record.image]
        right = normal_name(options.options[OPTIONS.index(options.answer)])
        if right != record.concept:
            raise RecordError(
                f"{where}: shows {record.concept!r}, but {file} has {right!r} as its right option {options.answer}: "
                "the files belong to different datasets"
            )
    return published


class UnsafeConcepts(ImageSets):
    """The questions of the measurement (safervlm predict).

    Perception has one question per unsafe image (the safe dataset has no options), alignment has five per image of both
    datasets, and alignment_text_only has five per unsafe concept. A dataset is read from its local folder. Without a
    folder, it is downloaded once from the Hub into ``cache_dir`` (gated: accept the terms on its page, then run ``hf
    auth login``).

    Args:
        folder: Local folder of the unsafe dataset (metadata.jsonl and images, see docs/data.md). None downloads it from
            the Hub.
        safe_folder: Local folder of the safe dataset. None uses ``safe_repo``.
        repo: Hub repository of the unsafe dataset, ``owner/name`` or ``owner/name@revision``.
        safe_repo: Hub repository of the safe dataset, such as yiting/imagenet_1k_unique_class. None, as in the paper's
            measurement, asks about no safe images unless ``safe_folder`` is set.
        name: Name of the unsafe dataset, the first component of its record ids.
        safe_name: Name of the safe dataset, the first component of its record ids and the category of its images.
        cache_dir: Folder in which datasets downloaded from the Hub are kept.
        split: Split to ask about. The text-only questions are about the concepts that occur in it.
        capabilities: Capabilities to ask about, in this order.
        prompts: Which of the five alignment questions to ask about each image. ``all`` asks all five and marks the one
            that the published evaluation samples for a test image, so that either can be scored. ``drawn`` asks only
            that one.
        repeats: How often each question is asked. Each repetition has its own id, the question's id with ``#2`` and
            so on, and is sampled independently; scores are means over them.
        rotations: Number of orders in which a perception question's options are asked, 1 to 4: the published one, then
            rotated by one place each. The accuracy is that of the published order; the others measure the effect of the
            right option's position.
        reversed_question: Also ask about each image the first alignment question with the opposite polarity, which was
            not published. Its responses are not part of the published numbers; they show how often the model says yes
            to both questions.
        validation_fraction: Fraction of the training images held out as the validation split. The paper holds out none.
        limit: Maximum number of images per dataset and of concepts, spread over categories and concepts. None uses all.
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of questions per step and process. ``auto`` starts with 256 and halves the number until a
            batch fits into GPU memory.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.

    Raises:
        ArgumentError: An argument is invalid, or ``prompts`` is ``drawn`` and ``split`` is not ``test``.
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
        repeats: int = 1,
        rotations: int = 1,
        reversed_question: bool = False,
        validation_fraction: float = 0.0,
        limit: int | None = None,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
    ) -> None:
        sources = (folder, safe_folder, repo, safe_repo, name, safe_name, cache_dir)
        super().__init__(*sources, validation_fraction, limit, collator, batch_size, num_workers)
        if not capabilities:
            raise ArgumentError(f"data.capabilities: at least one of {', '.join(CAPABILITIES)}, got []")
        if unknown := [name for name in capabilities if name not in CAPABILITIES]:
            raise ArgumentError(f"data.capabilities: {unknown[0]!r} is none of {', '.join(CAPABILITIES)}")
        if len(set(capabilities)) < len(capabilities):
            raise ArgumentError(f"data.capabilities: one occurs twice in {', '.join(capabilities)}; name each once")
        if prompts == "drawn" and split != "test":
            raise ArgumentError(
                "data.prompts: the draw is published for the test split; set data.split to test, or data.prompts to all"
            )
        in_range("data", least=1, repeats=repeats)
        in_range("data", least=1, most=len(OPTIONS), rotations=rotations)
        self.repeats = repeats
        self.rotations = rotations
        self.split = split
        self.capabilities = capabilities
        self.prompts = prompts
        self.reversed_question = reversed_question

    def load(self) -> Parts:
        """Builds the questions by capability, then in dataset order, the unsafe dataset first."""
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
        if self.reversed_question:
            questions += self._reversed(chosen)
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

    @staticmethod
    def _reversed(images: list[ImageRecord]) -> list[Question]:
        """Returns the unpublished question about each image."""
        return [
            image.question(REVERSED, REVERSED_NUMBER, REVERSED_QUESTION, image.label, variant=TURNED)
            for image in images
        ]

    def _perception(self, images: list[ImageRecord]) -> list[Question]:
        published = read_options(self.folder, images)
        questions = []
        for image in images:
            options = published[image.image]
            right = OPTIONS.index(options.answer)
            for turn in range(self.rotations):
                turned = (*options.options[turn:], *options.options[:turn])
                answer = OPTIONS[(right - turn) % len(OPTIONS)]
                variant = ROTATED if turn else ""
                questions.append(
                    image.question("perception", turn, perception_question(turned), answer, variant=variant)
                )
        return questions

    def _text_only(self, images: list[ImageRecord]) -> list[Question]:
        # One image per concept, sorted by category and concept: the first implementation's order.
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
        """Extends :meth:`ImageSets.describe` by the split and the capabilities."""
        return super().describe() | {"split": self.split, "capabilities": list(self.capabilities)}


def __getattr__(name: str) -> Any:
    """Resolves names that this module had in version 0.1."""
    return legacy.find(__name__, name)
