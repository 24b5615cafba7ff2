"""Promise 4: a wrong command line ends with exit code 2 and one line that names the argument and its value."""

import shlex
from pathlib import Path

import pytest
from processes import Played

# MODEL, SETS and SAFE are replaced: a tiny model, and small datasets.
MEASURE = "--config configs/measure.yaml --model.vlm.model MODEL --data.folder SETS"
EVALUATE = "predict --config configs/evaluate.yaml --model.vlm.model MODEL"
FIT = "--config configs/sft.yaml --model.vlm.model MODEL --data.folder SETS --data.safe_folder SAFE"

# The command, then what the line has to contain: the argument and the value.
WRONG: list[tuple[str, list[str]]] = [
    # commands
    ("mesure", ["mesure", "--help"]),
    ("hello", ["hello"]),
    ("Predict --config configs/measure.yaml", ["Predict"]),
    ("--verison", ["--verison"]),
    ("predict", ["--config"]),
    ("fit", ["--config"]),
    ("predict hello", ["hello"]),
    (f"predict {MEASURE} hello", ["hello"]),
    (f"predict {MEASURE} -- hello", ["hello"]),
    (f"predict {MEASURE} -x 3", ["-x"]),
    ("report", ["runs"]),
    ("verify", ["run"]),
    ("report nowhere", ["nowhere"]),
    ("evaluation nowhere", ["nowhere"]),
    ("verify nowhere", ["nowhere"]),
    ("verify .", ["."]),
    ("report . .", ["."]),
    ("report nowhere --out page.txt", ["out", "page.txt"]),
    ("report nowhere --uot page.html", ["--uot", "--out"]),
    ("verify nowhere --sample many", ["--sample", "many"]),
    ("verify nowhere --dtype float16", ["--dtype", "float16"]),
    ("doctor --config nowhere.yaml", ["--config", "nowhere.yaml"]),
    ("doctor --vlm configs/vlm/llava-1.5-7b.yaml", ["--vlm", "llava-1.5-7b"]),
    ("doctor --config configs/measure.yaml --vlm nowhere.yaml", ["vlm", "nowhere.yaml"]),
    ("doctor --config empty.yaml", ["empty.yaml"]),
    ("doctor --config list.yaml", ["list.yaml"]),
    ("doctor --config broken.yaml", ["broken.yaml"]),
    ("doctor --online perhaps", ["--online", "perhaps"]),
    ("export --folder nowhere --out here", ["nowhere"]),
    ("export --folder SETS --safe_folder SAFE --out file", ["file"]),
    ("pictograms --seed many", ["--seed", "many"]),
    ("pictograms --seed 1.5", ["--seed", "1.5"]),
    ("pictograms --out file", ["out", "file"]),
    ("pictograms --out ''", ["--out"]),
    ("pictograms --threads 0", ["threads", "0"]),
    ("pictograms --threads -1", ["threads", "-1"]),
    ("demo --seed x", ["--seed", "x"]),
    ("demo --outt x", ["--outt", "--out"]),
    ("demo --out ''", ["--out"]),
    # configuration files
    ("predict --config configs/mesure.yaml", ["--config", "configs/mesure.yaml", "measure.yaml"]),
    ("predict --config nowhere.yaml", ["--config", "nowhere.yaml"]),
    ("predict --config ''", ["--config"]),
    ("predict --config .", ["--config"]),
    ("predict --config empty.yaml", ["--config", "empty.yaml"]),
    ("predict --config list.yaml", ["--config", "list.yaml"]),
    ("predict --config broken.yaml", ["--config", "broken.yaml", "line 3"]),
    ("predict --config tabs.yaml", ["--config", "tabs.yaml", "line 2"]),
    ("predict --config latin.yaml", ["--config", "latin.yaml"]),
    ("predict --config twice.yaml", ["--config", "twice.yaml", "line 3", "run"]),
    ("predict --config text.txt", ["text.txt"]),
    (f"predict {MEASURE} --config seeded.yaml", ["seeded.yaml", "--seed_everything"]),
    (f"predict {MEASURE} --config emptied.yaml", ["emptied.yaml", "data"]),
    (f"predict {MEASURE} --config configs/pictograms/vlm.yaml", ["init_args"]),
    ("predict --config configs/pictograms/measure.yaml", ["sampling.max_new_tokens"]),
    ("predict --config configs/sft.yaml", ["--config", "SFT", "fit"]),
    ("fit --config configs/measure.yaml", ["--config", "Measure", "predict"]),
    ("validate --config configs/ppo.yaml", ["--config", "PPO", "fit"]),
    # misspelt, of another class, abbreviated
    (f"predict {MEASURE} --model.vlm.modle x", ["--model.vlm.modle", "--model.vlm.model"]),
    (f"predict {MEASURE} --trainer.max_step 3", ["--trainer.max_step", "--trainer.max_steps"]),
    (f"predict {MEASURE} --dta.limit 3", ["--dta.limit"]),
    (f"predict {MEASURE} --ckpt_path file", ["--ckpt_path", "file", "--model.vlm.adapter"]),
    (
        f"predict {MEASURE} --model.vlm.images.max_sidee 3",
        ["--model.vlm.images.max_sidee", "mean --model.vlm.images.max_side?"],
    ),
    (f"predict {MEASURE} --split test", ["--split", "--data.split"]),
    (f"predict {MEASURE} --limt 3", ["--limt"]),
    (f"fit {FIT} --model.beta 0.1", ["--model.beta"]),
    (f"fit {FIT} --model.vlm.lora.rank 8", ["--model.vlm.lora.rank"]),
    (f"predict {MEASURE} --run", ["--run"]),
    # overwritten
    (f"predict {MEASURE} --model.seed 3", ["--model.seed", "--seed_everything"]),
    (f"fit {FIT} --data.seed=3", ["--data.seed", "--seed_everything"]),
    (f"fit {FIT} --model.init_args.seed 3", ["--model.init_args.seed", "--seed_everything"]),
    (f"predict {MEASURE} --trainer.default_root_dir x", ["--trainer.default_root_dir", "--run"]),
    # empty
    (f"predict {MEASURE} --run ''", ["--run"]),
    (f"predict {MEASURE} --run=", ["--run"]),
    (f"predict {MEASURE} --run '  '", ["--run"]),
    (f"predict {MEASURE} --data.folder ''", ["--data.folder"]),
    (f"predict {MEASURE} --model.vlm.adapter ''", ["--model.vlm.adapter"]),
    (f"predict {MEASURE} --model.vlm.model ''", ["--model.vlm.model"]),
    (f"fit {FIT} --ckpt_path ''", ["--ckpt_path"]),
    # values
    (f"fit {FIT} --model.lr -1e-3", ["model.lr", "-0.001"]),
    (f"fit {FIT} --model.lr=-1e-3", ["model.lr", "-0.001"]),
    (f"fit {FIT} --model.lr fast", ["--model.lr", "fast"]),
    (f"fit {FIT} --model.lr nan", ["model.lr", "nan"]),
    (f"fit {FIT} --model.lr 0", ["model.lr", "0"]),
    (f"fit {FIT} --model.warmup_steps -1", ["warmup_steps", "-1"]),
    (f"fit {FIT} --model.vlm.lora.r 0", ["lora.r", "0"]),
    (f"fit {FIT} --model.vlm.lora.alpha 0", ["lora.alpha", "0"]),
    (f"fit {FIT} --model.vlm.lora.dropout 1", ["lora.dropout", "1"]),
    (f"fit {FIT} --model.vlm.lora.target_modules '(('", ["lora.target_modules", "(("]),
    (f"fit {FIT} --data.batch_size 0", ["data.batch_size", "0"]),
    (f"fit {FIT} --data.validation_fraction 1", ["data.validation_fraction", "1"]),
    (f"fit {FIT} --trainer.max_epochs 0", ["trainer.max_epochs", "0"]),
    (f"fit {FIT} --trainer.max_steps 0", ["trainer.max_steps", "0"]),
    (f"fit {FIT} --trainer.max_epochs many", ["--trainer.max_epochs", "many"]),
    (f"fit {FIT} --trainer.limit_train_batches 0", ["trainer.limit_train_batches", "0"]),
    (f"fit {FIT} --trainer.accumulate_grad_batches 0", ["trainer", "accumulate_grad_batches"]),
    (f"fit {FIT} --trainer.precision 7", ["--trainer.precision", "7"]),
    (f"fit {FIT} --trainer.strategy fast", ["trainer", "fast"]),
    (f"fit {FIT} --trainer.accelerator gpuu", ["trainer", "gpuu"]),
    (f"fit {FIT} --trainer.accelerator cpu --trainer.devices 0", ["trainer", "0"]),
    (f"fit {FIT} --trainer.accelerator gpu", ["trainer"]),
    (f"fit {FIT} --trainer.logger lightning.pytorch.loggers.WandbLogger", ["--trainer.logger", "wandb"]),
    (f"fit {FIT} --trainer.callbacks+=callbacks.nothing.Nothing", ["--trainer.callbacks", "callbacks.nothing"]),
    (f"predict {MEASURE} --seed_everything -1", ["seed_everything", "-1"]),
    (f"predict {MEASURE} --seed_everything many", ["--seed_everything", "many"]),
    (f"predict {MEASURE} --data.limit 0", ["data.limit", "0"]),
    (f"predict {MEASURE} --limit -3", ["limit", "-3"]),
    (f"predict {MEASURE} --limit many", ["--data.limit", "many"]),
    (f"predict {MEASURE} --data.split tset", ["--data.split", "tset", "test"]),
    (f"predict {MEASURE} --data.batch_size many", ["--data.batch_size", "many"]),
    (f"predict {MEASURE} --data.num_workers -1", ["data.num_workers", "-1"]),
    (f"predict {MEASURE} --data.capabilities alignment", ["--data.capabilities", "alignment"]),
    (f"predict {MEASURE} --data.capabilities '[alignmnt]'", ["--data.capabilities", "alignmnt"]),
    (f"predict {MEASURE} --data.capabilities '[]'", ["data.capabilities", "[]"]),
    (f"predict {MEASURE} --data.prompts drawn", ["data.prompts", "data.split"]),
    (f"predict {MEASURE} --data.folder nowhere", ["nowhere"]),
    (f"predict {MEASURE} --data.name a/b", ["data.name", "a/b"]),
    (f"predict {MEASURE} --model.sampling.top_p 3", ["sampling.top_p", "3"]),
    (f"predict {MEASURE} --model.sampling.temperature -1", ["sampling.temperature", "-1"]),
    (f"predict {MEASURE} --model.sampling.max_new_tokens 0", ["sampling.max_new_tokens", "0"]),
    (f"predict {MEASURE} --model.vlm.dtype float16", ["--model.vlm.dtype", "float16"]),
    (f"predict {MEASURE} --model.vlm.adapter nowhere", ["adapter", "nowhere"]),
    (f"predict {MEASURE} --model.vlm.model ./nowhere", ["model", "nowhere"]),
    (f"predict {MEASURE} --model.vlm safervlm.vlm.llava.Lava", ["--model.vlm", "Lava"]),
    (f"predict {MEASURE} --model.vlm configs/vlm/nowhere.yaml", ["--model.vlm", "nowhere.yaml"]),
    (f"predict {MEASURE} --model safervlm.measure.Mesure", ["--model", "Mesure"]),
    (f"predict {MEASURE} --data safervlm.measure.Measure", ["--data", "safervlm.measure.Measure"]),
    (f"predict {MEASURE} --run file", ["--run", "file"]),
    (f"predict {MEASURE} --run file/under", ["--run", "file/under"]),
    (f"fit {FIT} --ckpt_path nowhere.ckpt", ["--ckpt_path", "nowhere.ckpt"]),
    (
        "predict --config configs/evaluate.yaml --model.vlm.model MODEL --data.only '[nothing]'",
        ["data.only", "nothing"],
    ),
    ("predict --config configs/evaluate.yaml --data.source x.tsv", ["--data.source"]),
    ("predict --config configs/judge_responses.yaml --data.responses nowhere", ["nowhere"]),
    ("fit --config configs/judge.yaml --data.answers nowhere.csv", ["data.answers", "nowhere.csv"]),
    ("fit --config configs/judge.yaml --data.held_out 2", ["data.held_out", "2"]),
]

FILES = {
    "empty.yaml": b"",
    "list.yaml": b"- 1\n- 2\n",
    "broken.yaml": b"run: x\nmodel: [1, 2\n",
    "tabs.yaml": b"model:\n\tclass_path: x\n",
    "latin.yaml": "run: caf\xe9\n".encode("latin-1"),
    "twice.yaml": b"run: a\nseed_everything: 1\nrun: b\n",
    "seeded.yaml": b"model:\n  init_args:\n    seed: 3\n",
    "emptied.yaml": b"data:\n  init_args:\n    folder: ''\n",
    "text.txt": b"hello\n",
    "file": b"",
}


@pytest.mark.parametrize(("line", "named"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_line_is_one_line(
    line: str, named: list[str], tmp_path: Path, tiny_llava: Path, tiny_sets: Path
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    there = {"MODEL": tiny_llava, "SETS": tiny_sets / "unsafe", "SAFE": tiny_sets / "safe"}
    played = Played([str(there.get(word, word)) for word in shlex.split(line)], tmp_path)
    code = played.end(60)
    assert code == 2, played.output
    assert "Traceback" not in played.output
    lines = [each for each in played.output.splitlines() if each.strip()]
    assert len(lines) <= 3, played.output
    assert lines[-1].startswith("safervlm: error: "), played.output
    missing = [name for name in named if name not in lines[-1]]
    assert not missing, f"{missing} not in {lines[-1]}"


def test_there_are_a_hundred() -> None:
    assert len({line for line, _ in WRONG}) >= 100
