"""Run folders of evaluations with known responses."""

import json
from pathlib import Path

from safervlm.judging import rules
from safervlm.protocol import ALIGNMENT_QUESTIONS
from safervlm.records import Failure, Question, Response, Verdict, record_id, write_jsonl
from safervlm.run import write_stage


def question(dataset, image, capability, number, answer, category="", concept="", **more):
    name = record_id(dataset, image, capability, number)
    prompt = ALIGNMENT_QUESTIONS[number % 5]
    return Question(name, dataset, image, None, capability, number, prompt, category, concept, answer, **more)


def write(folder, answers, failed=(), ratings=(), both_orders=False):
    """Writes a run folder. ``answers``: (question, response, label); label None: classified by a rule."""
    responses, verdicts = [], []
    for asked, said, label in answers:
        responses.append(Response(asked, said, "stop", 1).to_dict())
        if asked.capability == "rated":
            continue
        if label is None:
            read = rules.apply_rule(asked.capability, asked.answer, said)
            label = max(read, key=read.get)
        verdicts.append(Verdict(asked.id, label, {label: 1.0}, "judge").to_dict())
    write_jsonl(folder / "responses.jsonl", responses)
    write_jsonl(folder / "verdicts.jsonl", verdicts)
    shown = sorted({str(Path(asked.image_path).parent) for asked, *_ in answers if asked.image_path})
    (folder / "predict.yaml").write_text(json.dumps({"data": {"init_args": {"folders": shown}}}))
    if failed:
        write_jsonl(folder / "responses-failed.jsonl", [Failure(each, "damaged").to_dict() for each in failed])
    if ratings:
        write_jsonl(folder / "ratings.jsonl", [rating.to_dict() for rating in ratings])
        write_stage(folder, "ratings", settings={"judge": {"model": "judge"}, "both_orders": both_orders})
    return folder


def safety(rng, right=0.7):
    """12 unsafe and 12 safe concepts of two images, five questions each, one of them sampled; SMID; contexts."""
    answers = []
    for side, dataset in (("Unsafe", "U"), ("Safe", "S")):
        for concept in range(12):
            for image in range(2):
                for number in range(5):
                    asked = question(
                        *(dataset, f"{concept}-{image}.png", "alignment", number, side),
                        *("Hate" if side == "Unsafe" else "S", f"{side}{concept}"),
                        drawn=number == image,
                    )
                    label = side if rng.random() < right else rng.choice(["Safe", "Unsafe", "N/A"])
                    answers.append((asked, f"{label}, {concept} {rng.integers(3)} and so on", str(label)))
    for image in range(40):
        asked = question("SMID", str(image), "generalisation", 0, ("Safe", "Unsafe")[image % 2], "SMID", drawn=True)
        answers.append((asked, "Yes", "Safe" if rng.random() < right else "Unsafe"))
    for concept in range(12):
        for number, label in enumerate(("Safe", "Unsafe")):
            asked = question("U", f"{concept}.png", "context", number, label, "Hate", f"Unsafe{concept}")
            answers.append((asked, "Yes", "Safe"))
    return answers
