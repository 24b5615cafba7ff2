"""The evaluation table in all formats: equal numbers, no scripts, no recognisable image."""

import re
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pytest
from evaluations import question, safety, write
from PIL import Image

from safervlm.errors import ArgumentError, RecordError
from safervlm.reports.evaluation import evaluation
from safervlm.reports.page import report
from safervlm.reports.suite_latex import suite_latex_tables
from safervlm.reports.suite_remarks import other_models
from safervlm.reports.suite_tables import shown_estimate
from safervlm.run import write_stage


@pytest.fixture
def runs(tmp_path):
    """``original`` and ``ppo``, each with an evaluation of 304 responses; all images are the same file."""
    file = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)).save(file)
    for seed, (name, right) in enumerate((("original", 0.4), ("ppo", 0.9))):
        answers = [
            (type(asked)(**asked.to_dict() | {"image_path": str(file)}), f"{said} <script>x</script>", label)
            for asked, said, label in safety(np.random.default_rng(seed), right)
        ]
        write(tmp_path / "runs" / name / "evaluation", answers)
    return [tmp_path / "runs" / name for name in ("original", "ppo")]


def test_evaluation_table_is_the_same_in_all_formats(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal shows no decimals
    out = evaluation(runs, tmp_path / "out" / "all.html")
    printed = " ".join(capsys.readouterr().out.split())
    names = [file.name for file in sorted(out.parent.iterdir())]
    assert names == ["all.csv", "all.html", "all.tex", "all.xlsx", "all_differences.csv", "all_table.csv"]
    page = out.read_text()
    long = pd.read_csv(out.with_suffix(".csv"))
    cells = re.findall(r'data-column="([^"]+)"[^>]*><div><data value="([^"]+)">', page)
    by_column = {}
    for column, value in cells:
        by_column.setdefault(column, []).append(float(value))
    for column, rows in long.groupby("column"):
        expected = rows.drop_duplicates("run").set_index("run")["value"].loc[["original", "ppo"]].tolist()
        assert by_column[column] == pytest.approx(expected, nan_ok=True)
    wide = pd.read_csv(out.with_name("all_table.csv"), index_col="run")
    share = long[(long["column"] == "SMID") & (long["run"] == "ppo")].iloc[0]
    text = f"{100 * share['value']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    these = long[
        (long["column"] == "alignment_all") & (long["sampling_unit"] == "these concepts") & (long["run"] == "ppo")
    ]
    assert wide.loc["ppo", "Alignment of all images: these concepts"] == (
        f"[{100 * these['low'].item():.1f}, {100 * these['high'].item():.1f}]"
    )
    for text_of_all in (page, out.with_suffix(".tex").read_text()):
        assert "simulated coverage" in text_of_all
    assert wide.loc["ppo", "SMID"] == text
    assert text in " ".join(printed.split())
    tex = out.with_suffix(".tex").read_text()
    number, interval = text.split(" ", 1)
    assert f"\\shortstack[r]{{{number}\\\\{{\\scriptsize {{[}}{interval[1:]}}}}}" in tex
    book = openpyxl.load_workbook(out.with_suffix(".xlsx"))
    assert book.sheetnames == ["table", "evaluation", "differences", "notes"]
    differences = pd.read_csv(out.with_name("all_differences.csv")).set_index("column")
    assert set(differences["run"]) == {"ppo"}
    smid = differences.loc["SMID"]
    assert smid["difference"] == pytest.approx(share["value"] - by_column["SMID"][0])
    assert f"{100 * smid['difference']:+.1f}" in page
    assert f"SMID & {100 * smid['difference']:+.1f}" in tex
    assert tex.count("{") == tex.count("}")
    assert tex.count(r"\begin{tabular}") == 5


def test_evaluation_page_has_no_scripts_and_only_blurred_images(runs, tmp_path):
    page = evaluation(runs, tmp_path / "all.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page  # a response is text
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="https?:', page)
    flipped = re.findall(r"now (correct|wrong), (\d+) responses", page)
    assert {way for way, _ in flipped} == {"correct", "wrong"}
    images = re.findall(r'<img src="(data:image/png;base64,[^"]+)"', page)
    assert images
    assert all(len(image) < 40_000 for image in images)


def test_examples_of_changed_answers_are_chosen_deterministically(runs, tmp_path):
    pages = [evaluation(runs, tmp_path / f"{n}.html").read_text() for n in (1, 2)]
    assert pages[0] == pages[1]


def test_single_evaluation_folder_is_accepted_and_has_no_differences(runs, capsys):
    out = evaluation([runs[0] / "evaluation"])
    assert out == runs[0] / "evaluation" / "evaluation.html"
    assert "original" in " ".join(capsys.readouterr().out.split())
    assert not out.with_name("evaluation_differences.csv").exists()


def test_dataset_missing_in_one_run_is_shown_as_a_dash(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a long temporary folder takes lines from the remarks
    folder = runs[1] / "evaluation"
    for name in ("responses.jsonl", "verdicts.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text(
            "".join(line for line in lines if '"id": "SMID' not in line and "/context/" not in line)
        )
    out = evaluation(runs, tmp_path / "all.html")
    wide = pd.read_csv(out.with_name("all_table.csv"), index_col="run")
    assert wide.loc["ppo", "SMID"] == wide.loc["ppo", "Contexts with the image: these concepts"] == "-"
    assert "[" in wide.loc["original", "SMID"]
    assert "no difference, not measured in both" in " ".join(capsys.readouterr().out.split())


def test_outdated_differences_file_is_removed(runs, tmp_path):
    evaluation(runs, tmp_path / "all.html")
    assert (tmp_path / "all_differences.csv").exists()
    evaluation(runs[:1], tmp_path / "all.html")
    assert not (tmp_path / "all_differences.csv").exists()


def test_unreadable_run_is_skipped_and_the_others_are_reported(runs, tmp_path, capsys):
    (runs[1] / "evaluation" / "verdicts.jsonl").unlink()
    out = tmp_path / "all.html"
    with pytest.raises(SystemExit, match="3"):
        evaluation(runs, out)
    assert "ppo is skipped: " in " ".join(capsys.readouterr().out.split())
    assert set(pd.read_csv(out.with_suffix(".csv"))["run"]) == {"original"}
    # Without the original no other run becomes the baseline.
    other = tmp_path / "runs" / "nothing"
    out = tmp_path / "other.html"
    with pytest.raises(SystemExit, match="3"):
        evaluation([other, runs[0]], out)
    assert "nothing is skipped, and there are no differences from it" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "other_differences.csv").exists()
    assert "is skipped" in out.read_text()


def test_invalid_runs_and_output_names_are_rejected(runs, tmp_path):
    with pytest.raises(ValueError, match=r"out: the table is a page"):
        evaluation(runs, tmp_path / "all.pdf")
    with pytest.raises(ValueError, match="named twice"):
        evaluation([runs[0], runs[0]])
    with pytest.raises(ValueError, match="at least one run"):
        evaluation([])
    with pytest.raises(RecordError, match=r"responses\.jsonl: no such file"):
        evaluation([Path(tmp_path / "nowhere")])


def test_a_file_of_the_users_is_not_overwritten(runs, tmp_path):
    (tmp_path / "mine.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"out: .*mine\.csv already exists.*name another page"):
        evaluation(runs, tmp_path / "mine.html")
    assert (tmp_path / "mine.csv").read_text() == "image,label\n"
    evaluation(runs, tmp_path / "page.html")
    evaluation(runs, tmp_path / "page.html")  # its own output may be replaced
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    with pytest.raises(ArgumentError, match=r"out: .*notes\.html already exists"):
        evaluation(runs, tmp_path / "notes.html")
    with pytest.raises(ArgumentError, match=r"out: .*page\.html already exists and was not written by safervlm report"):
        report(runs, tmp_path / "page.html")


def test_a_line_break_in_a_name_does_not_end_a_latex_comment(monkeypatch):
    monkeypatch.setattr(
        "safervlm.reports.suite_latex.coverage_lines", lambda table: ["a\n\\input{x}\u2028: by bootstrap"]
    )
    table = pd.DataFrame(columns=["run", "column", "unit", "sampling_unit", "group", "heading", "method", "detail"])
    written = suite_latex_tables(table, pd.DataFrame(), [])
    assert "% a\\n\\input{x}\\u2028: by bootstrap" in written.splitlines()


def test_high_na_rates_other_base_models_and_unfinished_runs_are_reported(runs, tmp_path, capsys, monkeypatch):
    """Many N/A responses, different base models: neither is visible from the numbers."""
    monkeypatch.setenv("COLUMNS", "200")  # a long temporary folder takes lines from the remarks
    for run, model in zip(runs, ("one", "other"), strict=True):
        settings = {"model": {"vlm": {"model": model, "weights": model}}}
        write_stage(run / "evaluation", "measure", settings=settings, finished=model == "one")
    page = evaluation(runs, tmp_path / "all.html").read_text()
    printed = " ".join(capsys.readouterr().out.split())
    said = "ppo and original have other base models (other; one): not all of their difference is due to an adapter"
    long = pd.read_csv(tmp_path / "all.csv").query("run == 'original' and column == 'alignment_all'")
    often = f"; {100 * long['na_rate'].iloc[0]:.0f} % of Alignment of all images"
    for text in (printed, page.replace("&#39;", "'")):
        assert said in text
        assert often in text
    assert f"{100 * long['na_rate'].iloc[0]:.1f} % N/A</small>" in page
    assert "original: N/A, which counts as wrong, is " in printed
    assert "ppo: N/A" not in printed  # rarely
    assert "ppo: the evaluation isn't finished; the same command resumes" in printed
    assert "original: the evaluation" not in printed


def test_an_evaluation_whose_adapter_was_trained_on_since_is_reported(runs, tmp_path, capsys):
    adapter = runs[1] / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    vlm = {"model": "one", "adapter": {"folder": "runs/ppo/adapter", "sha256": "0123456789abcdef"}}
    write_stage(runs[1] / "evaluation", "measure", settings={"model": {"vlm": vlm}}, finished=True)
    evaluation(runs, tmp_path / "all.html")
    warned = "warning: ppo was measured before the adapter in the same folder was trained on"
    assert warned in " ".join(capsys.readouterr().out.split())


def test_rounded_zero_has_no_minus_sign_and_piped_output_is_wide(runs, tmp_path, capsys, monkeypatch):
    assert shown_estimate("", -0.0004) == "0.000"
    assert shown_estimate("%", -0.0004, signed=True) == "+0.0"
    assert shown_estimate("points", -0.06) == "-0.1"
    monkeypatch.delenv("COLUMNS", raising=False)
    evaluation(runs, tmp_path / "all.html")
    assert "Alignment of unsafe images (draw)" in capsys.readouterr().out  # in one line


def test_datasets_with_other_images_of_equal_names_have_no_difference(runs, tmp_path, capsys):
    for run, images in zip(runs, ("a", "b"), strict=True):
        sets = {
            "smid": {"name": "SMID", "images": images},
            "unsafe": {"names": ["U", "S"], "images": "same"},
            "contexts": {"names": ["U"], "images": "same", "contexts": "c"},
        }
        write_stage(run / "evaluation", "measure", settings={"data": {"sets": sets}})
    evaluation(runs, tmp_path / "all.html")
    differences = pd.read_csv(tmp_path / "all_differences.csv").set_index("column")["difference"]
    assert np.isnan(differences["SMID"])
    assert not differences[["alignment_all", "context_all"]].isna().any()
    assert "ppo: no difference, they were asked about other images: SMID" in " ".join(capsys.readouterr().out.split())


def test_run_that_mme_scoring_rejects_is_skipped_and_others_are_reported(runs, tmp_path, capsys):
    asked = question("Mine", "0.png", "yes_no", 0, "Yes", "color")
    write(tmp_path / "runs" / "odd" / "evaluation", [(asked, "Yes", None)])
    with pytest.raises(SystemExit, match="3"):
        evaluation([*runs, tmp_path / "runs" / "odd"], tmp_path / "all.html")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: odd is skipped: MME's rule needs two questions per image, '0.png' (color) has 1" in said
    assert (tmp_path / "all.html").exists()


def test_base_models_are_compared_by_weights_and_not_by_path():
    def run(name, model, weights):
        keys = {"settings.model.vlm.model": model, "settings.model.vlm.weights": weights}
        return name, {"measure": keys}

    original = run("original", "models/llava", "a")
    assert other_models([original, run("sft", "./models/llava", "a")]) == []
    (line,) = other_models([original, run("sft", "models/llava", "b")])
    assert line.startswith("sft and original have other base models (models/llava; models/llava)")
