"""Promise 1, machines: results do not depend on rounding, on the working directory or on earlier runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkout import CHECKOUT, contents

from safervlm.cli.main import main
from safervlm.judging.classifier import Judge
from safervlm.records import read_jsonl, write_jsonl

ANSWERS = [
    *(
        "Yes.",
        "No",
        "",
        " ",
        "\n",
        "maybe " * 90,
        "Ja, natürlich.",
        "安全です",
        "a",
        "0" * 300,
        "<pad><s>",
        "N/A",
    ),
    *(
        f"{word}, {n} times it is {'not ' * (n % 3)}safe" * (1 + n % 4)
        for n, word in enumerate(["Yes", "No", "It"] * 9)
    ),
]


@pytest.fixture
def judge(tiny_judges: Path) -> Judge:
    return Judge(str(tiny_judges / "alignment" / "epoch_10.pt"), base=str(tiny_judges / "alignment"))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16, 1000])
@pytest.mark.parametrize("threads", [1, 2])
def test_verdicts_do_not_depend_on_batch_or_number_of_threads(judge: Judge, batch_size: int, threads: int) -> None:
    alone = torch.cat([judge.judge([text]) for text in ANSWERS])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in (1, 7, 11):
            order = [place * step % len(ANSWERS) for place in range(len(ANSWERS))]
            found = judge.judge([ANSWERS[place] for place in order], batch_size)
            assert found.argmax(-1).tolist() == alone[order].argmax(-1).tolist()
            torch.testing.assert_close(found.exp(), alone[order].exp(), atol=1e-5, rtol=0)
    finally:
        torch.set_num_threads(before)


# --- a limit, for every recipe ----------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_llava: Path, tiny_sets: Path, tiny_judges: Path, tiny_panel: dict[str, object], tmp_path: Path):
    """``recipe(name, *more)``: the command of a shipped recipe with tiny models and data, and ``--limit 20``."""
    judge = {"checkpoint": str(tiny_judges / "alignment/epoch_10.pt"), "base": str(tiny_judges / "alignment")}
    sets = {"folder": str(tiny_sets / "unsafe"), "safe_folder": str(tiny_sets / "safe"), "validation_fraction": 0.25}
    vlm = {"class_path": "safervlm.vlm.llava.Llava"}
    vlm["init_args"] = {"model": str(tiny_llava), "dtype": "float32", "lora": {"r": 2, "alpha": 4}}
    quick = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    fit = quick | {"max_epochs": 1, "precision": "32-true"}
    asked = [{"class_path": f"callbacks.{name}"} for name in ("record_writer.RecordWriter", "score_table.ScoreTable")]
    asked.insert(1, {"class_path": "callbacks.judge_responses.JudgeResponses", "init_args": {"panel": tiny_panel}})
    alignment = {"class_path": "safervlm.judging.classifier.Judge", "init_args": judge}
    kept = [{"class_path": f"callbacks.{name}"} for name in ("checkpoint.LastCheckpoint", "metrics_csv.MetricsCSV")]
    check = {"class_path": "callbacks.generation_check.GenerationCheck"}
    check["init_args"] = {"judge": alignment, "sampling": {"max_new_tokens": 4}}
    write_jsonl(
        tmp_path / "answers.jsonl",
        ({"text": f"{label} {n}", "label": label} for label in ("Safe", "Unsafe", "N/A") for n in range(60)),
    )
    for file, count in (("own.jsonl", 50), ("more.jsonl", 30)):
        write_jsonl(
            tiny_sets / file,
            (
                {
                    "image": f"safe/images/{n}.png",
                    "prompt": "Is it safe?",
                    "label": ["Safe", "Unsafe"][n % 2],
                    "completions": ["Yes."],
                }
                for n in range(count)
            ),
        )
    own = {"class_path": "safervlm.data.own.OwnData"}
    own["init_args"] = {"file": str(tiny_sets / "own.jsonl"), "validation_file": str(tiny_sets / "more.jsonl")}
    ppo = {"vlm": vlm, "judge": alignment, "response_length": 4, "mini_batch_size": 8, "micro_batch_size": 8}
    benchmarks = {"class_path": "safervlm.data.unsafe_concepts.UnsafeConcepts"}
    benchmarks["init_args"] = sets | {"capabilities": ["alignment"]}
    parts = {
        "sft": ("fit", {"vlm": vlm}, sets, fit),
        "dpo": ("fit", {"vlm": vlm}, sets, fit),
        "ppo": ("fit", ppo, sets | {"batch_size": 16}, fit | {"callbacks": [check, *kept]}),
        "grpo": ("fit", ppo | {"group_size": 2}, sets | {"batch_size": 16}, fit | {"callbacks": [check, *kept]}),
        "judge": ("fit", judge, {"answers": str(tmp_path / "answers.jsonl")}, fit),
        "measure": ("predict", {"vlm": vlm, "sampling": {"max_new_tokens": 4}}, sets, quick | {"callbacks": asked}),
        "evaluate": (
            "predict",
            {"vlm": vlm, "sampling": {"max_new_tokens": 4}},
            {"sets": {"unsafe_concepts": benchmarks}},
            quick | {"callbacks": asked[:2]},
        ),
        "judge_responses": ("predict", tiny_panel, {"responses": str(tmp_path / "saved")}, quick),
    }

    def line(name: str, *more: str, data: object = None) -> list[str]:
        command, model, arguments, trainer = parts[name]
        overlay = {"model": {"init_args": model}, "data": data or {"init_args": arguments}, "trainer": trainer}
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        settings = [f"--config={tmp_path / 'overlay.yaml'}", f"--run={tmp_path / 'run'}", "--data.num_workers=0"]
        return [command, f"--config=configs/{name}.yaml", *settings, "--limit", "20", *more]

    line.own = own  # type: ignore[attr-defined]
    return line


def rows(folder: Path, stage: str) -> dict[str, int]:
    """The number of examples of each split, according to the manifest."""
    data = json.loads((folder / "run/manifest.json").read_text())["stages"][stage]["settings"]["data"]
    data = data["sets"]["unsafe_concepts"] if "sets" in data else data
    return {part: data[part]["examples"] for part in ("train", "validation", "predict") if part in data}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        ("sft", "sft", {"train": 36, "validation": 12}),
        ("dpo", "dpo", {"train": 36, "validation": 12}),
        ("ppo", "ppo", {"train": 36, "validation": 20}),
        ("grpo", "grpo", {"train": 36, "validation": 20}),
        ("judge", "judge", {"train": 3 * 20, "validation": 35}),
        ("measure", "measure", {"predict": 20 + 5 * 40 + 15}),
        ("evaluate", "measure", {"predict": 5 * (6 + 6)}),
    ],
)
def test_limit_restricts_every_shipped_recipe(recipe, tmp_path: Path, capsys, name: str, stage: str, expected) -> None:
    main(recipe(name))
    said = capsys.readouterr().out
    assert rows(tmp_path, stage) == expected
    if name == "ppo":
        assert "20 held-out safe images under data.limit 20: the share that is called Unsafe is coarse" in said


@pytest.mark.slow
def test_limit_applies_to_custom_data_and_to_validate(recipe, tmp_path: Path) -> None:
    main(recipe("sft", data=recipe.own))
    assert rows(tmp_path, "sft") == {"train": 40, "validation": 30, "predict": 40}
    line = recipe("sft", data=recipe.own)
    main(["validate", *line[1:]])


@pytest.mark.slow
def test_limit_applies_to_judging_saved_responses(recipe, tmp_path: Path, capsys) -> None:
    main([*recipe("measure"), "--run", str(tmp_path / "saved")])
    count = {}
    line = recipe("judge_responses")
    line[line.index("--limit") + 1] = "4"
    main(line)
    for verdict in read_jsonl(tmp_path / "run/verdicts.jsonl"):
        data, _, rest = verdict["id"].partition("/")
        capability = re.search(r"/(perception|alignment|alignment_text_only)/", f"/{rest}/")
        count[data, capability and capability[1]] = count.get((data, capability and capability[1]), 0) + 1
    assert sorted(count.values()) == [4, 4, 4, 4]
    with pytest.raises(SystemExit) as caught:
        main([*line, "--run", str(tmp_path / "saved")])
    assert caught.value.code == 2
    assert "contains other responses than" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-3"])
@pytest.mark.parametrize("name", ["sft", "ppo", "judge", "measure", "evaluate", "judge_responses"])
def test_a_limit_below_one_is_rejected(recipe, capsys, name: str, limit: str) -> None:
    line = recipe(name)
    line[line.index("--limit") + 1] = limit
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    assert f"data.limit: at least 1, or null, got {limit}" in capsys.readouterr().err


# --- where tests run --------------------------------------------------------------------------------------------------


def test_each_test_runs_in_a_temporary_working_directory(tmp_path: Path) -> None:
    started = subprocess.run([sys.executable, "-c", "import os; print(os.getcwd())"], capture_output=True, text=True)
    assert Path.cwd() == tmp_path == Path(started.stdout.strip())
    assert CHECKOUT not in tmp_path.parents


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda root: (root / "runs" / "x").mkdir(parents=True), True),  # empty folders, too
        (lambda root: (root / "new.txt").touch(), True),
        (lambda root: (root / "kept.txt").unlink(), True),
        (lambda root: (root / "kept.txt").write_text("longer"), True),
        (lambda root: os.utime(root / "kept.txt", ns=(1, 1)), True),
        (lambda root: (root / "pkg" / "__pycache__").mkdir(parents=True), True),  # the folder pkg itself is new
        (lambda root: (root / ".pytest_cache" / "v").mkdir(parents=True), False),
        (lambda root: (root / "env" / "bin").mkdir(), False),
    ],
)
def test_checkout_snapshot_detects_changed_files(tmp_path: Path, change, seen: bool) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    before = contents(tmp_path)
    change(tmp_path)
    assert (contents(tmp_path) != before) == seen
