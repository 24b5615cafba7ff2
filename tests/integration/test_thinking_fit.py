"""SFT, DPO and PPO of thinking models from the command line: trained or rejected, for each type of chat template."""

import csv
import json
from pathlib import Path
from typing import Any

import families
import pytest

from safervlm.cli.main import main
from safervlm.records import THINKING_UNFINISHED, read_jsonl
from safervlm.run import read_manifest

ON = "--model.vlm.template_arguments={enable_thinking: true}"
MARKS = "--model.vlm.thinking=[<think>, </think>]"
ALLOWED = "--model.vlm.train_without_thinking=true"
# Type of template, further arguments, whether it is rejected: the table of docs/models.md, "Scoring and training".
CASES = [
    ("opened", [], True),
    ("opened", [ALLOWED], False),
    ("hybrid", [], False),
    ("hybrid", [ON], True),
    ("kept", [], True),
    ("kept", [ALLOWED], False),
    ("written", [], False),
    ("written", [MARKS], True),
    ("system", [], False),
    ("system", [MARKS], True),
]


def fit(objective: str, folder: Path, sets: Path, run: Path, *more: str) -> list[str]:
    line = ["fit", f"--config=configs/{objective}.yaml", "--model.vlm=safervlm.vlm.auto.Transformers"]
    line += [f"--model.vlm.model={folder}", "--model.vlm.dtype=float32", "--model.vlm.lora.r=2", *more]
    line += [f"--data.folder={sets / 'unsafe'}", f"--data.safe_folder={sets / 'safe'}", "--data.num_workers=0"]
    line += ["--model.warmup_steps=0", "--model.lr=0.01", "--data.batch_size=2", "--data.limit=4"]
    return [*line, "--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--run={run}"]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize(("kind", "more", "rejected"), CASES)
def test_training_on_given_responses_is_accepted_or_rejected_by_template(
    objective: str, kind: str, more: list[str], rejected: bool, tiny_sets: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, run = tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    families.thinking(folder, kind)
    line = fit(objective, folder, tiny_sets, run, *more)
    if not rejected:
        main(line)
        assert (run / "adapter" / "adapter_config.json").is_file()
        return
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 2
    (error,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("safervlm: error:")]
    assert "vlm.train_without_thinking: the chat template writes a given response without reasoning" in error
    assert "set it to true, turn thinking off (vlm.template_arguments), or train by PPO" in error
    assert not (run / "adapter").exists()


def test_ppo_trains_on_the_models_own_reasoning(
    tiny_sets: Path, tiny_judges: Path, tmp_path: Path, capsys: Any
) -> None:
    """Random weights never close their reasoning, so no response has an answer; the run reports it everywhere."""
    folder, run = tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    families.thinking(folder, "opened")
    arguments = {"checkpoint": str(tiny_judges / "alignment" / "epoch_10.pt"), "base": str(tiny_judges / "alignment")}
    judge = {"class_path": "safervlm.judging.classifier.Judge", "init_args": arguments}
    check = {"judge": judge, "sampling": {"max_new_tokens": 3}}
    callbacks: list[dict[str, Any]] = [{"class_path": "callbacks.generation_check.GenerationCheck", "init_args": check}]
    callbacks += [{"class_path": f"callbacks.{name}"} for name in ("rollout_log.RolloutLog", "metrics_csv.MetricsCSV")]
    callbacks += [{"class_path": "callbacks.adapter_export.AdapterExport"}]
    more = [f"--model.judge={json.dumps(judge)}", f"--trainer.callbacks={json.dumps(callbacks)}"]
    more += ["--model.response_length=5", "--data.validation_fraction=0.5"]
    main(fit("ppo", folder, tiny_sets, run, *more))
    assert (run / "adapter" / "adapter_config.json").is_file()
    assert {each["finish_reason"] for each in read_jsonl(run / "rollouts.jsonl")} == {THINKING_UNFINISHED}
    with (run / "metrics.csv").open() as file:
        values = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert values["train/thinking_unfinished"] == 1
    assert "train/unsafe_rate_on_safe" not in values
    rates = read_manifest(run)["stages"]["ppo"]["unsafe_rate_on_safe"]
    assert rates == {"before": None, "after": None}
    assert "GenerationCheck: thinking unfinished in" in capsys.readouterr().out
