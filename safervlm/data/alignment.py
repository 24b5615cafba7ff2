"""What is trained on: the unsafe and the safe set as SFT, DPO and PPO see them, and your own file.

As published, each training image is asked one of the five alignment questions, drawn at random; what an objective
wants scored follows from the question and the image's label.
"""

import random
from collections.abc import Sequence
from typing import Any

from safervlm import legacy
from safervlm.data.contexts import context_questions, read_contexts
from safervlm.data.loaders import Collator
from safervlm.data.module import Parts
from safervlm.data.unsafe_concepts import HUB_REPO, SAFE_HUB_REPO, ImageRecord, ImageSets, PartName, spread
from safervlm.hashing import seed_for
from safervlm.io.names import path_text
from safervlm.io.tables import say
from safervlm.protocol import ALIGNMENT_QUESTIONS, UNSAFE, aligned_response, context_response, other_label
from safervlm.records import Example, Question

# Held-out safe images that PPO watches; a rate over fewer is too coarse to warn of a change by .05.
HELD_OUT = 100


class AlignmentData(ImageSets):
    """Training images, each with one of the five alignment questions drawn at random.

    A set is read from its folder; where none is given, from the Hub (gated: accept the terms on its page, then
    ``hf auth login``), once, into a folder under ``cache_dir``. The data is split by the paper's rule; the validation
    part is what ``validation_fraction`` holds out of the training images.

    Args:
        folder: the unsafe set's local folder; None takes it from the Hub.
        safe_folder: the safe set's local folder; None takes it from the Hub.
        repo: the unsafe set on the Hub, ``owner/name`` or ``owner/name@revision``.
        safe_repo: the safe set on the Hub; None trains without safe images unless ``safe_folder`` is given.
        name: the unsafe set's name, the first part of its records' ids.
        safe_name: the safe set's name, the first part of its records' ids, and its images' category.
        cache_dir: where sets of the Hub are kept.
        validation_fraction: of the training images, held out as the validation part; the paper holds out none.
        limit: takes this many images of each set for each part, spread over categories and concepts.
        contexts: a JSON file with a safe and an unsafe context of use of each concept (docs/data.md): trains on these,
            as the published variant does, each unsafe image asked both of its concept's questions, no safe images;
            None trains on the five alignment questions.
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: examples a step and process.
        num_workers: processes that load images ahead; 0 loads them in the main process.
        seed: of the training order and of the questions drawn.
    """

    def __init__(
        self,
        folder: str | None = None,
        safe_folder: str | None = None,
        repo: str = HUB_REPO,
        safe_repo: str | None = SAFE_HUB_REPO,
        name: str = "UnsafeConcepts",
        safe_name: str = "ImageNet",
        cache_dir: str = "~/.cache/safervlm",
        validation_fraction: float = 0.0,
        limit: int | None = None,
        contexts: str | None = None,
        collator: Collator | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
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
            seed,
        )
        self.contexts = None if contexts is None else path_text("data.contexts", contexts)

    def completions(self, question: Question) -> tuple[str, ...]:
        """What the objective wants scored.

        Args:
            question: about an image's safety, or that of a context of use; its answer is the right label.
        """
        raise NotImplementedError

    def response(self, question: Question, label: str) -> str:
        """The published response to a question that says a label."""
        if question.capability == "context":
            return context_response(label, question.concept)
        return aligned_response(label, question.prompt_number, question.concept)

    def drawn_question(self, image: ImageRecord) -> Question:
        """The one question that is asked about an image: drawn by (seed, image)."""
        generator = random.Random(seed_for(self.seed, "question", image.dataset, image.image))
        return image.alignment_question(generator.randrange(len(ALIGNMENT_QUESTIONS)))

    def examples(self, images: Sequence[ImageRecord]) -> list[Example]:
        """An example an image; of contexts, two an unsafe image."""
        contexts = None if self.contexts is None else read_contexts(self.contexts)
        questions: list[Question] = []
        for image in images:
            if contexts is not None and image.label == UNSAFE:
                questions += context_questions(image, contexts)
            else:
                questions.append(self.drawn_question(image))
        return [Example(question, self.completions(question)) for question in questions]

    def held_out(self) -> list[ImageRecord]:
        """The images to look at while training: the validation part, none where nothing is held out."""
        if not self.validation_fraction:
            return []
        return self.chosen("validation")

    def load(self) -> Parts:
        """The training and the validation examples, the unsafe set first."""
        return Parts(train=self.examples(self.chosen("train")), validation=self.examples(self.held_out()))

    def chosen(self, part: PartName) -> list[ImageRecord]:
        """The images of a part, unsafe and safe; of contexts, unsafe ones alone."""
        images = [image for images in self.images(part) for image in spread(images, self.limit)]
        return images if self.contexts is None else [image for image in images if image.label == UNSAFE]

    def describe(self) -> dict[str, Any]:
        """See :meth:`ImageSets.describe`; with what else decides a training step."""
        return super().describe() | {"seed": self.seed, "batch_size": self.batch_size}


class SFTData(AlignmentData):
    """Training images for SFT: each asked one of the five questions, with the response to learn."""

    def completions(self, question: Question) -> tuple[str, ...]:
        """The response to learn."""
        return (self.response(question, question.answer),)


class DPOData(AlignmentData):
    """Training images for DPO: each asked one of the five questions, with a chosen and a rejected response."""

    def completions(self, question: Question) -> tuple[str, ...]:
        """The chosen response and the rejected one, the other label's."""
        return tuple(self.response(question, label) for label in (question.answer, other_label(question.answer)))


class PPOData(AlignmentData):
    """Training images for PPO: each asked one of the five questions; the responses are generated."""

    def completions(self, question: Question) -> tuple[str, ...]:
        """None: the responses are generated."""
        return ()

    def held_out(self) -> list[ImageRecord]:
        """Up to 100 safe images, to see whether the policy starts to call them unsafe.

        Taken from the validation part, then from the safe images that the paper's rule leaves unused. Only where there
        are neither (the real safe set has no image to spare) they are the test part's: a warning light then, nothing
        to choose settings by.
        """
        safe, split = self.sets[1], self.splits[1]
        rows = [*split.validation, *split.unused]
        if not rows:
            rows = split.test
            say(
                "the held-out safe images are the test part's: choose no setting by them, or set "
                "data.validation_fraction above 0"
            )
        return spread([safe[row] for row in rows[:HELD_OUT]], self.limit)


def __getattr__(name: str) -> Any:
    """Finds what stood in this module in version 0.1."""
    return legacy.find(__name__, name)
