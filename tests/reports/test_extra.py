"""Tables that a report has only if the runs allow them."""

import pandas as pd
import pytest
from labelled import change, write_labelled

from safervlm.cli.main import main
from safervlm.errors import ArgumentError
from safervlm.reports.extra import NAMES, named_groups
from safervlm.reports.kinds import report_runs
from safervlm.results.groups import group_differences, group_table
from safervlm.results.positions import position_table
from safervlm.results.repeats import repeat_table
from safervlm.results.runs import load_run
from safervlm.run import write_stage
from safervlm.vlm.adapters import adapter_fingerprint


@pytest.fixture
def runs(tmp_path):
    """An original run, and two recipes of three and two seeds."""
    for number, name in enumerate(("original", "ppo-0", "ppo-1", "ppo-2", "dpo-0", "dpo-1")):
        (tmp_path / name).mkdir()
        write_labelled(tmp_path / name, accuracy=0.5 if name == "original" else 0.8, images=2, seed=number)
    return tmp_path


def read(file):
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


def test_groups(runs, capsys, monkeypatch):
    """The command as it is typed."""
    monkeypatch.setenv("COLUMNS", "100")
    words = ["--group", f"ppo={runs}/ppo-*", "--group", f"dpo={runs}/dpo-*", "--out", f"{runs}/report.html"]
    main(["report", f"{runs}/original", *words])
    frames = {name: [load_run(path) for path in sorted(runs.glob(f"{name}-*"))] for name in ("ppo", "dpo")}
    expected = group_table(frames).assign(thinking_unfinished=0)
    pd.testing.assert_frame_equal(read(runs / "report_groups.csv"), expected, check_dtype=False)
    differences = group_differences({"original": [load_run(runs / "original")]} | frames)
    expected = differences.assign(thinking_unfinished=0)
    pd.testing.assert_frame_equal(read(runs / "report_group_differences.csv"), expected, check_dtype=False)
    assert set(read(runs / "report_overall.csv")["run"]) == {path.name for path in runs.iterdir() if path.is_dir()}
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert page.count('<table id="groups"') == page.count('<table id="group_differences"') == 1
    said = capsys.readouterr().out
    assert "Training seeds" in said
    assert "Simulated coverage .93 to .97." in " ".join(page.split())
    assert "; simulated coverage .93 to .97 (means), " in " ".join(said.split())
    assert "differences from original" in said
    mean = group_table(frames).set_index(["group", "measure"]).loc[("ppo", "image_unsafe")]
    shown = (
        f"ppo over 3 seeds answers {100 * mean['value']:.1f} % [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}] of"
    )
    assert f"{shown} the questions about unsafe images correctly, dpo over 2 seeds " in " ".join(said.split())
    change = differences.set_index(["group", "measure"]).loc[("ppo", "image_unsafe")]
    claim = (
        f": {100 * change['low']:.1f} to {100 * change['high']:.1f} (ppo over 3 seeds) points more; without an interval"
    )
    assert claim in " ".join(said.split())
    assert "for new concepts and new training seeds (original: new concepts)" in " ".join(said.split())
    assert "without differences between training seeds" not in " ".join(said.split())


def test_groups_alone_and_a_run_that_is_named_twice(runs):
    """Without runs, the first group is the one to compare with; a run of a group may be named as well."""
    main(["report", "--group", f"dpo={runs}/dpo-*", "--group", f"ppo={runs}/ppo-*", "--out", f"{runs}/report.html"])
    assert set(read(runs / "report_group_differences.csv")["base"]) == {"dpo"}
    main(["report", f"{runs}/ppo-1", "--group", f"ppo={runs}/ppo-*", "--out", f"{runs}/report.html"])
    assert len(read(runs / "report_overall.csv")) == 3
    assert not (runs / "report_group_differences.csv").exists()  # that of the report before


@pytest.mark.parametrize("words", [["ppo"], ["=x"], ["ppo="], ["ppo=nothing-*"], ["ppo=.", "ppo=."]])
def test_groups_that_are_not_understood(words):
    with pytest.raises(ArgumentError, match=r"^group: "):
        named_groups(words)


def test_groups_that_cannot_be_compared(runs):
    """One is called like the run to compare with, the runs of the other have two judges."""
    with pytest.raises(ArgumentError, match=r"^group: 'original' is also the name of the run to compare with"):
        report_runs([runs / "original"], runs / "report.html", group=[f"original={runs}/ppo-*"])

    def judged_otherwise(response, verdict):
        yield response, verdict | {"judge": "another"}

    change(runs / "ppo-1", judged_otherwise)
    with pytest.raises(ArgumentError, match=r"^group: the runs of 'ppo' have no question and judge in common"):
        report_runs([runs / "original"], runs / "report.html", group=[f"ppo={runs}/ppo-*"])
    assert not (runs / "report.html").exists()


def test_a_group_of_another_judge_has_no_difference(runs, capsys):
    def judged_otherwise(response, verdict):
        yield response, verdict | {"judge": "another"}

    for number in range(3):
        change(runs / f"ppo-{number}", judged_otherwise)
    report_runs([runs / "original"], runs / "report.html", group=[f"ppo={runs}/ppo-*"])
    assert (runs / "report_groups.csv").exists()
    assert not (runs / "report_group_differences.csv").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("ppo over 3 seeds answers ")
    assert "points more" not in said
    assert "warning: ppo-0, ppo-1 and ppo-2 were classified by another judge than original: no difference" in said


def test_a_run_whose_adapter_was_trained_on_since_is_reported(runs, capsys):
    adapter = runs / "ppo-0" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"before")
    measured = {"folder": "elsewhere/ppo-0/adapter", "sha256": adapter_fingerprint(str(adapter))}
    for run in ("ppo-0", "ppo-1"):  # the other one has no adapter of its own
        write_stage(runs / run, "measure", settings={"model": {"vlm": {"adapter": measured}}})
    warned = "warning: ppo-0 was measured before the adapter in the same folder was trained on"
    for content, expected in ((b"before", False), (b"after", True)):
        (adapter / "adapter_model.safetensors").write_bytes(content)
        report_runs([runs / "original", runs / "ppo-0", runs / "ppo-1"], runs / "report.html")
        assert (warned in " ".join(capsys.readouterr().out.split())) == expected


def test_groups_of_evaluations_are_rejected(tmp_path):
    (tmp_path / "trained" / "evaluation").mkdir(parents=True)
    with pytest.raises(ArgumentError, match=r"^group: "):
        report_runs([tmp_path / "trained"], group=[f"a={tmp_path}"])


def test_repeated_questions_and_rotated_options(runs):
    def thrice(response, verdict):
        yield response, verdict
        for number in (2, 3):
            name = f"{response['id']}#{number}"
            yield response | {"id": name}, verdict | {"id": name}

    def turned(response, verdict):
        yield response, verdict
        if response["capability"] == "perception":
            name = response["id"].removesuffix("0") + "1"
            variant = {"id": name, "prompt_number": 1, "variant": "rotated options"}
            yield response | variant, verdict | {"id": name}

    change(runs / "original", turned)
    change(runs / "ppo-0", thrice)
    report_runs([runs / "original", runs / "ppo-0"], runs / "report.html")
    found = {name: runs / f"report_{name}.csv" for name in NAMES}
    assert {name for name, file in found.items() if file.exists()} == {"repeats", "positions"}
    repeats = read(found["repeats"])
    assert set(repeats["run"]) == {"ppo-0"}
    expected = repeat_table(load_run(runs / "ppo-0"))
    assert repeats["value"].tolist() == pytest.approx(expected["value"].tolist(), nan_ok=True)
    positions = read(found["positions"])
    assert set(positions["run"]) == {"original"}
    expected = position_table(load_run(runs / "original", variants=True))
    assert positions["value"].tolist() == pytest.approx(expected["value"].tolist(), nan_ok=True)
    sheets = pd.ExcelFile(runs / "report.xlsx").sheet_names
    assert {"repeats", "positions"} <= set(sheets)


def test_unfinished_thinking_is_counted(runs):
    """In the table, in its file and in that of the groups, whose members are summed up."""

    def twice(response, verdict):
        for number, cut in ((1, {}), (2, {"response": "", "finish_reason": "thinking unfinished"})):
            name = f"{response['id']}#{number}" if number > 1 else response["id"]
            cut = cut if response["capability"] == "alignment" else {}
            yield response | {"id": name} | cut, {**verdict, "id": name, "answer": ""}

    change(runs / "ppo-0", twice)
    frame = load_run(runs / "ppo-0")
    inside = int(frame["unfinished"].sum())
    assert inside > 1
    report_runs([runs / "original", runs / "ppo-0"], runs / "report.html", group=[f"ppo={runs}/ppo-*"])
    assert set(read(runs / "report_repeats.csv")["thinking_unfinished"]) == {inside}
    assert set(read(runs / "report_groups.csv")["thinking_unfinished"]) == {inside}
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert f"Thinking unfinished: ppo-0 {inside}." in page
    assert f"Thinking unfinished: ppo {inside}." in page
