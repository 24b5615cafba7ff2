r"""Contexts of use: for each concept, one context in which an image of it is safe to use and one in which it is not.

The file is a JSON list with one record per concept, as published::

    {"category": "Deception", "unsafe concept": "...", "image_fname": "images/1398.png",
     "output": "Safe Context: Is it appropriate to ...?\n\nUnsafe Context: Is it appropriate to ...?"}
"""

import re
from pathlib import Path
from typing import Any, Literal

from safervlm.data.image_folders import ImageRecord, spread
from safervlm.data.image_sets import HUB_REPO, ImageSets, PartName
from safervlm.data.loaders import Collator
from safervlm.data.module import Parts, name_field, text_field
from safervlm.errors import RecordError
from safervlm.hashing import fingerprint
from safervlm.io.names import path_text
from safervlm.io.reading import read_json
from safervlm.protocol import SAFE, UNSAFE, context_text_only_question
from safervlm.records import Example, Question, record_id

# Correct answers, by the number of the question.
CONTEXTS = (SAFE, UNSAFE)


def read_contexts(file: str | Path) -> dict[str, tuple[str, str]]:
    """Reads the two questions of each concept.

    Args:
        file: JSON file in the format described by the module.

    Returns:
        By concept, the question about the safe context and the question about the unsafe context.

    Raises:
        RecordError: The file is missing, empty or malformed, or a concept has two records.
    """
    file = Path(file)
    if not file.is_file():
        raise RecordError(
            f"data.contexts: {file} is missing: the dataset on the Hub lacks the questions about contexts of "
            "use; put the published unsafe_concepts_contexts.json there (data/contexts/generated_questions.json in the "
            "first implementation's repository), or a file of your own (docs/data.md)"
        )
    records = read_json(file)
    if not records:
        raise RecordError(f"data.contexts: {file} is empty: it needs one record per concept")
    contexts: dict[str, tuple[str, str]] = {}
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        where = f"{file}, record {number}"
        if not isinstance(record, dict):
            raise RecordError(f"{where}: not a JSON object")
        concept = name_field(record, ("unsafe concept", "unsafe_concept"), where)
        text = text_field(record, ("output",), where)
        match = re.fullmatch(r"\s*Safe Context:\s*(.+?)\s*Unsafe Context:\s*(.+?)\s*", text, re.DOTALL)
        if match is None:
            raise RecordError(
                f"{where} ({concept}): needs an output 'Safe Context: ... Unsafe Context: ...', got {text!r}"
            )
        if concept in contexts:
            raise RecordError(f"{where}: {concept!r} has a record before: remove one of the two")
        contexts[concept] = (match[1], match[2])
    return contexts


def context_questions(image: ImageRecord, contexts: dict[str, tuple[str, str]]) -> list[Question]:
    """Returns the questions about an unsafe image's contexts of use: the safe context, then the unsafe context.

    Args:
        image: Unsafe image.
        contexts: Questions by concept (see :func:`read_contexts`).

    Raises:
        RecordError: There are no questions for the image's concept.
    """
    if image.concept not in contexts:
        raise RecordError(
            f"data.contexts: no questions about {image.concept!r} ({image.dataset}/{image.image}); add its record"
        )
    texts = contexts[image.concept]
    return [image.question("context", n, texts[n], CONTEXTS[n]) for n in range(len(CONTEXTS))]


class Contexts(ImageSets):
    """Questions about contexts of use, for unsafe images and for the names of their concepts (safervlm predict).

    Args:
        contexts: JSON file with a safe and an unsafe context for each concept.
        folder: Local folder of the unsafe dataset. None downloads it from the Hub.
        repo: Hub repository of the unsafe dataset, ``owner/name`` or ``owner/name@revision``.
        name: Name of the unsafe dataset, the first component of its record ids.
        cache_dir: Folder in which datasets downloaded from the Hub are kept.
        split: Split to ask about.
        forms: Whether to ask about the image, only about the concept's name (``text_only``), or both.
        validation_fraction: Fraction of the training images held out as the validation split. The paper holds out none.
        limit: Maximum number of images and of concepts to ask about, spread over categories and concepts. None uses
            all.
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of questions per step and process. ``auto`` starts with 256 and halves the number until a
            batch fits into the memory.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.
    """

    def __init__(
        self,
        contexts: str,
        folder: str | None = None,
        repo: str = HUB_REPO,
        name: str = "UnsafeConcepts",
        cache_dir: str = "~/.cache/safervlm",
        split: PartName = "test",
        forms: Literal["image", "text_only", "both"] = "both",
        validation_fraction: float = 0.0,
        limit: int | None = None,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            folder,
            None,
            repo,
            None,
            name,
            f"{name}, safe",
            cache_dir,
            validation_fraction,
            limit,
            collator,
            batch_size,
            num_workers,
        )
        self.contexts = path_text("data.contexts", contexts)
        self.split = split
        self.forms = forms

    def load(self) -> Parts:
        """Builds the questions about images in dataset order, then those about names of concepts."""
        contexts = read_contexts(self.contexts)
        images, _ = self.images(self.split)
        questions: list[Question] = []
        if self.forms != "text_only":
            questions += [q for image in spread(images, self.limit) for q in context_questions(image, contexts)]
        if self.forms != "image":
            of_concept = {(image.category, image.concept): image for image in images}
            for image in spread([of_concept[key] for key in sorted(of_concept)], self.limit):
                questions += map(as_question_about_name, context_questions(image, contexts))
        return Parts(predict=list(map(Example, questions)))

    def describe(self) -> dict[str, Any]:
        """Extends :meth:`ImageSets.describe` by the split and a hash of the file of contexts."""
        return super().describe() | {"split": self.split, "contexts": fingerprint(Path(self.contexts))}


def as_question_about_name(question: Question) -> Question:
    """Converts a question about an image's context of use into one about only the name of its concept.

    Args:
        question: Question about an image.

    Returns:
        The question without an image.
    """
    return Question(
        id=record_id(question.dataset, question.concept, "context_text_only", question.prompt_number),
        dataset=question.dataset,
        image=question.concept,
        image_path=None,
        capability="context_text_only",
        prompt_number=question.prompt_number,
        prompt=context_text_only_question(question.prompt, question.concept),
        category=question.category,
        concept=question.concept,
        answer=question.answer,
    )
