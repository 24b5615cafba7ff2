r"""Contexts of use: for each concept a setting in which an image of it is safe to use, and one in which it isn't.

The file is a JSON list, a record a concept, as published::

    {"category": "Deception", "unsafe concept": "...", "image_fname": "images/1398.png",
     "output": "Safe Context: Is it appropriate to ...?\n\nUnsafe Context: Is it appropriate to ...?"}
"""

import re
from pathlib import Path
from typing import Any, Literal

from safervlm.data.loaders import Collator
from safervlm.data.module import Parts, name_field, text_field
from safervlm.data.unsafe_concepts import HUB_REPO, ImageRecord, ImageSets, PartName, spread
from safervlm.errors import RecordError
from safervlm.hashing import fingerprint
from safervlm.io.names import path_text
from safervlm.io.reading import read_json
from safervlm.protocol import SAFE, UNSAFE, context_text_only_question
from safervlm.records import Example, Question, record_id

# The right answers, by the number of the question.
CONTEXTS = (SAFE, UNSAFE)


def read_contexts(file: str | Path) -> dict[str, tuple[str, str]]:
    """The two questions of each concept: about the safe context, about the unsafe one.

    Raises:
        RecordError: the file is missing or of another form; a concept has two records.
    """
    file = Path(file)
    if not file.is_file():
        raise RecordError(
            f"data.contexts: {file} is missing: the questions about contexts of use are no part of the set on the Hub; "
            "put the published unsafe_concepts_contexts.json there (data/contexts/generated_questions.json in the "
            "first implementation's repository), or a file of your own (docs/data.md)"
        )
    records = read_json(file)
    if not records:
        raise RecordError(f"data.contexts: {file} is empty: it needs a record a concept")
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
    """The questions about an unsafe image's contexts of use: the safe one, then the unsafe one.

    Raises:
        RecordError: its concept has none.
    """
    if image.concept not in contexts:
        raise RecordError(
            f"data.contexts: nothing about {image.concept!r} ({image.dataset}/{image.image}); add its record"
        )
    texts = contexts[image.concept]
    return [image.question("context", n, texts[n], CONTEXTS[n]) for n in range(len(CONTEXTS))]


class Contexts(ImageSets):
    """Questions about contexts of use, about unsafe images and about their concepts' names (safervlm predict).

    Args:
        contexts: the JSON file with a safe and an unsafe context of each concept.
        folder: the unsafe set's local folder; None takes it from the Hub.
        repo: the unsafe set on the Hub, ``owner/name`` or ``owner/name@revision``.
        name: the unsafe set's name, the first part of its records' ids.
        cache_dir: where sets of the Hub are kept.
        split: which part to ask about.
        forms: ask about the image, about the concept's name alone, or both.
        validation_fraction: of the training images, held out as the validation part; the paper holds out none.
        limit: asks about this many images and this many concepts, spread over categories and concepts.
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: questions a step and process; ``auto`` begins with 256 and halves them until they fit.
        num_workers: processes that load images ahead; 0 loads them in the main process.
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
        """The questions about images in data-set order, then those about names."""
        contexts = read_contexts(self.contexts)
        images, _ = self.images(self.split)
        questions: list[Question] = []
        if self.forms != "text_only":
            questions += [q for image in spread(images, self.limit) for q in context_questions(image, contexts)]
        if self.forms != "image":
            of_concept = {(image.category, image.concept): image for image in images}
            for image in spread([of_concept[key] for key in sorted(of_concept)], self.limit):
                questions += map(about_name, context_questions(image, contexts))
        return Parts(predict=list(map(Example, questions)))

    def describe(self) -> dict[str, Any]:
        """See :meth:`ImageSets.describe`; with the contexts."""
        return super().describe() | {"split": self.split, "contexts": fingerprint(Path(self.contexts))}


def about_name(question: Question) -> Question:
    """A question about an image's context of use, asked about its concept's name alone."""
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
