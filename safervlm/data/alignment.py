"""What is trained on: the unsafe and the safe set as SFT, DPO and PPO see them, and your own file.

As published, each training image is asked one of the five alignment questions, drawn at random; what an objective
wants scored follows from the question and the image's label.
"""

import os
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safervlm.data.base import Collator, Parts, SaferData, limited, name_field, text_field
from safervlm.data.contexts import context_questions, read_contexts
from safervlm.data.image_folders import named_file
from safervlm.data.unsafe_concepts import HUB_REPO, SAFE_HUB_REPO, ImageRecord, ImageSets, PartName, spread
from safervlm.errors import RecordError
from safervlm.names import normal_name, path_text, set_name
from safervlm.outputs import refuse_to_replace_texts
from safervlm.protocol import ALIGNMENT_QUESTIONS, SAFE, UNSAFE, aligned_response, context_response, other_label
from safervlm.reading import json_text, numbered_jsonl
from safervlm.records import Example, Question, record_id, seed_for, write_atomically
from safervlm.tables import say

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


class OwnData(SaferData):
    """Your own questions and completions, for any objective and for predict.

    A JSONL file, a line an example::

        {"image": "images/1.png", "prompt": "Is this safe for children?", "label": "Safe",
         "completions": ["Yes, it shows a garden."]}

    ``image`` is relative to the file's folder and stays in it. ``completions``: one for SFT, two for DPO (chosen, then
    rejected), none for PPO and predict; the same number in every line. ``label`` (Safe or Unsafe), the right answer,
    is needed where there are no completions. Optional: ``id`` (default: name/image/alignment/n for the image's n-th
    question), ``category`` (default: the set's name), ``concept`` (what the image shows).

    Args:
        file: the JSONL file.
        validation_file: a second one, to look at while training.
        name: the set's name, the first part of the ids.
        collator: makes a batch of examples; the model's, set by the command line.
        batch_size: examples a step and process.
        num_workers: processes that load images ahead; 0 loads them in the main process.
        seed: of the training order.
        limit: takes this many examples of each label from each file; None takes all.
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
    ) -> None:
        super().__init__(collator, batch_size, num_workers, seed)
        self.limit = limit
        limited((), limit, hash)
        self.file = path_text("data.file", file)
        self.validation_file = None if validation_file is None else path_text("data.validation_file", validation_file)
        self.dataset = set_name("data.name", name)

    def load(self) -> Parts:
        """The examples of the files; those to predict are the training file's questions."""
        train = read_examples(Path(self.file), self.dataset)
        validation = (
            read_examples(Path(self.validation_file), self.dataset, "data.validation_file")
            if self.validation_file
            else []
        )
        train, validation = (limited(part, self.limit, lambda e: e.question.answer) for part in (train, validation))
        return Parts(train, validation, predict=[Example(example.question) for example in train])

    def describe(self) -> dict[str, Any]:
        """See :meth:`SaferData.describe`; with the seed."""
        return super().describe() | {"name": self.dataset, "seed": self.seed}


def read_examples(file: Path, name: str, argument: str = "data.file") -> list[Example]:
    """The examples of a JSONL file of the form that :class:`OwnData` describes.

    Args:
        file: the JSONL file; images are relative to its folder.
        name: the set's name.
        argument: the setting that names the file, for the error.

    Raises:
        RecordError: the file is missing or empty, or a record can't be used; the message names record and field.
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
        completions = record.get("completions", [])
        if not isinstance(completions, list) or not all(isinstance(text, str) and text for text in completions):
            raise RecordError(f"{where}: the field 'completions' must be a list of texts, got {completions!r}")
        if examples and len(completions) != len(examples[0].completions):
            raise RecordError(
                f"{where}: {len(completions)} completions, the records before have {len(examples[0].completions)}: "
                "every record needs the same number"
            )
        label = record.get("label", "")
        label = normal_name(label) if isinstance(label, str) else label
        if label not in (SAFE, UNSAFE) and (label or not completions):
            raise RecordError(f"{where}: the field 'label' must be {SAFE!r} or {UNSAFE!r}, got {label!r}")
        question = Question(
            id=text_field(record, ("id",), where)
            if "id" in record
            else record_id(name, image, "alignment", asked[image]),
            dataset=name,
            image=image,
            image_path=str(named_file(file.parent, image, where)),
            capability="alignment",
            prompt_number=asked[image],
            prompt=text_field(record, ("prompt",), where),
            category=name_field(record, ("category",), where) if "category" in record else name,
            concept=name_field(record, ("concept",), where) if "concept" in record else "",
            answer=label,
        )
        asked[image] += 1
        examples.append(Example(question, tuple(completions)))
    if not examples:
        raise RecordError(f"{argument}: {file} is empty: it needs a line an example")
    return examples


def export_training_files(
    out: str,
    folder: str | None = None,
    safe_folder: str | None = None,
    repo: str = HUB_REPO,
    safe_repo: str | None = SAFE_HUB_REPO,
    cache_dir: str = "~/.cache/safervlm",
    seed: int = 0,
    limit: int | None = None,
) -> None:
    """Writes the training data in the first implementation's formats.

    The files are sft_train.json, dpo_train.json, ppo_train.json and test_data.json. Their image names are relative to
    the folder that both sets lie in: the first implementation's image folder.

    Args:
        out: the folder to write them to.
        folder: the unsafe set's local folder; None takes it from the Hub.
        safe_folder: the safe set's local folder; None takes it from the Hub.
        repo: the unsafe set on the Hub, ``owner/name`` or ``owner/name@revision``.
        safe_repo: the safe set on the Hub; None exports no safe images unless ``safe_folder`` is given.
        cache_dir: where sets of the Hub are kept.
        seed: of the questions drawn.
        limit: exports this many images of each set and part, spread over categories and concepts; None exports all.

    Raises:
        ArgumentError: one of the files is there already, with other content.
    """
    path_text("--out", out)
    sft, dpo = (
        data(folder, safe_folder, repo, safe_repo, cache_dir=cache_dir, seed=seed, limit=limit)
        for data in (SFTData, DPOData)
    )
    sft.prepare_data()
    # Files, so that one set alone has the folder above its own as image folder.
    metadata = [part / "metadata.jsonl" for part in (sft.folder, sft.safe_folder) if part is not None]
    root = os.path.commonpath([file.resolve().parent.parent for file in metadata])

    def name(path: str | None) -> str:
        return Path(str(path)).resolve().relative_to(root).as_posix()

    files: dict[str, list[dict[str, Any]]] = {"sft": [], "dpo": [], "ppo": []}
    for example, pair in zip(sft.parts.train, dpo.parts.train, strict=True):
        question = example.question
        image, prompt = name(question.image_path), f"<image>\n{question.prompt}"
        (response,) = example.completions
        chosen, rejected = pair.completions
        files["sft"].append(
            {
                "image": image,
                "conversations": [{"from": "user", "value": prompt}, {"from": "assistant", "value": response}],
            }
        )
        files["dpo"].append({"image": image, "prompt": prompt, "chosen": chosen, "rejected": rejected})
        files["ppo"].append(
            {
                "image": image,
                "label": question.answer,
                "concept": question.concept.lower(),
                "type": "YORN",
                "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": ""}],
            }
        )
    test = [image for images in sft.images("test") for image in spread(images, limit)]
    written = {f"{objective}_train.json": records for objective, records in files.items()}
    written["test_data.json"] = [
        {"image_fname": name(image.path), "concept": image.concept, "label": image.label} for image in test
    ]
    texts = {Path(out) / file: json_text(records, indent=2, name=file) for file, records in written.items()}
    refuse_to_replace_texts("--out", texts)
    for file, text in texts.items():
        write_atomically(file, partial(Path.write_text, data=text, encoding="utf-8"))
    say(f"{out} holds {', '.join(written)}")
