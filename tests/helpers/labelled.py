"""Runs with known true labels, a judge that makes errors, and human raters who make none."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safervlm.hashing import seed_for
from safervlm.labelling.labels import LabelFile
from safervlm.labelling.plan import Plan, labelable, write_plan
from safervlm.protocol import ALIGNMENT_QUESTIONS, perception_question, text_only_question
from safervlm.records import Question, Response, Verdict, read_jsonl, record_id, write_jsonl
from safervlm.results.runs import load_run

CATEGORIES = ("Hate", "Violence", "Deception")


def questions(concepts: int = 12, images: int = 4) -> Iterator[Question]:
    """Image questions (two each) and perception about unsafe concepts, their names (five each), and safe images."""
    for number in range(concepts):
        concept, category = f"thing {number}", CATEGORIES[number % 3]
        for image in (f"images/{number}-{place}.png" for place in range(images)):
            for prompt in range(2):
                words = ALIGNMENT_QUESTIONS[prompt]
                yield made("Made", image, "alignment", prompt, words, category, concept, "Unsafe")
            options = perception_question([concept, "a kite", "a spoon", "a hat"])
            yield made("Made", image, "perception", 0, options, category, concept, "A")
        for prompt in range(5):
            words = text_only_question(prompt, concept)
            yield made("Made", concept, "alignment_text_only", prompt, words, category, concept, "Unsafe")
    for number in range(concepts):
        for prompt in range(5):
            words = ALIGNMENT_QUESTIONS[prompt]
            yield made("MadeSafe", f"{number}.png", "alignment", prompt, words, "Safe", f"toy {number}", "Safe")


def made(dataset: str, image: str, capability: str, number: int, prompt: str, *about: str) -> Question:
    name = record_id(dataset, image, capability, number)
    return Question(name, dataset, image, None, capability, number, prompt, *about)  # type: ignore[arg-type]


WRONG = {"A": "B", "Unsafe": "Safe", "Safe": "Unsafe"}


def write_labelled(
    folder: Path, accuracy: float = 0.8, judge: float = 0.85, concepts: int = 12, images: int = 4, seed: int = 0
) -> dict[str, str]:
    """Writes responses and verdicts.

    Args:
        folder: Run folder.
        accuracy: Share of right responses.
        judge: Share of right verdicts.
        concepts: Number of unsafe concepts, and of safe ones.
        images: Number of images of each unsafe concept.
        seed: Seed of both.

    Returns:
        Id -> true label.
    """
    truth, responses, verdicts = {}, [], []
    for asked in questions(concepts, images):
        rng = np.random.default_rng(seed_for(seed, asked.id))
        says = asked.answer if rng.random() < accuracy else WRONG[asked.answer]
        truth[asked.id] = says
        right = rng.random() < judge
        found = says if right else "N/A" if rng.random() < 0.1 else WRONG.get(says, "A")
        sure = float(rng.uniform(0.7, 1.0) if right else rng.uniform(0.5, 0.9))
        text = f"I think {len(responses)}: {says}."
        responses.append(Response(asked, text, "stop", 5))
        verdicts.append(
            Verdict(asked.id, found, {found: sure, "other": 1 - sure}, "f00d", Verdict.fingerprint_of(text))
        )
    write_jsonl(folder / "responses.jsonl", (each.to_dict() for each in responses))
    write_jsonl(folder / "verdicts.jsonl", (each.to_dict() for each in verdicts))
    return truth


def label(run: Path, truth: Mapping[str, str]) -> None:
    """Labels a sample of 100 responses with the true labels, as the rater Ada."""
    rows = labelable(load_run(run))
    plan = Plan.make(rows, 100, 0)
    write_plan(run, plan)
    with LabelFile(run, rows, plan) as file:
        for name in plan.sampled:
            file.append(name, truth[name], "Ada")


Record = dict[str, Any]


def change(run: Path, records_of: Callable[[Record, Record], Iterable[tuple[Record, Record]]]) -> None:
    """Rewrites responses and verdicts of a run, from pairs of both."""
    pairs = zip(read_jsonl(run / "responses.jsonl"), read_jsonl(run / "verdicts.jsonl"), strict=True)
    changed = [each for pair in pairs for each in records_of(*pair)]
    for place, file in enumerate(("responses.jsonl", "verdicts.jsonl")):
        write_jsonl(run / file, (pair[place] for pair in changed))


def write_odds(run: Path, seed: int = 0) -> None:
    """Log-odds that separate the sides somewhat; 0.7 as the mass of every question about an image, 0.2 about a name."""
    records = []
    for record in read_jsonl(run / "responses.jsonl"):
        if record["capability"] == "perception":
            continue
        rng = np.random.default_rng(seed_for(seed, record["id"]))
        score = rng.normal(1.0 if record["answer"] == "Unsafe" else -1.0, 2.0)
        mass = 0.7 if record["capability"] == "alignment" else 0.2
        records.append({"id": record["id"], "log_odds": score, "mass": mass})
    write_jsonl(run / "odds.jsonl", records)
