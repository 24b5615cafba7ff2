"""Measuring: failed questions are recorded with their reason, and a batch that does not fit is halved."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safervlm.cli.main import main
from safervlm.data.suite import Suite
from safervlm.data.unsafe_concepts import UnsafeConcepts
from safervlm.errors import ArgumentError
from safervlm.measure import FaultTolerantCollator, Measure
from safervlm.records import Example, Failure, Question, Response, read_jsonl
from safervlm.vlm.llava import Llava
from safervlm.vlm.noise import NOISE
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.client import Server

GREEDY = Sampling(temperature=0, max_new_tokens=4)


@pytest.fixture
def measure(tiny_llava: Path) -> Measure:
    measure = Measure(Llava(str(tiny_llava), dtype="float32"), GREEDY)
    measure.configure_model()
    return measure


def test_noise_version_is_recorded_only_for_local_sampling(tiny_llava: Path) -> None:
    local, server = Llava(str(tiny_llava)), Server("model", ["http://localhost:1/v1"])
    assert Measure(local, Sampling()).describe()["noise"] == NOISE
    assert "noise" not in Measure(local, GREEDY).describe()
    assert "noise" not in Measure(server, Sampling()).describe()


def refuse_more_than(measure: Measure, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the VLM run out of memory above ``most`` questions; returns the list of its batch sizes."""
    generate, asked = measure.vlm.generate, []

    def full(batch, sampling, seed):
        asked.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        assert batch.pixel_values.shape[0] == len({question.image for question in batch.questions})
        return generate(batch, sampling, seed)

    monkeypatch.setattr(measure.vlm, "generate", full)
    return asked


def test_out_of_memory_batch_is_halved_and_later_batches_start_at_that_size(
    measure: Measure,
    make_questions: Callable[[int], list[Question]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = measure.collator([Example(question) for question in make_questions(9)])
    expected = measure.predict_step(asked, 0)
    sizes = refuse_more_than(measure, 3, monkeypatch)
    assert measure.predict_step(measure.collator([Example(q) for q in make_questions(9)]), 0) == expected
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert capsys.readouterr().out.count("out of memory") == 2
    del sizes[:]
    measure.predict_step(measure.collator([Example(question) for question in make_questions(5)]), 1)
    assert sizes == [2, 2, 1]
    assert "out of memory" not in capsys.readouterr().out


def test_a_question_that_does_not_fit_alone_fails_and_the_others_are_answered(
    measure: Measure, make_questions: Callable[[int], list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = make_questions(3)
    refuse_more_than(measure, 0, monkeypatch)
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert [record.id for record in records] == [question.id for question in questions]
    assert {record.reason for record in records if isinstance(record, Failure)} == {
        "CUDA out of memory: this question alone doesn't fit into memory"
    }


def test_invalid_questions_become_failures_and_the_others_are_answered(
    measure: Measure, make_questions: Callable[[int], list[Question]], tmp_path: Path
) -> None:
    good = make_questions(4)
    (tmp_path / "torn.png").write_bytes(Path(str(good[0].image_path)).read_bytes()[:60])
    torn = replace(good[1], id="T/torn.png/alignment/0", image_path=str(tmp_path / "torn.png"))
    long = replace(good[2], id="T/long/alignment/0", prompt="safe " * 900)
    collator = FaultTolerantCollator(measure.vlm.collator)
    records = measure.predict_step(collator([Example(question) for question in (good[0], torn, long, good[3])]), 0)
    failed = {record.id: record.reason for record in records if isinstance(record, Failure)}
    assert failed.keys() == {torn.id, long.id}
    assert failed[torn.id].startswith(f"{torn.id}: the image ")
    assert "the model takes 512" in failed[long.id]
    answered = [record for record in records if isinstance(record, Response)]
    assert answered == measure.predict_step(collator([Example(good[0]), Example(good[3])]), 0)
    assert collator([Example(torn)]).batches == []
    assert [type(record) for record in measure.predict_step(collator([Example(torn)]), 0)] == [Failure]


@pytest.mark.gpu
def test_a_full_gpu_halves_the_batch(
    measure: Measure, make_questions: Callable[[int], list[Question]], capsys: pytest.CaptureFixture[str]
) -> None:
    device = torch.device("cuda")
    measure.vlm.to(device)
    asked = measure.collator([Example(question) for question in make_questions(512)]).to(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    expected = measure.predict_step(asked, 0)
    needed = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + needed / 2) / torch.cuda.mem_get_info()[1]
    )
    try:
        asked = measure.collator([Example(question) for question in make_questions(512)]).to(device)
        assert measure.predict_step(asked, 0) == expected
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with 512 questions at once: continuing with 256" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_gpu_writes_the_responses_of_the_cpu_whatever_the_batch(
    tiny_sets: Path, measuring_line: Callable[[Path, Path], list[str]], tmp_path: Path
) -> None:
    main([*measuring_line(tmp_path / "cpu", tiny_sets / "unsafe"), "--model.sampling.max_new_tokens=12"])
    for size in (1, 3, 16):
        line = measuring_line(tmp_path / str(size), tiny_sets / "unsafe")
        main([*line, "--model.sampling.max_new_tokens=12", f"--data.batch_size={size}", "--trainer.accelerator=cuda"])
        here, there = tmp_path / "cpu", tmp_path / str(size)
        assert (there / "responses.jsonl").read_bytes() == (here / "responses.jsonl").read_bytes()
        labels, expected = ([row["label"] for row in read_jsonl(run / "verdicts.jsonl")] for run in (there, here))
        assert labels == expected


def test_damaged_image_ends_with_exit_code_3_and_is_retried_once_repaired(
    tiny_sets: Path,
    measuring_line: Callable[[Path, Path], list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_sets / "unsafe", tmp_path / "unsafe")
    data = UnsafeConcepts(str(tmp_path / "unsafe"), split="test", capabilities=["alignment"])
    question = data.parts.predict[0].question
    image = Path(str(question.image_path))
    whole = image.read_bytes()
    image.write_bytes(whole[:80])
    line = measuring_line(run, tmp_path / "unsafe")
    with pytest.raises(SystemExit) as end:
        main(line)
    manifest = json.loads((run / "manifest.json").read_text())
    failed = [json.loads(text) for text in (run / "responses-failed.jsonl").read_text().splitlines()]
    assert end.value.code == 3
    assert f"{len(failed)} questions have no response" in capfd.readouterr().err
    assert len(failed) == 5
    assert all(question.image in record["id"] and question.image in record["reason"] for record in failed)
    assert manifest["stages"]["measure"]["finished"] is False
    answered = (run / "responses.jsonl").read_text().splitlines()
    assert (run / "scores.csv").exists()

    image.write_bytes(whole)
    main(line)
    assert len((run / "responses.jsonl").read_text().splitlines()) == len(answered) + 5
    assert not (run / "responses-failed.jsonl").exists()
    assert json.loads((run / "manifest.json").read_text())["stages"]["measure"]["finished"] is True


def test_repetitions_need_a_temperature(measure: Measure) -> None:
    measure.sampling = replace(measure.sampling, temperature=0.0)
    thrice = UnsafeConcepts("folder", repeats=3)
    measure._trainer = SimpleNamespace(datamodule=Suite({"once": UnsafeConcepts("folder"), "thrice": thrice}))
    with pytest.raises(ArgumentError, match=r"data\.repeats: 3 .* sampling\.temperature 0"):
        measure.setup("predict")
    thrice.repeats = 1
    measure.setup("predict")
