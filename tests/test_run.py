"""The manifest: the provenance of a run, and the settings that it rejects."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safervlm.errors import RecordError
from safervlm.run import (
    SettingsDifferError,
    check_settings,
    finished,
    has_results,
    lock,
    read_manifest,
    require_same_weights,
    write_stage,
)

SETTINGS = {"model": {"lr": 1e-3, "betas": (0.9, 0.99)}, "data": {"ids": "abc"}}


@pytest.mark.parametrize(
    ("file", "stage", "rejected"),
    [
        ("responses.jsonl", "measure", True),
        ("shards/responses/0-1.jsonl", "measure", True),
        ("scores.csv", "measure", True),
        ("metrics.csv", "sft", True),
        ("rollouts.jsonl", "ppo", True),
        ("checkpoints/last.ckpt", "dpo", False),  # a checkpoint has its settings in its seal
        ("responses.jsonl", "judge", False),  # they are judged where they lie
        ("responses.jsonl", "sft", False),
        ("notes.txt", "measure", False),
    ],
)
def test_results_of_unknown_settings_are_not_continued(file: str, stage: str, rejected: bool, tmp_path: Path) -> None:
    """The manifest was removed, or a user's file has the name of a result: it is kept."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("mine")
    if rejected:
        with pytest.raises(RecordError, match=r"--run: .* is there and manifest\.json is not"):
            check_settings(tmp_path, stage, {})
    else:
        assert check_settings(tmp_path, stage, {}) == {}
    assert (tmp_path / file).read_text() == "mine"
    (tmp_path / "manifest.json").write_text('{"stages": {}}')
    assert check_settings(tmp_path, stage, {}) == {}


def test_the_same_settings_resume(tmp_path: Path) -> None:
    check_settings(tmp_path, "sft", SETTINGS)  # nothing there yet
    write_stage(tmp_path, "sft", settings=SETTINGS, finished=False)
    check_settings(tmp_path, "sft", SETTINGS)
    check_settings(tmp_path, "measure", {"other": "stage"})
    assert not finished(tmp_path, "sft")
    write_stage(tmp_path, "sft", finished=True)
    assert finished(tmp_path, "sft")
    assert read_manifest(tmp_path)["stages"]["sft"]["settings"]["data"] == {"ids": "abc"}


def test_other_settings_are_rejected_by_name(tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", settings=SETTINGS)
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    changed = json.loads(json.dumps(SETTINGS))
    changed["model"]["lr"] = 2e-3
    del changed["data"]["ids"]
    with pytest.raises(
        SettingsDifferError, match=r"model\.lr: 0\.001 there, 0\.002 now; data\.ids: 'abc' there, None"
    ) as caught:
        check_settings(tmp_path, "sft", changed)
    assert "name another folder" in str(caught.value)
    assert "betas" not in str(caught.value)


def test_error_names_a_changed_limit_without_derived_differences(tmp_path: Path) -> None:
    def settings(limit: int | None, records: int, ids: str) -> dict[str, Any]:
        split = {"examples": records, "ids": ids, "content": ids}
        return {"data": {"limit": limit, "predict": split, "images": ids}}

    write_stage(tmp_path, "measure", settings=settings(2, 32, "a"))
    (tmp_path / "responses.jsonl").write_text("{}")
    with pytest.raises(SettingsDifferError, match=r"other settings: data\.limit: 2 there, None now; name another"):
        check_settings(tmp_path, "measure", settings(None, 2418, "b"))
    with pytest.raises(SettingsDifferError, match=r"data\.predict\.examples: 32 there, 31 now; data\.predict\.ids"):
        check_settings(tmp_path, "measure", settings(2, 31, "b"))


@pytest.mark.parametrize(
    ("before", "now", "rejected"),
    [
        ({"weights": "a", "adapter": {"folder": "x", "sha256": "b"}}, {"weights": "a", "adapter": None}, False),
        ({"weights": "a", "adapter": None}, {"weights": "a", "adapter": None}, False),
        ({"weights": "a"}, {"weights": "b"}, "model.vlm.weights: a there, b now"),
        ({"weights": None}, {"weights": "b"}, False),
        (
            {"adapter": {"folder": "x", "sha256": "b"}},
            {"adapter": {"folder": "y", "sha256": "c"}},
            "model.vlm.adapter.sha256: b there, c now",
        ),
        ({"adapter": {"folder": "x", "sha256": "b"}}, {"adapter": {"folder": "y", "sha256": "b"}}, False),
    ],
)
def test_measurement_with_other_weights_is_rejected(before: dict[str, Any], now: dict[str, Any], rejected: Any) -> None:
    run = Path("runs/ppo")
    if rejected:
        with pytest.raises(SettingsDifferError, match=f"run: the responses of {run} are of other weights .{rejected}"):
            require_same_weights(run, {"vlm": before}, {"vlm": now})
    else:
        require_same_weights(run, {"vlm": before}, {"vlm": now})


def test_argument_that_is_not_utf8_is_recorded(tmp_path: Path) -> None:
    typed = os.fsdecode(b"--data.folder caf\xe9")
    write_stage(tmp_path, "measure", settings={"bound": math.inf}, provenance={"command": typed})
    stage = read_manifest(tmp_path)["stages"]["measure"]
    assert stage["provenance"]["command"] == typed
    assert stage["settings"]["bound"] == math.inf


def test_long_lists_of_differing_settings_are_abbreviated(tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", settings={str(n): n for n in range(9)})
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    with pytest.raises(SettingsDifferError, match="and 4 more"):
        check_settings(tmp_path, "sft", {})


def test_stage_without_results_does_not_block_other_settings(tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", settings=SETTINGS, finished=False)
    (tmp_path / "fit.yaml").write_text("run: x\n")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0-1.jsonl").touch()
    check_settings(tmp_path, "sft", {"model": {"lr": 5}})
    (tmp_path / "shards" / "0-1.jsonl").write_text("{}\n")
    with pytest.raises(SettingsDifferError):
        check_settings(tmp_path, "sft", {"model": {"lr": 5}})


def test_images_may_be_repaired_if_questions_failed(tmp_path: Path) -> None:
    write_stage(tmp_path, "measure", settings={"data": {"images": "a", "ids": "b"}})
    (tmp_path / "responses.jsonl").write_text("{}\n")
    with pytest.raises(SettingsDifferError, match=r"data\.images"):
        check_settings(tmp_path, "measure", {"data": {"images": "c", "ids": "b"}})
    (tmp_path / "responses-failed.jsonl").write_text("{}\n")
    check_settings(tmp_path, "measure", {"data": {"images": "c", "ids": "b"}})
    with pytest.raises(SettingsDifferError, match=r"data\.ids"):
        check_settings(tmp_path, "measure", {"data": {"images": "c", "ids": "d"}})


def test_adapter_is_identified_by_its_weights_and_not_its_path(tmp_path: Path) -> None:
    def settings(folder: str, weights: str) -> dict[str, Any]:
        return {"model": {"vlm": {"adapter": {"folder": folder, "sha256": weights}}}}

    write_stage(tmp_path, "measure", settings=settings("runs/ppo/adapter", "a"))
    (tmp_path / "responses.jsonl").write_text("{}\n")
    check_settings(tmp_path, "measure", settings("/moved/ppo/adapter", "a"))
    with pytest.raises(SettingsDifferError, match=r"adapter\.sha256: 'a' there, 'b' now"):
        check_settings(tmp_path, "measure", settings("runs/ppo/adapter", "b"))


@pytest.mark.parametrize(("before", "now"), [(None, 2), (2, 3), (2, None)])
def test_the_noise_of_another_version_is_rejected_with_a_hint(
    before: int | None, now: int | None, tmp_path: Path
) -> None:
    there, here = ({"model": {"seed": 0} | ({} if noise is None else {"noise": noise})} for noise in (before, now))
    write_stage(tmp_path, "measure", settings=there)
    check_settings(tmp_path, "measure", here)  # nothing was sampled yet
    (tmp_path / "responses.jsonl").write_text("{}\n")
    check_settings(tmp_path, "measure", there)
    # Without noise now, another setting is the cause.
    hint = r"\); use that version" if now else "; name another folder"
    with pytest.raises(SettingsDifferError, match=rf"model\.noise: {before} there, {now} now{hint}"):
        check_settings(tmp_path, "measure", here)


def length(epochs: int, steps: int = -1, **others: Any) -> dict[str, Any]:
    """Settings of a training of this length."""
    return {"trainer": {"max_epochs": epochs, "max_steps": steps}, "lr": 1e-3} | others


@pytest.mark.parametrize(
    ("now", "longer"),
    [
        (length(20), {"trainer.max_epochs": [10, 20]}),
        (length(-1), {"trainer.max_epochs": [10, -1]}),
        (length(-1, 500), {"trainer.max_epochs": [10, -1], "trainer.max_steps": [-1, 500]}),
        (length(10), {}),
    ],
)
def test_a_training_may_be_extended(now: dict[str, Any], longer: dict[str, Any], tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", settings=length(10), finished=True)
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    assert check_settings(tmp_path, "sft", now, extend=True) == longer
    if longer:
        with pytest.raises(SettingsDifferError, match="; add --extend to train on, name another folder, or delete it"):
            check_settings(tmp_path, "sft", now)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (length(5), r"^--extend: trainer\.max_epochs: 10 there, 5 now; give more than 10$"),
        (length(20, lr=2e-3), r"lr: 0\.001 there, 0\.002 now; name another folder, or delete it"),
    ],
)
def test_extend_accepts_only_a_longer_training(now: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", settings=length(10), finished=True)
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    with pytest.raises(SettingsDifferError, match=message):
        check_settings(tmp_path, "sft", now, extend=True)


def test_error_for_other_settings_does_not_suggest_extend(tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", settings=length(10))
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    with pytest.raises(SettingsDifferError) as caught:
        check_settings(tmp_path, "sft", length(20, lr=2e-3))
    assert "--extend" not in str(caught.value)


@pytest.mark.slow
def test_second_command_in_a_locked_run_folder_is_rejected(tmp_path: Path) -> None:
    held = lock(tmp_path)
    assert held is not None
    other = "import sys; from pathlib import Path; from safervlm.run import lock; lock(Path(sys.argv[1]))"
    command = [sys.executable, "-c", other, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    at_work = f"--run: another command (process {os.getpid()}) is running in {tmp_path}; wait until it ends"
    assert at_work in refused.stderr
    held.close()
    subprocess.run(command, capture_output=True, check=True)
    assert not has_results(tmp_path)  # the lock file is not a result
