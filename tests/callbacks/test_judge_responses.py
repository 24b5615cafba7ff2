"""JudgeResponses: classification of responses directly after measuring."""

import math
import multiprocessing
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from callbacks.judge_responses import JudgeResponses
from callbacks.score_table import ScoreTable
from safervlm.errors import RecordError
from safervlm.judging.classifier import Judge
from safervlm.judging.panel import Panel
from safervlm.protocol import LABELS
from safervlm.records import Example, Failure, Question, Response, Verdict, read_jsonl, write_jsonl
from safervlm.results.runs import load_run


class LengthJudge(Judge):
    """Classifies a text by its length, and records the texts that it received."""

    def __init__(self, name, labels):
        super().__init__(labels=labels)
        self.name = name
        self.read = []

    def configure_model(self):
        """No weights."""

    @property
    def fingerprint(self):
        return self.name

    def batches(self, texts, batch_size=64):
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def judge(self, texts, batch_size=64):
        self.read += texts
        rows = [(len(text) - 1) % len(self.labels) for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(rows, dtype=torch.long), len(self.labels)).float().log()


def make_panel(alignment="alignment-1", perception="perception-1"):
    return Panel(LengthJudge(alignment, LABELS["alignment"]), LengthJudge(perception, LABELS["perception"]))


def responses(n):
    result = []
    for i in range(n):
        capability = ("perception", "alignment", "alignment_text_only")[i % 3]
        question = Question(f"S/{i}/{capability}/0", "S", str(i), None, capability, 0, "?", "Hate", "x", "A")
        result.append(Response(question, "x" * (i + 1), "stop", i))
    return result


def play(run, panel, rank=0, batch_size=2):
    trainer = SimpleNamespace(
        is_global_zero=rank == 0, default_root_dir=str(run), strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    JudgeResponses(panel, batch_size).on_predict_end(trainer, None)


def saved(run):
    return {record["id"]: (record["label"], record["judge"]) for record in read_jsonl(run / "verdicts.jsonl")}


def expected(n, alignment="alignment-1", perception="perception-1"):
    return {
        r.id: (LABELS["perception"][i % 5], perception) if i % 3 == 0 else (LABELS["alignment"][i % 3], alignment)
        for i, r in enumerate(responses(n))
    }


def test_every_response_gets_its_verdict_in_the_responses_order(tmp_path, capsys):
    write_jsonl(tmp_path / "responses.jsonl", [r.to_dict() for r in responses(100)])
    play(tmp_path, make_panel())  # more than one chunk of 16 batches
    assert "Judging: 100 % (" in capsys.readouterr().err
    assert saved(tmp_path) == expected(100)
    assert list(saved(tmp_path)) == [r.id for r in responses(100)]


def test_responses_with_a_verdict_are_not_classified_again(tmp_path):
    write_jsonl(tmp_path / "responses.jsonl", [r.to_dict() for r in responses(10)])
    play(tmp_path, make_panel())
    write_jsonl(tmp_path / "responses.jsonl", [r.to_dict() for r in responses(12)[1:]])
    panel = make_panel()
    play(tmp_path, panel)
    assert sorted(panel.alignment.read) == ["x" * 11, "x" * 12]
    assert panel.perception.read == []
    assert saved(tmp_path) == {name: verdict for name, verdict in expected(12).items() if name != "S/0/perception/0"}


def test_another_judges_verdicts_are_replaced(tmp_path, capsys):
    write_jsonl(tmp_path / "responses.jsonl", [r.to_dict() for r in responses(9)])
    play(tmp_path, make_panel())
    assert "replaced" not in capsys.readouterr().out
    panel = make_panel(alignment="alignment-2")
    play(tmp_path, panel)
    assert "6 verdicts of another judge are replaced" in capsys.readouterr().out
    assert panel.perception.read == []
    assert saved(tmp_path) == expected(9, alignment="alignment-2")
    assert list(saved(tmp_path)) == [r.id for r in responses(9)]


def test_only_the_first_process_judges(tmp_path):
    play(tmp_path, make_panel(), rank=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecordError, match=r"responses\.jsonl is missing"):
        play(tmp_path, make_panel())


class Panicking(LengthJudge):
    """Raises a BaseException for one text, like a panic of the tokenizers library."""

    def judge(self, texts, batch_size=64):
        if "x" * 5 in texts:
            raise BaseException("a panic")
        return super().judge(texts, batch_size)


def test_a_response_that_cannot_be_judged_is_listed_and_judged_again(tmp_path, capsys):
    write_jsonl(tmp_path / "responses.jsonl", (each.to_dict() for each in responses(9)))
    panel = Panel(Panicking("alignment-1", LABELS["alignment"]), LengthJudge("perception-1", LABELS["perception"]))
    play(tmp_path, panel)
    (bad,) = (each.id for each in responses(9) if each.response == "x" * 5)
    assert saved(tmp_path) == {name: verdict for name, verdict in expected(9).items() if name != bad}
    (failed,) = read_jsonl(tmp_path / "verdicts-failed.jsonl")
    assert failed["id"] == bad
    assert "a panic" in failed["reason"]
    play(tmp_path, make_panel())
    assert saved(tmp_path) == expected(9)
    assert not (tmp_path / "verdicts-failed.jsonl").exists()


@pytest.mark.parametrize("number", [1, 4])
def test_a_panel_lists_a_response_that_cannot_be_judged_among_its_verdicts(number):
    """The records that ``predict`` writes for saved responses."""
    asked = responses(9)
    asked[number] = replace(asked[number], response="x" * 5)
    panel = Panel(Panicking("a", LABELS["alignment"]), Panicking("p", LABELS["perception"]))
    batch = panel.collator([Example(each.question, (each.response,)) for each in asked])
    records = panel.predict_step(batch, 0)
    assert [record.id for record in records] == [each.id for each in asked]
    bad = {place for place, each in enumerate(asked) if each.response == "x" * 5}
    assert {place for place, record in enumerate(records) if isinstance(record, Failure)} == bad
    whole = make_panel("a", "p").judge([each for place, each in enumerate(asked) if place not in bad])
    assert [record for record in records if isinstance(record, Verdict)] == whole


def test_judge_loading_errors_are_not_recorded_as_response_failures():
    panel = make_panel()
    panel.perception.configure_model = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        panel.judged([(each.question, each.response) for each in responses(4)])


def test_score_table_accepts_a_run_without_verdicts(tmp_path, capsys):
    some = [each for each in responses(3) if each.question.capability == "alignment"]
    some = [replace(some[0], response="x" * 5)]
    write_jsonl(tmp_path / "responses.jsonl", (each.to_dict() for each in some))
    play(tmp_path, Panel(Panicking("a", LABELS["alignment"]), LengthJudge("p", LABELS["perception"])))
    ScoreTable().on_predict_end(SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path)), None)
    assert "no response has a verdict" in capsys.readouterr().out
    with pytest.raises(RecordError, match=r"verdicts-failed\.jsonl: no response could be judged"):
        load_run(tmp_path)


def test_unjudged_responses_are_excluded_from_the_scores_and_reported(tmp_path, capsys):
    asked = [each for each in responses(9) if each.question.capability != "perception"]
    some = [replace(each, question=replace(each.question, answer="Unsafe")) for each in asked]
    write_jsonl(tmp_path / "responses.jsonl", (each.to_dict() for each in some))
    play(tmp_path, Panel(Panicking("a", LABELS["alignment"]), LengthJudge("p", LABELS["perception"])))
    assert len(load_run(tmp_path)) == len(some) - 1
    assert "1 responses could not be judged and are excluded" in capsys.readouterr().out


class RoundingJudge(LengthJudge):
    """Its probabilities depend on the texts that it receives together, as rounding does; it may kill its process."""

    killed_at = None  # the call during which the process dies, from 1
    calls = 0

    def judge(self, texts, batch_size=64):
        self.calls += 1
        if self.calls == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        certain = super().judge(texts, batch_size).exp()
        rounded = 1e-6 * math.fsum(map(len, texts)) / 1000
        return (certain * (1 - len(self.labels) * rounded) + rounded).log()


def rounding_panel(killed_at=None):
    alignment = RoundingJudge("alignment-1", LABELS["alignment"])
    alignment.killed_at = killed_at
    return Panel(alignment, RoundingJudge("perception-1", LABELS["perception"]))


def files(run):
    return {file.name: file.read_bytes() for file in run.iterdir()}


def test_killed_judging_repeats_one_batch_and_ends_like_an_uninterrupted_one(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        folder.mkdir()
        write_jsonl(folder / "responses.jsonl", [each.to_dict() for each in responses(100)])
    uninterrupted = rounding_panel()
    play(whole, uninterrupted)
    for killed_at in (13, 5):  # in the second chunk of 16 batches of 2, then four batches further
        process = multiprocessing.get_context("fork").Process(target=play, args=(run, rounding_panel(killed_at)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with (run / "verdicts-unfinished.jsonl").open("ab") as file:
            file.write(b'{"records": [{"id": "S/0')  # a line that was being written
    panel = rounding_panel()
    play(run, panel)
    assert panel.alignment.calls == uninterrupted.alignment.calls - 12 - 4
    assert files(run) == files(whole)


def test_unfinished_batches_of_other_judges_or_texts_are_ignored(tmp_path):
    write_jsonl(tmp_path / "responses.jsonl", [each.to_dict() for each in responses(100)])
    process = multiprocessing.get_context("fork").Process(target=play, args=(tmp_path, rounding_panel(3)))
    process.start()
    process.join()
    changed = [replace(responses(100)[1], response="x"), *responses(100)[2:]]
    write_jsonl(tmp_path / "responses.jsonl", [each.to_dict() for each in changed])
    play(tmp_path, make_panel("alignment-2"))
    assert {judge for _, judge in saved(tmp_path).values()} == {"alignment-2", "perception-1"}
    assert list(saved(tmp_path)) == [each.id for each in changed]
    assert not (tmp_path / "verdicts-unfinished.jsonl").exists()


@pytest.mark.parametrize(
    "damage", [b'{"key": ', b"\xff\n", b'{"records": [{"id": 3}]}\n', b'{"no": []}\n', b'{"records": 7}\n']
)
def test_damaged_file_of_unfinished_batches_is_reported_with_a_remedy(damage, tmp_path):
    write_jsonl(tmp_path / "responses.jsonl", [each.to_dict() for each in responses(100)])
    process = multiprocessing.get_context("fork").Process(target=play, args=(tmp_path, rounding_panel(3)))
    process.start()
    process.join()
    file = tmp_path / "verdicts-unfinished.jsonl"
    torn = b"\n" not in damage
    file.write_bytes(file.read_bytes() + damage)
    if torn:
        play(tmp_path, rounding_panel())
    else:
        with pytest.raises(RecordError, match=r"verdicts-unfinished\.jsonl: damaged .*; delete it, and"):
            play(tmp_path, rounding_panel())
