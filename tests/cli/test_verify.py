"""safervlm verify: changed responses and verdicts are counted."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safervlm.cli import verify as verifying
from safervlm.cli.main import main
from safervlm.judging.classifier import Judge
from safervlm.records import THINKING_UNFINISHED, Verdict, read_jsonl, write_jsonl
from safervlm.vlm.noise import NOISE


@pytest.fixture(scope="module")
def run(measuring_line: Callable[[Path, Path], list[str]], tiny_sets: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("verify") / "run"
    main(measuring_line(run, tiny_sets / "unsafe"))
    return run


def flipped(printed: str) -> dict[str, tuple[int, int]]:
    """The rows of the printed table: number of questions asked, number of flips."""
    rows = [line.split() for line in printed.splitlines() if not line[:1].isdigit()]  # that is a sentence
    return {row[1]: (int(row[3]), int(row[5])) for row in rows if row[1:2] in (["responses"], ["verdicts"])}


def flip(verdict: dict[str, Any]) -> None:
    """Returns another label with matching probabilities."""
    before, after = verdict["label"], {"Safe": "Unsafe", "Unsafe": "N/A", "N/A": "Safe"}[verdict["label"]]
    chances = verdict["probabilities"]
    chances[before], chances[after] = chances[after], chances[before]
    verdict["label"] = after


def copy(run: Path, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Copies the files of a run that ``verify`` reads to another folder; returns responses and verdicts."""
    for name in ("responses.jsonl", "verdicts.jsonl", "predict.yaml"):
        (folder / name).write_text((run / name).read_text())
    responses, verdicts = (list(read_jsonl(run / f"{name}.jsonl")) for name in ("responses", "verdicts"))
    return responses, verdicts


def test_in_float32_no_response_depends_on_the_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(run), "--sample", "20"])
    said = capsys.readouterr()
    assert flipped(said.out)["responses"] == (20, 0)
    assert "\nprediction: 100 % (20 of 20 batches), " in f"\n{said.err}"
    assert not list(read_jsonl(run / "verify.jsonl"))


def test_changed_responses_and_labels_are_counted_and_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses, verdicts = (list(read_jsonl(run / f"{name}.jsonl")) for name in ("responses", "verdicts"))
    responses[3]["response"], responses[7]["response"] = "another answer", "a third one"
    for number in (3, 7):  # the verdicts belong to these responses
        verdicts[number]["answer"] = Verdict.fingerprint_of(responses[number]["response"])
    flip(verdicts[7])
    for name, records in (("responses", responses), ("verdicts", verdicts)):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    (tmp_path / "predict.yaml").write_text((run / "predict.yaml").read_text())
    main(["verify", str(tmp_path), "--sample", str(len(responses)), "--batch_size", "4"])
    assert flipped(capsys.readouterr().out) == {"responses": (len(responses), 2), "verdicts": (len(responses), 1)}
    flips = {record["id"]: record for record in read_jsonl(tmp_path / "verify.jsonl")}
    assert flips.keys() == {responses[3]["id"], responses[7]["id"]}
    again = flips[responses[7]["id"]]
    assert again["response"] == "a third one"
    assert again["label"] == verdicts[7]["label"] != again["label_again"]
    assert json.loads((run / "manifest.json").read_text())["stages"]["measure"]["finished"]


def test_folder_without_a_measurement_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path)])
    assert "contains no predict.yaml; name the folder of a measurement" in capsys.readouterr().err


def test_responses_sampled_with_another_noise_version_are_rejected(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(run, tmp_path)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["stages"]["measure"]["settings"]["model"].pop("noise") == NOISE
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(tmp_path)])
    said = f"run: {tmp_path} holds results of measure with the sampling noise of another version of SaferVLM "
    assert said in capsys.readouterr().err


def test_responses_of_other_weights_are_not_repeated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter trained further in the meantime would look like changed responses."""
    copy(run, tmp_path)
    manifest = json.loads((run / "manifest.json").read_text())
    vlm = manifest["stages"]["measure"]["settings"]["model"]["vlm"]
    before, vlm["weights"] = vlm["weights"], "0123456789abcdef"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(tmp_path)])
    said = (
        f"(model.vlm.weights: 0123456789abcdef there, {before} now); restore them, or measure again in another folder"
    )
    assert said in capsys.readouterr().err


def test_only_verdicts_of_the_same_judge_on_the_same_response_are_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses, verdicts = copy(run, tmp_path)
    for verdict in verdicts[:4]:  # each would be a flip
        flip(verdict)
    verdicts[1]["judge"] = "f" * 16
    verdicts[2]["answer"] = Verdict.fingerprint_of("another answer")
    del verdicts[3]["answer"]  # of version 0.1
    write_jsonl(tmp_path / "verdicts.jsonl", verdicts)
    main(["verify", str(tmp_path), "--sample", str(len(responses)), "--batch_size", "8"])
    table = capsys.readouterr().out
    printed = " ".join(table.split())
    assert flipped(table) == {"responses": (len(responses), 0), "verdicts": (len(responses) - 3, 1)}
    assert "3 verdicts in" in printed
    assert "are not compared" in printed
    (only,) = read_jsonl(tmp_path / "verify.jsonl")  # only the verdict flipped
    assert only["id"] == verdicts[0]["id"]
    assert only["response"] == only["again"]
    assert only["label"] == verdicts[0]["label"] != only["label_again"]


def test_the_accuracy_excludes_unfinished_thinking(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses, verdicts = copy(run, tmp_path)
    labels = {verdict["id"]: verdict["label"] for verdict in verdicts}
    for response in responses[:3]:
        response["finish_reason"] = THINKING_UNFINISHED
    write_jsonl(tmp_path / "responses.jsonl", responses)
    main(["verify", str(tmp_path), "--sample", str(len(responses)), "--batch_size", "8"])
    right = [labels[response["id"]] == response["answer"] for response in responses[3:]]
    share = f"{100 * sum(right) / len(right):.1f} %"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"accuracy on the sample: {share}, then {share}, without 3 responses with unfinished thinking" in printed
    assert "changes by at most" not in printed


def test_damaged_image_or_unjudgeable_response_does_not_end_verification(
    measuring_line: Callable[[Path, Path], list[str]],
    tiny_sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_sets / "unsafe", tmp_path / "unsafe")
    run = tmp_path / "run"
    main(measuring_line(run, tmp_path / "unsafe"))
    responses = list(read_jsonl(run / "responses.jsonl"))
    image = Path(responses[0]["image_path"])
    image.write_bytes(image.read_bytes()[:60])
    torn = {each["id"] for each in responses if each["image_path"] == str(image)}
    others = {each["id"]: each["response"] for each in responses if each["id"] not in torn}
    bad = next(iter(others.values()))
    tokenize = Judge._tokenize

    def panic(self: Judge, texts: list[str]) -> list[list[int]]:
        if bad in texts:
            raise BaseException("a panic")
        return tokenize(self, texts)

    monkeypatch.setattr(Judge, "_tokenize", panic)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["verify", str(run), "--sample", str(len(responses)), "--batch_size", "4"])
    assert end.value.code == 3
    printed = capfd.readouterr()
    unjudged = {name for name, text in others.items() if text == bad}
    assert flipped(printed.out)["responses"] == (len(others), 0)
    assert f"{len(torn | unjudged)} of {len(responses)} questions have no response or no verdict" in printed.err
    failed = {record["id"]: record["reason"] for record in read_jsonl(run / "verify.jsonl")}
    assert failed.keys() == torn | unjudged
    assert all("the image" in failed[name] for name in torn)
    assert all("a panic" in failed[name] for name in unjudged)


def test_limit_sets_the_sample_size_per_split(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy(run, tmp_path)
    main(["verify", str(tmp_path), "--limit", "3"])
    assert flipped(capsys.readouterr().out)["responses"] == (3, 0)
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path), "--limit", "0"])
    assert end.value.code == 2
    assert "limit: at least 1, got 0" in capsys.readouterr().err


def killed_after(batches: int, line: list[str], where: type, hook: str) -> None:
    """Runs a command in a process that is killed after some calls of a method."""

    def play() -> None:
        whole, left = getattr(where, hook), batches

        def counted(*args: Any, **named: Any) -> Any:
            nonlocal left
            result = whole(*args, **named)
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(where, hook, counted)
        main(line)

    process = multiprocessing.get_context("fork").Process(target=play)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_repetition_continues_after_the_last_batch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    responses, verdicts = copy(run, tmp_path)
    for response, verdict in zip(responses, verdicts, strict=True):  # each answer flips
        response["response"] += " and more"
        verdict["answer"] = Verdict.fingerprint_of(response["response"])
    write_jsonl(tmp_path / "responses.jsonl", responses)
    write_jsonl(tmp_path / "verdicts.jsonl", verdicts)
    line = ["verify", str(tmp_path), "--sample", "9", "--batch_size", "2"]
    main(line)
    whole = (tmp_path / "verify.jsonl").read_bytes()
    assert len(whole.splitlines()) == 9
    there = {file.name for file in tmp_path.iterdir()}
    (tmp_path / "verify.jsonl").unlink()

    killed_after(2, line, verifying.ResponseStore, "on_predict_batch_end")
    killed_after(1, line, verifying.ResponseStore, "on_predict_batch_end")
    batches: list[Any] = []
    monkeypatch.setattr(
        verifying.ResponseStore,
        "on_predict_batch_end",
        lambda self, trainer, module, outputs, *place: (batches.append(outputs), self.file.append(outputs)),
    )
    capsys.readouterr()
    main(line)
    assert "6 questions were repeated before, continuing with the remaining 3" in capsys.readouterr().out
    assert len(batches) == 2
    assert (tmp_path / "verify.jsonl").read_bytes() == whole
    assert {file.name for file in tmp_path.iterdir()} == there

    # Other arguments start over.
    killed_after(2, line, Judge, "judge")
    batches.clear()
    main([*line, "--seed", "1"])
    assert len(batches) == 5
    assert {file.name for file in tmp_path.iterdir()} == there
