"""Custom training examples, read from JSON lines."""

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from safervlm.data.image_folders import named_file
from safervlm.data.loaders import Collator, limited
from safervlm.data.module import Parts, SaferData, name_field, text_field
from safervlm.errors import RecordError
from safervlm.io.names import normal_name, path_text, set_name
from safervlm.io.reading import numbered_jsonl
from safervlm.protocol import SAFE, UNSAFE
from safervlm.ranges import in_range
from safervlm.records import Example, Question, record_id


class OwnData(SaferData):
    """Custom questions and completions, for any objective and for predict.

    The data is a JSONL file with one example per line::

        {"image": "images/1.png", "prompt": "Is this safe for children?", "label": "Safe",
         "completions": ["Yes, it shows a garden."]}

    ``image`` is a path relative to the file's folder and must lie inside it. ``completions`` has one text for SFT, two
    for DPO (chosen, then rejected) and none for PPO, GRPO and predict; every line has the same number. ``label`` (Safe
    or Unsafe) is the correct answer; it is required if there are no completions. Optional fields: ``id`` (default:
    name/image/alignment/n for the image's n-th question, from 0), ``category`` (default: the dataset's name) and
    ``concept`` (what the image shows).

    Args:
        file: JSONL file with the training examples.
        validation_file: JSONL file with held-out examples, evaluated during training.
        name: Name of the dataset, the first component of the record ids.
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of examples per step and process.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.
        seed: Seed of the training order.
        limit: Maximum number of examples per label and file. None uses all.
        repeats: How often each question is asked when predicting. Each repetition has its own id, the question's id
            with ``#2`` and so on, and is sampled independently; scores are means over them.
        questions_together: Whether training keeps the questions about an image together, in random order, so that they
            share its computation. Without effect where each image has one question.

    Raises:
        ArgumentError: A number is outside its range, or a path or name is invalid.
    """

    def __init__(
        self,
        file: str,
        validation_file: str | None = None,
        name: str = "Own",
        collator: Collator | None = None,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        repeats: int = 1,
        questions_together: bool = True,
    ) -> None:
        super().__init__(collator, batch_size, num_workers, seed)
        self.questions_together = questions_together
        in_range("data", least=1, repeats=repeats)
        self.repeats = repeats
        self.limit = limit
        limited((), limit, hash)
        self.file = path_text("data.file", file)
        self.validation_file = None if validation_file is None else path_text("data.validation_file", validation_file)
        self.dataset = set_name("data.name", name)

    def load(self) -> Parts:
        """Reads the examples of both files. The examples to predict are the questions of the training file."""
        train = read_examples(Path(self.file), self.dataset)
        validation = (
            read_examples(Path(self.validation_file), self.dataset, "data.validation_file")
            if self.validation_file
            else []
        )
        train, validation = (limited(part, self.limit, lambda e: e.question.answer) for part in (train, validation))
        return Parts(train, validation, predict=[Example(example.question) for example in train])

    def setup(self, stage: str) -> None:
        """Extends :meth:`SaferData.setup`.

        Raises:
            RecordError: To predict, a question has no label: its response could not be scored.
        """
        super().setup(stage)
        if stage == "predict" and not all(example.question.answer for example in self.parts.predict):
            line = next(number for number, record in numbered_jsonl(Path(self.file)) if not record.get("label"))
            raise RecordError(
                f"{self.file}, line {line}: the field 'label' ({SAFE!r} or {UNSAFE!r}) is missing; a measurement needs "
                "the right answer of every question"
            )

    def completions_at(self, validation: bool) -> str:
        """Returns file, line and field of the first record's completions; every record has the same number of them.

        Args:
            validation: Whether the held-out examples are meant, not those to train on.
        """
        file = Path(str(self.validation_file if validation else self.file))
        line = next(number for number, _ in numbered_jsonl(file))
        return f"{file}, line {line}: the field 'completions'"

    def describe(self) -> dict[str, Any]:
        """Extends :meth:`SaferData.describe` by the dataset's name and the seed."""
        return super().describe() | {"name": self.dataset, "seed": self.seed}


def read_examples(file: Path, name: str, argument: str = "data.file") -> list[Example]:
    """Reads the examples of a JSONL file in the format described by :class:`OwnData`.

    Args:
        file: JSONL file. Paths of images are relative to its folder.
        name: Name of the dataset.
        argument: Setting that names the file, for the error message.

    Returns:
        One example per line.

    Raises:
        RecordError: The file is missing or empty, or a record can't be used. The message names the line and the field.
    """
    if not file.is_file():
        raise RecordError(f"{argument}: {file} is missing: name a JSONL file")
    examples: list[Example] = []
    asked: Counter[str] = Counter()
    for number, record in numbered_jsonl(file):
        where = f"{file}, line {number}"
        if unknown := set(record) - {"id", "image", "prompt", "completions", "label", "category", "concept"}:
            raise RecordError(f"{where}: unknown field {sorted(unknown)[0]!r}: see OwnData for the fields")
        image = text_field(record, ("image",), where)
        shown = normal_name(image)
        completions = record.get("completions", [])
        if not isinstance(completions, list) or not all(isinstance(text, str) and text.strip() for text in completions):
            raise RecordError(
                f"{where}: the field 'completions' must be a list of texts that aren't empty, got {completions!r}"
            )
        if examples and len(completions) != len(examples[0].completions):
            raise RecordError(
                f"{where}: {len(completions)} completions, the records before have {len(examples[0].completions)}: "
                "every record needs the same number"
            )
        label = record.get("label", "")
        label = normal_name(label) if isinstance(label, str) else label
        if label not in (SAFE, UNSAFE) and (label != "" or not completions):
            raise RecordError(f"{where}: the field 'label' must be {SAFE!r} or {UNSAFE!r}, got {label!r}")
        question = Question(
            id=name_field(record, ("id",), where)
            if "id" in record
            else record_id(name, shown, "alignment", asked[shown]),
            dataset=name,
            image=shown,
            image_path=str(named_file(file.parent, image, where)),
            capability="alignment",
            prompt_number=asked[shown],
            prompt=text_field(record, ("prompt",), where),
            category=name_field(record, ("category",), where) if "category" in record else name,
            concept=name_field(record, ("concept",), where) if "concept" in record else "",
            answer=label,
        )
        asked[shown] += 1
        examples.append(Example(question, tuple(completions)))
    if not examples:
        raise RecordError(f"{argument}: {file} is empty: it needs one line per example")
    return examples
