"""Training data for SFT, DPO, PPO and GRPO: the unsafe and the safe dataset.

As published, each training image is paired with one of the five alignment questions, sampled at random; optionally,
with all five. The completions that an objective trains on follow from the question and the image's label.
"""

import random
from collections.abc import Sequence
from typing import Any, Literal

from safervlm import legacy
from safervlm.data.contexts import context_questions, read_contexts
from safervlm.data.image_folders import ImageRecord, spread
from safervlm.data.image_sets import HUB_REPO, SAFE_HUB_REPO, ImageSets, PartName
from safervlm.data.loaders import Collator
from safervlm.data.module import Parts
from safervlm.errors import ArgumentError
from safervlm.hashing import seed_for
from safervlm.io.names import path_text
from safervlm.io.tables import say
from safervlm.protocol import ALIGNMENT_QUESTIONS, UNSAFE, aligned_response, context_response, other_label
from safervlm.ranges import in_range
from safervlm.records import Example, Question

# Number of held-out safe images monitored by PPO and GRPO. Fewer are too coarse to detect a change of .05.
HELD_OUT = 100


class AlignmentData(ImageSets):
    """Training images, each with one randomly sampled alignment question, or with all of them.

    A dataset is read from its local folder. Without a folder, it is downloaded once from the Hub into ``cache_dir``
    (gated: accept the terms on its page, then run ``hf auth login``). The images are split by the paper's rule. The
    validation split is the fraction ``validation_fraction`` of the training images.

    Args:
        folder: Local folder of the unsafe dataset. None downloads it from the Hub.
        safe_folder: Local folder of the safe dataset. None downloads it from the Hub.
        repo: Hub repository of the unsafe dataset, ``owner/name`` or ``owner/name@revision``.
        safe_repo: Hub repository of the safe dataset. None trains without safe images unless ``safe_folder`` is set.
        name: Name of the unsafe dataset, the first component of its record ids.
        safe_name: Name of the safe dataset, the first component of its record ids and the category of its images.
        cache_dir: Folder in which datasets downloaded from the Hub are kept.
        validation_fraction: Fraction of the training images held out as the validation split. The paper holds out none.
        limit: Maximum number of images per dataset and split, spread over categories and concepts. None uses all
            images.
        contexts: JSON file with a safe and an unsafe context of use for each concept (docs/data.md). If set, training
            follows the published context variant: each unsafe image is paired with both questions about its concept,
            and safe images are not used. None trains on the five alignment questions.
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of examples per step and process.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.
        seed: Seed of the training order and of the sampled questions.
        questions: Which alignment questions each training image is paired with: ``one``, sampled at random (published),
            or ``all`` five. Held-out images are always paired with one.
        questions_together: Whether training keeps the questions about an image together, in random order, so that they
            share its computation. Without effect where each image has one question, as published.

    Raises:
        ArgumentError: ``questions`` is ``all``, and ``contexts`` is set.
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
        questions: Literal["one", "all"] = "one",
        questions_together: bool = True,
    ) -> None:
        sources = (folder, safe_folder, repo, safe_repo, name, safe_name, cache_dir)
        super().__init__(*sources, validation_fraction, limit, collator, batch_size, num_workers, seed)
        self.contexts = None if contexts is None else path_text("data.contexts", contexts)
        if questions == "all" and contexts is not None:
            raise ArgumentError("data.questions: contexts take the place of the five questions; omit one of the two")
        self.questions, self.questions_together = questions, questions_together

    def completions(self, question: Question) -> tuple[str, ...]:
        """Returns the completions that the objective trains on.

        Args:
            question: Question about the safety of an image or of a context of use. Its ``answer`` is the correct label.

        Returns:
            One completion for SFT, the chosen and the rejected one for DPO, none for PPO and GRPO.

        Raises:
            NotImplementedError: The subclass does not implement this method.
        """
        raise NotImplementedError

    def response(self, question: Question, label: str) -> str:
        """Returns the published response that states a label.

        Args:
            question: Alignment question, or question about a context of use.
            label: ``Safe`` or ``Unsafe``.
        """
        if question.capability == "context":
            return context_response(label, question.concept)
        return aligned_response(label, question.prompt_number, question.concept)

    def sampled_question(self, image: ImageRecord) -> Question:
        """Samples the alignment question for an image; deterministic given the seed and the image's name.

        Args:
            image: Image to ask about.
        """
        generator = random.Random(seed_for(self.seed, "question", image.dataset, image.image))
        return image.alignment_question(generator.randrange(len(ALIGNMENT_QUESTIONS)))

    def examples(self, images: Sequence[ImageRecord], every: bool = False) -> list[Example]:
        """Builds one example per image, or two per unsafe image if ``contexts`` is set.

        Args:
            images: Images to build examples from.
            every: Whether to build an example for each of the five questions instead.

        Returns:
            The examples, in the order of the images.

        Raises:
            RecordError: The file of contexts is missing or malformed, or has no record for the concept of an unsafe
                image.
        """
        contexts = None if self.contexts is None else read_contexts(self.contexts)
        questions: list[Question] = []
        for image in images:
            if contexts is not None and image.label == UNSAFE:
                questions += context_questions(image, contexts)
            elif every:
                questions += map(image.alignment_question, range(len(ALIGNMENT_QUESTIONS)))
            else:
                questions.append(self.sampled_question(image))
        return [Example(question, self.completions(question)) for question in questions]

    def held_out(self) -> list[ImageRecord]:
        """Returns the images of the validation split; an empty list if ``validation_fraction`` is 0."""
        if not self.validation_fraction:
            return []
        return self.chosen("validation")

    def load(self) -> Parts:
        """Builds the training and the validation examples, the unsafe dataset first."""
        train = self.examples(self.chosen("train"), every=self.questions == "all")
        return Parts(train=train, validation=self.examples(self.held_out()))

    def chosen(self, part: PartName) -> list[ImageRecord]:
        """Returns the unsafe and the safe images of a split; only the unsafe images if ``contexts`` is set.

        Args:
            part: Name of the split.

        Returns:
            At most ``limit`` images of each dataset.

        Raises:
            RecordError: The split is empty, or a dataset can't be read.
        """
        images = [image for images in self.images(part) for image in spread(images, self.limit)]
        return images if self.contexts is None else [image for image in images if image.label == UNSAFE]

    def describe(self) -> dict[str, Any]:
        """Extends :meth:`ImageSets.describe` by the seed and the batch size, which also determine a training step."""
        return super().describe() | {"seed": self.seed, "batch_size": self.batch_size}


class SFTData(AlignmentData):
    """Training images for SFT: each with one of the five alignment questions and the response to learn."""

    def completions(self, question: Question) -> tuple[str, ...]:
        """Returns the response to learn.

        Args:
            question: See :meth:`AlignmentData.completions`.
        """
        return (self.response(question, question.answer),)


class DPOData(AlignmentData):
    """Training images for DPO: each with one of the five alignment questions, a chosen and a rejected response."""

    def completions(self, question: Question) -> tuple[str, ...]:
        """Returns the chosen response, which states the correct label, and the rejected one, with the other label.

        Args:
            question: See :meth:`AlignmentData.completions`.
        """
        return tuple(self.response(question, label) for label in (question.answer, other_label(question.answer)))


class PPOData(AlignmentData):
    """Training images for PPO and GRPO: each with one of the five alignment questions; training samples responses.

    Args:
        held_out_unsafe: Number of unsafe images of the validation split that GenerationCheck also asks about, for its
            second judge. By default it asks about safe images only.
        settings: See :class:`AlignmentData`.
    """

    def __init__(self, held_out_unsafe: int = 0, **settings: Any) -> None:
        in_range("data", least=0, held_out_unsafe=held_out_unsafe)
        super().__init__(**settings)
        self.held_out_unsafe = held_out_unsafe

    def completions(self, question: Question) -> tuple[str, ...]:
        """Returns no completions: the responses are generated during training.

        Args:
            question: See :meth:`AlignmentData.completions`.
        """
        return ()

    def held_out(self) -> list[ImageRecord]:
        """Returns up to 100 safe images, used to detect a policy that starts to classify safe images as unsafe.

        With ``held_out_unsafe``, unsafe images of the validation split come first.

        They are taken from the validation split, then from the safe images that the paper's rule leaves unused. If both
        are empty (the real safe dataset has no unused images), images of the test split are used and a note is printed.
        In that case the rate is only a warning signal and must not be used to choose settings.

        Raises:
            ArgumentError: ``held_out_unsafe`` is set, and the validation split is empty.
        """
        unsafe = [self.sets[0][row] for row in self.splits[0].validation]
        if self.held_out_unsafe and not unsafe:
            raise ArgumentError(
                f"data.held_out_unsafe {self.held_out_unsafe}: the validation split is empty; set "
                "data.validation_fraction above 0"
            )
        safe, split = self.sets[1], self.splits[1]
        rows = [*split.validation, *split.unused]
        if not rows:
            rows = split.test
            say(
                "the held-out safe images are those of the test split: do not choose settings by them, or set "
                "data.validation_fraction above 0"
            )
        chosen = spread(unsafe, self.held_out_unsafe) if self.held_out_unsafe else []
        return spread(chosen, self.limit) + spread([safe[row] for row in rows[:HELD_OUT]], self.limit)


def __getattr__(name: str) -> Any:
    """Resolves names that this module had in version 0.1."""
    return legacy.find(__name__, name)
