"""ScoreTable with a real trainer that predicts nothing."""

import types

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.score_table import ScoreTable
from safervlm.errors import RecordError
from safervlm.records import Question, Response, Verdict, write_jsonl
from safervlm.results.runs import load_run
from safervlm.results.scores import by_category, scores

LABELS = {"0.png": ["Unsafe", "Safe", "N/A"], "1.png": ["Unsafe", "Unsafe", "Unsafe"]}


def records():
    for image, labels in LABELS.items():
        for number, label in enumerate(labels):
            name = f"Made/{image}/alignment/{number}"
            question = Question(name, "Made", image, None, "alignment", number, "Safe?", "=Hate", "mask", "Unsafe")
            yield Response(question, "an answer", "stop", 3), Verdict(name, label, {label: 1.0}, "judge")


class Nothing(pl.LightningModule):
    def predict_step(self, batch):
        return batch


class JudgeLast(pl.Callback):
    """Writes the files of the measuring and judging callbacks."""

    def on_predict_end(self, trainer, pl_module):
        responses, verdicts = zip(*records(), strict=True)
        write_jsonl(f"{trainer.default_root_dir}/responses.jsonl", (response.to_dict() for response in responses))
        write_jsonl(f"{trainer.default_root_dir}/verdicts.jsonl", (verdict.to_dict() for verdict in verdicts))


def predict(folder, callbacks):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.predict(Nothing(), DataLoader(torch.zeros(1)), return_predictions=False)


def test_scores_are_written_and_printed(tmp_path, capsys):
    run = tmp_path / "base"
    run.mkdir()
    predict(run, [JudgeLast(), ScoreTable()])
    table = scores(load_run(run))
    written = pd.read_csv(run / "scores.csv")
    row = written.query(
        "measure == 'accuracy_na_wrong' and category == 'overall' and sampling_unit == 'these concepts'"
    )
    assert row.value.item() == pytest.approx(4 / 6)
    assert written.value.tolist() == pytest.approx(table.value.tolist(), nan_ok=True)
    sheets = pd.read_excel(run / "scores.xlsx", sheet_name=None)
    assert sheets["scores"].value.tolist() == pytest.approx(table.value.tolist(), nan_ok=True)
    assert sheets["by category"].category.tolist() == ["=Hate", "overall", "overall"]  # a text, not a formula
    assert sheets["by category"].accuracy.tolist() == pytest.approx(by_category(table).accuracy.tolist())
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["responses.jsonl", "verdicts.jsonl", "scores.csv", "scores.xlsx"]
    )
    printed = capsys.readouterr().out
    assert "base: accuracy" in printed
    assert "66.7" in printed
    assert "80.0" in printed


def test_other_processes_write_nothing(tmp_path):
    trainer = types.SimpleNamespace(is_global_zero=False, default_root_dir=str(tmp_path))
    ScoreTable().on_predict_end(trainer, Nothing())
    assert not list(tmp_path.iterdir())


def test_missing_verdicts_are_an_error_and_write_no_scores(tmp_path):
    responses = [response for response, _ in records()]
    write_jsonl(tmp_path / "responses.jsonl", (response.to_dict() for response in responses))
    with pytest.raises(RecordError, match=r"verdicts\.jsonl: no such file"):
        predict(tmp_path, [ScoreTable()])
    assert not (tmp_path / "scores.csv").exists()
