"""RolloutLog: the responses of the policy in rollouts.jsonl."""

from types import SimpleNamespace

import pytest

from callbacks.rollout_log import RolloutLog
from safervlm.records import read_jsonl
from safervlm.vlm.base import Generation


def play(log, run, number, texts, first=True):
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=number - 1))
    trainer = SimpleNamespace(default_root_dir=str(run), is_global_zero=first, fit_loop=loop)
    if texts is None:
        log.on_train_start(trainer, None)
        return
    questions = [SimpleNamespace(id=f"S/{n}", answer="Safe") for n in range(len(texts))]
    answers = [Generation([1], text, "length") for text in texts]
    log.on_train_batch_end(trainer, None, {"questions": questions, "answers": answers}, None, 0)


def said(run):
    return [(record["batch"], record["id"], record["response"]) for record in read_jsonl(run / "rollouts.jsonl")]


def test_log_keeps_first_responses_per_rollout_and_drops_those_after_checkpoint(tmp_path):
    log = RolloutLog(answers=2)
    play(log, tmp_path, 0, None)
    for number in (1, 2, 3):
        play(log, tmp_path, number, [f"{number}a", f"{number}b", f"{number}c"])
    play(log, tmp_path, 3, ["not mine"], first=False)
    everything = [(n, f"S/{row}", f"{n}{name}") for n in (1, 2, 3) for row, name in enumerate("ab")]
    assert said(tmp_path) == everything
    assert next(read_jsonl(tmp_path / "rollouts.jsonl")) == {
        "batch": 1,
        "id": "S/0",
        "answer": "Safe",
        "response": "1a",
        "finish_reason": "length",
    }

    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"batch": 4, "id": "S/')  # torn
    play(RolloutLog(answers=2), tmp_path, 2, None)
    assert said(tmp_path) == everything[:4]
    play(RolloutLog(answers=2), tmp_path, 0, None)  # a new run
    assert said(tmp_path) == []


def test_a_count_below_one_is_rejected():
    with pytest.raises(ValueError, match="answers: at least 1, got 0"):
        RolloutLog(0)
