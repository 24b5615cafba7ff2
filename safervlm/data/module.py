"""Base class of the data modules: splits, loaders and the description of the data."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from safervlm.data.loaders import (
    AUTOMATIC,
    Collator,
    OrderedLoader,
    TrainingLoader,
    image_groups,
    prediction_batches,
    validation_batches,
)
from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import fingerprint
from safervlm.io.image_hashes import images_fingerprint, report_frames
from safervlm.io.images import printable
from safervlm.io.names import normal_name
from safervlm.ranges import in_range
from safervlm.records import Example, repeated_id, to_line

MAX_WORKERS = 512  # processes that load images; each uses hundreds of megabytes of memory


@dataclass(frozen=True)
class Parts:
    """Examples of a data module, by split.

    Attributes:
        train: Training examples.
        validation: Held-out examples, evaluated during training.
        predict: Examples to generate responses for, or to judge.
    """

    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    predict: list[Example] = field(default_factory=list)


class SaferData(LightningDataModule):
    """Base class of all data modules. Subclasses implement :meth:`load`.

    Attributes:
        keeps_others: Whether the run folder keeps records of questions that an earlier run asked and this one does not.
        repeats: How often each question is asked when predicting; subclasses that allow more than once set it.
        questions_together: Whether training keeps the questions about an image together; subclasses set it.

    Args:
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of examples per step and process. ``auto``, for prediction only, starts with 256 and halves
            the number until a batch fits into GPU memory.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.
        seed: Seed of the training order.

    Raises:
        ArgumentError: A number is outside its range.
    """

    keeps_others = False
    repeats = 1
    questions_together = False

    def __init__(
        self,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        in_range("data", least=1, batch_size=None if batch_size == "auto" else batch_size)
        in_range("data", least=0, most=MAX_WORKERS, num_workers=num_workers)
        self.collator = collator
        self.automatic = batch_size == "auto"
        self.batch_size = AUTOMATIC if batch_size == "auto" else batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._skipped: Collection[str] = ()
        self._training: TrainingLoader | None = None
        self._position: dict[str, Any] | None = None

    def load(self) -> Parts:
        """Reads the data; called once, before any computation.

        Raises:
            RecordError: A record can't be used.
            NotImplementedError: The subclass does not implement this method.
        """
        raise NotImplementedError

    @cached_property
    def parts(self) -> Parts:
        """Result of :meth:`load`, after checking that ids are unique.

        Raises:
            RecordError: Two examples of a split have the same id, or two images names that differ invisibly.
        """
        parts = self.load()
        if self.repeats > 1:
            parts = replace(parts, predict=repeated(parts.predict, self.repeats))
        for examples in (parts.train, parts.validation, parts.predict):
            seen = set()
            files: dict[str, str] = {}
            for question in (example.question for example in examples):
                if question.id in seen:
                    raise RecordError(f"{question.id}: two records have this id: remove or rename one")
                seen.add(question.id)
                if (path := question.image_path) and (other := files.setdefault(normal_name(path), path)) != path:
                    raise RecordError(
                        f"{question.id}: the images {other!a} and {path!a} have names that look the same: rename one"
                    )
        return parts

    def setup(self, stage: str) -> None:
        """Reads the data, so that an invalid record is reported before a model is loaded.

        Raises:
            RecordError: The data can't be read; or images are missing (for ``predict``: all images). A missing image
                makes only the questions about it fail; training needs every image.
        """
        parts = self.parts
        examples = parts.predict if stage == "predict" else [*parts.train, *parts.validation]
        about = {each.question.image_path: each.question for each in examples if each.question.image_path is not None}
        missing = [path for path in about if not Path(path).exists()]
        if missing and (stage != "predict" or len(missing) == len(about) > 1) and self.image_files():
            raise RecordError(
                f"data: {len(missing)} of {len(about)} images are missing, for example {printable(missing[0])} "
                f"({printable(about[missing[0]].id)}): add the files, or remove their records"
            )

    def skip(self, ids: Collection[str]) -> None:
        """Excludes questions from prediction; must be called before :meth:`predict_dataloader`.

        Args:
            ids: Ids of the questions that already have a response, equal on all processes.
        """
        self._skipped = ids

    def remaining(self) -> list[Example]:
        """Returns the examples that are still to be predicted, on all processes together."""
        return [example for example in self.parts.predict if example.question.id not in self._skipped]

    def most_repeats(self) -> int:
        """Returns how often the most repeated question is asked."""
        return self.repeats

    def completions_at(self, validation: bool) -> str:
        """Returns where the user's completions are: file, line and field; empty if the class itself builds them.

        Args:
            validation: Whether the held-out examples are meant, not those to train on.
        """
        return ""

    def image_files(self) -> dict[str, str]:
        """Returns the file of each image used, by the image's name; empty if no image is used."""
        files: dict[str, str] = {}
        for part in ("train", "validation", "predict"):
            for question in (example.question for example in getattr(self.parts, part)):
                if (path := question.image_path) is not None and files.setdefault(question.image, path) != path:
                    files[f"{part}: {question.image}"] = path  # images of this name in two folders
        return files

    def describe(self) -> dict[str, Any]:
        """Describes everything in the data that determines the result, as plain JSON values.

        For each split, the description has the number of examples, a hash of their ids, and a hash of their questions
        and completions. It also has a hash of the names and contents of the images; the location of the image files has
        no effect. Animated images are reported.
        """
        description: dict[str, Any] = {"class": f"{type(self).__module__}.{type(self).__qualname__}"}
        if self._groups() is not None:
            description["questions_together"] = True
        dataset = type(self).__name__
        for name in ("train", "validation", "predict"):
            examples: list[Example] = getattr(self.parts, name)
            if examples:
                contents = (to_line(example.question.to_dict() | {"image_path": None}) for example in examples)
                description[name] = {
                    "examples": len(examples),
                    "ids": fingerprint("\n".join(example.question.id for example in examples)),
                    "content": fingerprint("".join(contents), *(c for e in examples for c in e.completions)),
                }
                dataset = examples[0].question.dataset
        if files := self.image_files():
            if self.trainer is None or self.trainer.is_global_zero:
                report_frames(dataset, files)
            description["images"] = images_fingerprint(files)
        return description

    def train_dataloader(self) -> TrainingLoader:
        """Returns the training examples, shuffled by (seed, epoch); see :class:`TrainingLoader`.

        Raises:
            ArgumentError: The batch size is ``auto``, no collator is set, or the saved position belongs to another
                order.
            RecordError: There are no training examples, or fewer than processes.
        """
        if self.automatic:
            raise ArgumentError("data.batch_size: auto is for predicting; training needs a number")
        if not self.parts.train:
            raise RecordError(
                f"data: {type(self).__name__} has nothing to train on: use one of safervlm.data.alignment"
            )
        self._training = TrainingLoader(
            self.parts.train,
            self._collator(),
            self.batch_size,
            self.num_workers,
            self.seed,
            *self._place(),
            current_epoch=lambda: self.trainer.current_epoch if self.trainer is not None else 0,
            groups=self._groups(),
        )
        if self._position is not None:
            self._training.load_state_dict(self._position)
            self._position = None
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the training loader.

        Lightning saves it too, but does not restore it to a loader that was created before the checkpoint was read.
        This is the case if a model uses ``trainer.estimated_stepping_batches`` to configure its schedule.
        """
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position, in the existing training loader or else in the next one."""
        if self._training is None:
            self._position = state_dict
        else:
            self._training.load_state_dict(state_dict)

    def val_dataloader(self) -> OrderedLoader | list[OrderedLoader]:
        """Returns the held-out examples in order; no loader if nothing is held out."""
        examples = self.parts.validation
        if not examples:
            return []
        batches = validation_batches(len(examples), self.batch_size, *self._place())
        return OrderedLoader(examples, batches, len(batches), self._collator(), self.num_workers)

    def predict_dataloader(self) -> OrderedLoader:
        """Returns all examples that are not skipped, with the questions about an image together.

        Raises:
            ArgumentError: No collator is set.
            RecordError: There is nothing to predict.
        """
        if not self.parts.predict:
            raise RecordError(f"data: {type(self).__name__} has nothing to predict: use UnsafeConcepts or OwnData")
        examples = self.remaining()
        rank, world_size = self._place()
        batches = prediction_batches(examples, self.batch_size, world_size)
        # Lightning skips a loop of length 0, including its hooks. The length is therefore that of the longest rank, at
        # least 1: a process without examples still runs the hooks in which the other processes wait for it, and a
        # run that is already complete still merges its files.
        length = max(1, *map(len, batches))
        return OrderedLoader(examples, batches[rank], length, self._collator(), self.num_workers)

    def _groups(self) -> list[list[int]] | None:
        """Returns the training examples that stay together; None if there are no such examples."""
        groups = image_groups(self.parts.train) if self.questions_together else []
        return groups if len(groups) < len(self.parts.train) and groups else None

    def _collator(self) -> Collator:
        if self.collator is None:
            raise ArgumentError(
                "data.collator: none is set: pass the model's, as in UnsafeConcepts(collator=model.collator)"
            )
        return self.collator

    def _place(self) -> tuple[int, int]:
        """Returns the rank of this process and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def repeated(examples: Sequence[Example], repeats: int) -> list[Example]:
    """Repeats each example. Each repetition has its own id, and its response is sampled independently.

    Args:
        examples: Examples to predict.
        repeats: How often each is to be asked.

    Returns:
        The repetitions of an example follow each other.
    """
    return [
        replace(each, question=replace(each.question, id=repeated_id(each.question.id, number)))
        for each in examples
        for number in range(1, repeats + 1)
    ]


def text_field(record: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """Returns the text of a record's field.

    Args:
        record: Record read from a file.
        names: Name of the field and its alternative names; the first one present is used.
        where: File and line, for the error message.

    Raises:
        RecordError: The field is missing, empty or not a text.
    """
    for name in names:
        if name in record:
            if isinstance(value := record[name], str) and value.strip():
                return value
            raise RecordError(f"{where}: the field {name!r} must be a text that isn't empty, got {value!r}")
    raise RecordError(f"{where}: the field {' or '.join(map(repr, names))} is missing; it has {sorted(record)}")


def name_field(record: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """Returns the text of a record's field, normalised as a name (see :func:`safervlm.io.names.normal_name`).

    Args:
        record: Record read from a file.
        names: Name of the field and its alternative names; the first one present is used.
        where: File and line, for the error message.

    Raises:
        RecordError: The field is missing, empty or not a text.
    """
    if name := normal_name(text_field(record, names, where)):
        return name
    raise RecordError(f"{where}: the field {' or '.join(map(repr, names))} must be a text that isn't empty")
