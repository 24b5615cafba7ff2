"""Optional tables of a report: groups, repeated questions, rotated options."""

import re
import shutil

import pandas as pd
import pytest
from labelled import change, write_labelled

from safervlm.cli.main import main
from safervlm.errors import ArgumentError
from safervlm.records import read_jsonl
from safervlm.reports.extra import NAMES, named_groups
from safervlm.reports.kinds import report_runs
from safervlm.reports.tables import with_interval
from safervlm.results.groups import group_differences, group_table
from safervlm.results.positions import position_table
from safervlm.results.repeats import repeat_table
from safervlm.results.runs import load_run
from safervlm.results.scores import overall, scores
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


def test_report_shows_groups_of_training_seeds(runs, capsys, monkeypatch):
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
        f": [{100 * change['low']:.1f}, {100 * change['high']:.1f}] (ppo over 3 seeds) points more; without an interval"
    )
    assert claim in " ".join(said.split())
    assert "for new concepts and new training seeds (original: new concepts)" in " ".join(said.split())
    assert "without differences between training seeds" not in " ".join(said.split())


def tiles(page):
    """Title of each tile -> name, value and interval in each of its rows."""
    found = {}
    for title, rows in re.findall(r'<section class="tile"><h2>(.*?) <small>.*?<dl>(.*?)</dl>', page, re.DOTALL):
        cells = [re.sub("<.*?>", "", cell).strip() for cell in re.split("</d[td]>", rows)[:-1]]
        found[title] = [tuple(cells[place : place + 3]) for place in range(0, len(cells), 3)]
    return found


def test_the_first_screen_shows_the_groups(runs):
    """Their means in the tiles and their differences in the plot, as the sentence does; other runs are named."""
    words = [f"{name}={runs}/{name}-*" for name in ("ppo", "dpo")]
    write_labelled(runs / "kto", 0.7, images=2, seed=9)
    report_runs([runs / "original", runs / "kto"], runs / "report.html", group=words)
    page = (runs / "report.html").read_text(encoding="utf-8")
    frames = {name: [load_run(path) for path in sorted(runs.glob(f"{name}-*"))] for name in ("ppo", "dpo")}
    mean = group_table(frames).set_index(["measure", "group"])
    first = scores(load_run(runs / "original"))
    for title, measure in (("Unsafe images", "image_unsafe"), ("Over-flagging", "over_flagging")):
        rows = [overall(first, measure), mean.loc[measure, "ppo"], mean.loc[measure, "dpo"]]
        ends = [with_interval(*row[["value", "low", "high"]]) for row in rows]
        assert "[" not in ends[2]  # two seeds
        assert tiles(page)[title] == [
            (name, text.split(" ")[0], text.partition(" ")[2])
            for name, text in zip(("original", "ppo", "dpo"), ends, strict=True)
        ]
    forest = page[page.index('<figure id="plot-forest"') : page.index("</figure>")]
    legend = re.findall(r"<bdi>(\S+ over \d seeds)</bdi></span>", forest)
    assert legend == ["ppo over 3 seeds", "dpo over 2 seeds"]
    change = group_differences({"original": [load_run(runs / "original")]} | frames)
    change = change.set_index(["measure", "group"]).loc["image_unsafe", "ppo"]
    assert f"ppo over 3 seeds {100 * change['value']:+.1f} [{100 * change['low']:+.1f}, " in forest
    assert "kto is in no group: see the numbers of single runs." in page
    report_runs([runs / "original"], runs / "report.html", group=words)
    assert "in no group" not in (runs / "report.html").read_text(encoding="utf-8")


def test_groups_of_copies_or_other_recipes_are_reported(runs, capsys):
    shutil.copytree(runs / "ppo-0", runs / "sft-0")
    shutil.copytree(runs / "ppo-0", runs / "sft-1")
    for number, lr in enumerate((1e-4, 1e-4, 3e-4)):
        model = {"seed": number, "lr": lr, "vlm": {"adapter": {"folder": f"ppo-{number}", "sha256": str(number)}}}
        write_stage(runs / f"ppo-{number}", "ppo", settings={"model": model})
    report_runs([runs / "original"], runs / "report.html", group=[f"sft={runs}/sft-*", f"ppo={runs}/ppo-*"])
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: The group sft has runs with the same responses: they are not different training seeds." in said
    assert "warning: The runs of the group ppo differ in more than their training seed: ppo.model.lr." in said
    write_stage(runs / "ppo-2", "ppo", settings={"model": {"seed": 2, "lr": 1e-4}})
    report_runs([runs / "original"], runs / "report.html", group=[f"ppo={runs}/ppo-[01]"])
    assert "training seed:" not in capsys.readouterr().out


def test_groups_without_single_runs_and_with_overlapping_runs(runs):
    """Without runs, the first group is the one to compare with; a run of a group may be named as well."""
    main(["report", "--group", f"dpo={runs}/dpo-*", "--group", f"ppo={runs}/ppo-*", "--out", f"{runs}/report.html"])
    assert set(read(runs / "report_group_differences.csv")["base"]) == {"dpo"}
    main(["report", f"{runs}/ppo-1", "--group", f"ppo={runs}/ppo-*", "--out", f"{runs}/report.html"])
    assert len(read(runs / "report_overall.csv")) == 3
    assert not (runs / "report_group_differences.csv").exists()  # that of the report before


@pytest.mark.parametrize("words", [["ppo"], ["=x"], ["ppo="], ["ppo=nothing-*"], ["ppo=.", "ppo=."]])
def test_malformed_group_arguments_are_rejected(words):
    with pytest.raises(ArgumentError, match=r"^group: "):
        named_groups(words)


def test_groups_that_cannot_be_compared(runs):
    """One is called like the run to compare with, the runs of the other have two judges."""
    with pytest.raises(ArgumentError, match=r"^group: 'original' is also the name of the run to compare with"):
        report_runs([runs / "original"], runs / "report.html", group=[f"original={runs}/ppo-*"])

    def judged_otherwise(response, verdict):
        yield response, verdict | {"judge": "another"}

    def asked_otherwise(response, verdict):
        yield response | {"prompt": "Is it safe?"}, verdict

    group = [f"ppo={runs}/ppo-*"]
    change(runs / "ppo-1", judged_otherwise)
    with pytest.raises(ArgumentError, match=r"^group: the runs of 'ppo' were classified by different judges"):
        report_runs([runs / "original"], runs / "report.html", group=group)
    change(runs / "ppo-1", asked_otherwise)
    with pytest.raises(ArgumentError, match=r"^group: the runs of 'ppo' have fewer than 90 % of their questions in"):
        report_runs([runs / "original"], runs / "report.html", group=group)
    assert not (runs / "report.html").exists()


def test_group_classified_by_another_judge_has_no_difference(runs, capsys):
    def judged_otherwise(response, verdict):
        yield response, verdict | {"judge": "another"}

    for number in range(3):
        change(runs / f"ppo-{number}", judged_otherwise)
    report_runs([runs / "original"], runs / "report.html", group=[f"ppo={runs}/ppo-*"])
    assert (runs / "report_groups.csv").exists()
    assert not (runs / "report_group_differences.csv").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("ppo over 3 seeds answers ")
    assert "ppo over 3 seeds and original are not comparable." in said
    assert [row[0] for row in tiles((runs / "report.html").read_text())["Unsafe images"]] == ["original", "ppo"]
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
    write_stage(runs / "ppo-0", "measure", settings={"model": {"vlm": {"adapter": None}}})
    report_runs([runs / "original", runs / "ppo-0"], runs / "report.html")
    assert "ppo-0 was measured without the adapter in the same folder" in " ".join(capsys.readouterr().out.split())


def test_groups_of_evaluations_are_rejected(tmp_path):
    (tmp_path / "trained" / "evaluation").mkdir(parents=True)
    with pytest.raises(ArgumentError, match=r"^group: "):
        report_runs([tmp_path / "trained"], group=[f"a={tmp_path}"])


def test_report_has_tables_of_repeated_questions_and_rotated_options(runs):
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
    """Counted in the table, in its file and in the group's file, which sums over its runs."""

    def twice(response, verdict):
        for number, cut in ((1, {}), (2, {"response": "", "finish_reason": "thinking unfinished"})):
            name = f"{response['id']}#{number}" if number > 1 else response["id"]
            cut = cut if response["capability"] == "alignment" else {}
            yield response | {"id": name} | cut, {**verdict, "id": name, "answer": ""}

    for number in range(3):
        change(runs / f"ppo-{number}", twice)
    frame = load_run(runs / "ppo-0")
    inside = int(frame["unfinished"].sum())
    assert inside > 1
    report_runs([runs / "original"], runs / "report.html", group=[f"ppo={runs}/ppo-*"])
    assert set(read(runs / "report_repeats.csv")["thinking_unfinished"]) == {inside}
    assert set(read(runs / "report_groups.csv")["thinking_unfinished"]) == {3 * inside}
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert f"Thinking unfinished: ppo-0 {inside}, ppo-1 {inside}, ppo-2 {inside}." in page
    assert f"Thinking unfinished: ppo {3 * inside}." in page


def test_a_group_states_the_questions_that_it_leaves_out(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lost = {each["id"] for each in read_jsonl(runs / "ppo-1" / "responses.jsonl") if each["answer"] == "Unsafe"}
    lost = {*sorted(name for name in lost if "/alignment/" in name)[:2]}
    change(runs / "ppo-1", lambda response, verdict: [] if response["id"] in lost else [(response, verdict)])
    report_runs([runs / "original"], runs / "report.html", group=[f"ppo={runs}/ppo-*"])
    for name in ("groups", "group_differences"):
        table = read(runs / f"report_{name}.csv").set_index("measure")["left_out"]
        assert table["image_unsafe"] == 2
        assert table.drop("image_unsafe").sum() == 0
    said = "Left out, as not all runs answered them: ppo 2 of Image, unsafe."
    assert (runs / "report.html").read_text(encoding="utf-8").count(said) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert said in printed
    assert "Differences from original are over the questions that both runs answered" in printed
