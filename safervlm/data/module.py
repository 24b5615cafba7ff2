"""The base class of the data modules: splits, limits and loaders."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from safervlm.data.loaders import (
    AUTOMATIC,
    Collator,
    OrderedLoader,
    TrainingLoader,
    prediction_batches,
    validation_batches,
)
from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import fingerprint
from safervlm.io.image_hashes import images_fingerprint, report_frames
from safervlm.io.names import normal_name
from safervlm.ranges import in_range
from safervlm.records import Example, to_line


@dataclass(frozen=True)
class Parts:
    """What a data module holds.

    Attributes:
        train: to train on.
        validation: held out, to look at while training.
        predict: to be answered or judged.
    """

    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    predict: list[Example] = field(default_factory=list)


class SaferData(LightningDataModule):
    """What every data module shares; a subclass says what it holds (:meth:`load`).

    Attributes:
        keeps_others: whether records of questions that are not asked now, but were before, stay in the run folder.

    Args:
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: examples a step and process; ``auto``, for predicting, begins with 256 and halves them until they
            fit into the memory of the GPU.
        num_workers: processes that load images ahead; 0 loads them in the main process.
        seed: of the training order.
    """

    keeps_others = False

    def __init__(
        self,
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        in_range("data", least=1, batch_size=None if batch_size == "auto" else batch_size)
        in_range("data", least=0, num_workers=num_workers)
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
        """Reads the data; called once, before anything is computed.

        Raises:
            RecordError: a record that can't be used.
        """
        raise NotImplementedError

    @cached_property
    def parts(self) -> Parts:
        """What :meth:`load` read, its ids checked.

        Raises:
            RecordError: two examples of a part have the same id.
        """
        parts = self.load()
        for examples in (parts.train, parts.validation, parts.predict):
            seen = set()
            for example in examples:
                if example.question.id in seen:
                    raise RecordError(f"{example.question.id}: two records have this id: remove or rename one")
                seen.add(example.question.id)
        return parts

    def setup(self, stage: str) -> None:
        """Reads the data, so that a bad record is found before a model is loaded."""
        _ = self.parts

    def skip(self, ids: Collection[str]) -> None:
        """Leaves out what has been done, when it is called before :meth:`predict_dataloader`.

        Args:
            ids: of the questions that have their answer; the same on every process.
        """
        self._skipped = ids

    def remaining(self) -> list[Example]:
        """What is to be predicted and isn't skipped, on all processes together."""
        return [example for example in self.parts.predict if example.question.id not in self._skipped]

    def image_files(self) -> dict[str, str]:
        """The file of each image that is looked at, by the image's name; none where nothing is shown to a model."""
        files: dict[str, str] = {}
        for part in ("train", "validation", "predict"):
            for question in (example.question for example in getattr(self.parts, part)):
                if (path := question.image_path) is not None and files.setdefault(question.image, path) != path:
                    files[f"{part}: {question.image}"] = path  # two folders have an image of this name
        return files

    def describe(self) -> dict[str, Any]:
        """What decides the result, as plain JSON values.

        For each part the number of examples and hashes of their ids and of all that is asked and answered, and a hash
        of the images' names and contents; where the image files lie decides nothing. Animations among them are
        reported.
        """
        description: dict[str, Any] = {"class": f"{type(self).__module__}.{type(self).__qualname__}"}
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
        """Shuffled by (seed, epoch); see :class:`TrainingLoader`."""
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
        )
        if self._position is not None:
            self._training.load_state_dict(self._position)
            self._position = None
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """The position of the training loader.

        Lightning keeps it too, but doesn't give it back to a loader that was made before the checkpoint was read, as it
        is where a model asks for ``trainer.estimated_stepping_batches`` to configure its schedule.
        """
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at that position, with the training loader that there is or else with the next one."""
        if self._training is None:
            self._position = state_dict
        else:
            self._training.load_state_dict(state_dict)

    def val_dataloader(self) -> OrderedLoader | list[OrderedLoader]:
        """The held-out examples in order; no loader where nothing is held out."""
        examples = self.parts.validation
        if not examples:
            return []
        batches = validation_batches(len(examples), self.batch_size, *self._place())
        return OrderedLoader(examples, batches, len(batches), self._collator(), self.num_workers)

    def predict_dataloader(self) -> OrderedLoader:
        """Everything that isn't skipped, the questions about an image together."""
        if not self.parts.predict:
            raise RecordError(f"data: {type(self).__name__} has nothing to predict: use UnsafeConcepts or OwnData")
        examples = self.remaining()
        rank, world_size = self._place()
        batches = prediction_batches(examples, self.batch_size, world_size)
        # Lightning skips a loop of length 0, hooks and all. So the length is that of the longest rank, at least 1: a
        # process with nothing left to do still runs the hooks in which the others wait for it, and a run that is
        # complete already still merges what it wrote.
        length = max(1, *map(len, batches))
        return OrderedLoader(examples, batches[rank], length, self._collator(), self.num_workers)

    def _collator(self) -> Collator:
        if self.collator is None:
            raise ArgumentError(
                "data.collator: none is set: pass the model's, as in UnsafeConcepts(collator=model.collator)"
            )
        return self.collator

    def _place(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def text_field(record: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The text under the first of the names that the record has.

    Args:
        record: read from a file.
        names: the field's name, and other names that it may go by.
        where: file and record, for the error.

    Raises:
        RecordError: the field is missing or no text.
    """
    for name in names:
        if name in record:
            if isinstance(value := record[name], str) and value:
                return value
            raise RecordError(f"{where}: the field {name!r} must be a text that isn't empty, got {value!r}")
    raise RecordError(f"{where}: the field {' or '.join(map(repr, names))} is missing; it has {sorted(record)}")


def name_field(record: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The name under the first of the names that the record has, in its one spelling.

    Args:
        record: read from a file.
        names: the field's name, and other names that it may go by.
        where: file and line, for the error.

    Raises:
        RecordError: the field is missing, no text, or empty.
    """
    if name := normal_name(text_field(record, names, where)):
        return name
    raise RecordError(f"{where}: the field {' or '.join(map(repr, names))} must be a text that isn't empty")
