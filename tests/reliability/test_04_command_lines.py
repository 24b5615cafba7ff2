"""Promise 4: a wrong command line ends with exit code 2 and one line that names the argument and its value."""

import gzip
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Played

from safervlm.cli.arguments import prepared
from safervlm.errors import ArgumentError

# MODEL, SETS and SAFE are replaced: a tiny model, and small datasets.
MEASURE = "--config configs/measure.yaml --model.vlm.model MODEL --data.folder SETS"
EVALUATE = "predict --config configs/evaluate.yaml --model.vlm.model MODEL"
FIT = "--config configs/sft.yaml --model.vlm.model MODEL --data.folder SETS --data.safe_folder SAFE"

# The command, then the required parts of the error line: the argument and the value.
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
    (f"pictograms --threads {10**20}", ["threads", "100000000000000000000"]),
    (f"verify nowhere --sample {'9' * 400}", ["sample", "999"]),
    ("demo --out file", ["out", "file"]),
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
    (f"predict {MEASURE} --dta.limit 3", ["--dta.limit", "mean --data.limit?"]),
    (f"predict {MEASURE} --dta x", ["--dta", "mean --data?"]),
    (f"predict {MEASURE} --modle.vlm.model x", ["--modle.vlm.model", "mean --model.vlm.model?"]),
    (f"predict {MEASURE} --modle.vlm Llava", ["--modle.vlm", "mean --model.vlm?"]),
    (f"predict {MEASURE} --trianer.max_stesp 3", ["--trianer.max_stesp", "mean --trainer.max_steps?"]),
    (f"predict {MEASURE} --model.vlmm.model x", ["--model.vlmm.model", "mean --model.vlm.model?"]),
    (f"fit {FIT} --modle.vlm.lroa.r 3", ["--modle.vlm.lroa.r", "mean --model.vlm.lora.r?"]),
    (f"predict {MEASURE} --config section.yaml", ["section.yaml, line 2", "dta", "mean data?"]),
    (f"predict {MEASURE} --config nested_typo.yaml", ["nested_typo.yaml, line 5", "modle", "mean model?"]),
    (f"predict {MEASURE} --config class_typo.yaml", ["class_typo.yaml, line 2", "clas_path", "mean class_path?"]),
    (f"predict {MEASURE} --model.vlm part_typo.yaml", ["part_typo.yaml, line 2", "modle", "mean model?"]),
    (f'predict {MEASURE} --data \'{{"init_args": {{"foldr": 1}}}}\'', ["--data", "foldr", "mean folder?"]),
    ("doctor --config section.yaml", ["section.yaml, line 2", "dta", "mean data?"]),
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
    (f"predict {MEASURE} --limit many", ["--limit", "many"]),
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
    (f"predict {MEASURE} --run https://me:pw@host/run", ["--run", "https://host/run", "address"]),
    ("predict --config addressed.yaml", ["addressed.yaml: run", "s3://host/run", "address"]),
    ("report http://me:pw@host/run", ["http://host/run", "address"]),
    ("verify nowhere https://host/run?token=1", ["https://host/run#query", "address"]),
    ("label s3://bucket/run --rater x", ["s3://bucket/run", "address"]),
    ("merge gs://bucket/run", ["gs://bucket/run", "address"]),
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
    # in JSON, in files of a section, of a plain command
    ("report ''", ["''", "empty"]),
    ("evaluation '' ' '", ["''", "empty"]),
    ("verify ''", ["''", "empty"]),
    ("demo --seed -1", ["--seed", "-1"]),
    ("pictograms --seed -1", ["--seed", "-1"]),
    ("pictograms --seed true", ["--seed", "true"]),
    ("verify nowhere --seed 4294967296", ["--seed", "4294967296"]),
    ("export --out here --seed -5", ["--seed", "-5"]),
    (f"predict {MEASURE} ''", ["''", "empty"]),
    (f"predict {MEASURE} --seed_everything true", ["--seed_everything", "true"]),
    (f"predict {MEASURE} --config unseeded.yaml", ["unseeded.yaml: seed_everything", "False"]),
    (f'predict {MEASURE} --model \'{{"init_args": {{"seed": 3}}}}\'', ["--model", "seed", "--seed_everything"]),
    (f'predict {MEASURE} --data \'{{"init_args": {{"seed": 3}}}}\'', ["--data", "seed", "--seed_everything"]),
    (f"predict {MEASURE} --model.vlm emptied_vlm.yaml", ["emptied_vlm.yaml", "model.vlm.init_args.model", "empty"]),
    (f"{EVALUATE} --data.own own.json", ["own.json", "data.own.mine.init_args.source", "empty"]),
    ("doctor --config configs/measure.yaml --config seeded.yaml", ["seeded.yaml", "--seed_everything"]),
    # units, types
    (f"predict {MEASURE} --limit 20k", ["limit", "20k"]),
    (f"predict {MEASURE} --limit 1e1", ["limit", "10.0"]),
    (f"predict {MEASURE} --limit 3.5", ["limit", "3.5"]),
    (f"predict {MEASURE} --data.batch_size 8x", ["--data.batch_size", "8x"]),
    (f"fit {FIT} --trainer.max_epochs 3.5", ["--trainer.max_epochs", "3.5"]),
    (f"fit {FIT} --trainer.max_time 5min", ["--trainer", "5min"]),
    (f"fit {FIT} --trainer.limit_train_batches 50%", ["--trainer.limit_train_batches", "50%"]),
    (f"fit {FIT} --trainer.limit_train_batches 1.5", ["limit_train_batches", "1.5"]),
    (f"fit {FIT} --trainer.limit_train_batches -1", ["limit_train_batches", "-1"]),
    (f"fit {FIT} --trainer.val_check_interval 0", ["val_check_interval", "0"]),
    (f"fit {FIT} --trainer.gradient_clip_val big", ["--trainer.gradient_clip_val", "big"]),
    (f"fit {FIT} --trainer.gradient_clip_val -1", ["gradient_clip_val", "-1"]),
    (f"fit {FIT} --trainer.gradient_clip_val nan", ["gradient_clip_val", "nan"]),
    (f"fit {FIT} --trainer.max_epochs -5", ["max_epochs", "-5"]),
    (f"fit {FIT} --trainer.devices '[0, 0]' --trainer.accelerator cpu", ["trainer", "0"]),
    (f"fit {FIT} --trainer.num_nodes 0", ["num_nodes", "0"]),
    (f"fit {FIT} --trainer.callbacks Nothing", ["--trainer.callbacks", "Nothing"]),
    (f'fit {FIT} --trainer.callbacks \'[{{"class_path": "os.system"}}]\'', ["--trainer.callbacks", "os.system"]),
    (f"fit {FIT} --trainer.plugins nothing", ["plugins", "nothing"]),
    (f"fit {FIT} --trainer yes", ["--trainer", "yes"]),
    (f"fit {FIT} --model.lr 1e400", ["model.lr", "inf"]),
    (f"fit {FIT} --data.validation_fraction 10%", ["--data.validation_fraction", "10%"]),
    (f"fit {FIT} --model.vlm.lora.dropout none", ["dropout", "none"]),
    (f"fit {FIT} --model.vlm.lora '{{r: 8, rr: 9}}'", ["rr"]),
    (f"fit {FIT} --model.vlm.lora.r 8 --model.vlm.lora.r 0", ["lora.r", "0"]),
    (f'predict {MEASURE} --model.sampling \'{{"top_p": 1, "top_p": 0.5}}\'', ["--model.sampling", "top_p"]),
    (f"predict {MEASURE} --model.sampling.temprature 1", ["--model.sampling.temprature", "temperature"]),
    (f"predict {MEASURE} --model.sampling 3", ["--model.sampling", "3"]),
    (f"predict {MEASURE} --model.vlm os.system", ["--model.vlm", "VLM"]),
    (f"predict {MEASURE} --model.vlm.class_path safervlm.vlm.server.client.Servr", ["vlm", "Servr"]),
    (f"predict {MEASURE} --data.capabilities 'alignment,perception'", ["--data.capabilities"]),
    # files of other kinds
    ("predict --config folder", ["--config", "folder"]),
    ("predict --config packed.yaml.gz", ["--config", "packed.yaml.gz"]),
    ("predict --config wide.yaml", ["--config", "wide.yaml", "UTF-8"]),
    ("predict --config bomb.yaml", ["--config", "bomb.yaml", "aliases"]),
    ("predict --config zeros.yaml", ["--config", "zeros.yaml"]),
    ("predict --config two.yaml", ["--config", "two.yaml"]),
    ("predict --config typo.yaml", ["vml"]),
    ("predict --config configs/measure.yaml --config configs/sft.yaml", ["--config", "SFT", "fit"]),
    (f"predict {MEASURE} --model.vlm folder", ["--model.vlm", "folder"]),
    (f"predict {MEASURE} --model.vlm file", ["--model.vlm", "file"]),
    (f"predict {MEASURE} --model.vlm.model file", ["vlm.model", "file"]),
    (f"predict {MEASURE} --model.vlm.model folder", ["vlm.model", "folder"]),
    (f"predict {MEASURE} --model.vlm.adapter file", ["adapter", "file"]),
    (f"predict {MEASURE} --data.folder file", ["file"]),
    (f"predict {MEASURE} --data.folder folder", ["folder"]),
    (f"fit {FIT} --ckpt_path file", ["file"]),
    ("fit --config configs/judge.yaml --data.answers folder", ["data.answers", "folder"]),
    ("predict --config configs/judge_responses.yaml --data.responses file", ["file"]),
    ("export --out folder --folder file", ["file"]),
    # folders that are not runs, or not yet
    ("report folder", ["folder", "responses.jsonl"]),
    ("report file", ["file"]),
    ("report trained", ["trained", "responses.jsonl"]),
    ("evaluation folder", ["folder", "responses.jsonl"]),
    ("evaluation started", ["started"]),
    ("verify trained", ["trained", "predict.yaml"]),
    ("verify started", ["started"]),
    ("verify folder --sample 0", ["sample", "0"]),
    ("verify folder --sample 1.5", ["--sample", "1.5"]),
    ("verify folder folder", ["folder"]),
    ("verify folder --addresses http://x", ["--addresses", "http://x"]),
    ("report folder --out folder", ["out", "folder"]),
    ("report folder --out mine.html", ["out", "mine.html"]),
    ("evaluation folder --out mine.html", ["out", "mine.html"]),
    ("report folder --out file/page.html", ["file"]),
    ("report folder folder/", ["folder", "twice"]),
    ("doctor --config folder", ["--config", "folder"]),
    ("doctor folder", ["folder"]),
    ("doctor --config wide.yaml", ["--config", "wide.yaml"]),
    # null, and other kinds of values than the parser can place
    (f"fit {FIT} --model.lr null", ["--model.lr", "null", "float"]),
    (f"predict {MEASURE} --model.sampling null", ["--model.sampling", "null"]),
    (f"predict {MEASURE} --config null_sampling.yaml", ["--model.sampling", "null", "Sampling"]),
    (f"predict {MEASURE} --config null_images.yaml", ["--model.vlm.images", "null", "ImageSettings"]),
    (f"predict {MEASURE} --config null_arguments.yaml", ["null_arguments.yaml: model.init_args", "None"]),
    (f"predict {MEASURE} --config null_class.yaml", ["null_class.yaml: model.class_path", "None"]),
    (f"predict {MEASURE} --config number.yaml", ["number.yaml", "the name 7"]),
    (f"predict {MEASURE} --config blank_class.yaml", ["--model:", "' safervlm.measure.Measure'"]),
    (f"predict {MEASURE} --config two_dots.yaml", ["--model:", "'..'"]),
    (f"predict {MEASURE} --config null_callback.yaml", ["--trainer.callbacks", "None", "Callback"]),
    (f"predict {MEASURE} --model.vlm '[1]'", ["--model.vlm", "[1]", "VLM"]),
    (f"predict {MEASURE} --run {'x' * 400}", ["--run", "xxx...xxx", "File name too long"]),
    (f"predict {MEASURE} --data.capabilities '[alignment, alignment]'", ["data.capabilities", "alignment, alignment"]),
    (f"predict {MEASURE} --data.num_workers 1000000", ["data.num_workers", "1000000"]),
    (f"predict {MEASURE} --limit", ["--limit has no value"]),
    (f"fit {FIT} --ckpt_path folder", ["--ckpt_path", "folder", "last.ckpt"]),
    (f"fit {FIT} --trainer.check_val_every_n_epoch 0", ["--trainer.check_val_every_n_epoch", "got 0"]),
    (f"fit {FIT} --trainer.log_every_n_steps -1", ["--trainer.log_every_n_steps", "got -1"]),
    (f"fit {FIT} --trainer.min_epochs -2", ["--trainer.min_epochs", "got -2"]),
    (f"fit {FIT} --trainer.min_steps -9", ["--trainer.min_steps", "got -9"]),
    (f"predict {MEASURE} --trainer.callbacks null", ["--trainer.callbacks", "predict", "RecordWriter"]),
    (f"fit {FIT} --trainer.num_sanity_val_steps -7", ["--trainer.num_sanity_val_steps", "got -7"]),
    (f"fit {FIT} --trainer.max_time 00:00:00:00", ["--trainer.max_time", "00:00:00:00"]),
    (f"fit {FIT} --trainer.devices auto2", ["--trainer.devices", "auto2"]),
    (f"fit {FIT} --trainer.profiler foo", ["--trainer.profiler", "foo"]),
    (f"fit {FIT} --trainer.overfit_batches -1", ["--trainer.overfit_batches", "-1"]),
    # invalid classes and misplaced keys in settings files
    (f"predict {MEASURE} --model.vlm no_class.yaml", ["--model.vlm", "no_class.yaml", "no class 'safervlm.vlm.Lava'"]),
    (f"predict {MEASURE} --model.vlm function.yaml", ["--model.vlm", "function.yaml", "'os.system'"]),
    (f"predict {MEASURE} --model.vlm data_class.yaml", ["data_class.yaml", "'safervlm.data.own.OwnData'"]),
    (
        f"predict {MEASURE} --model.vlm beside.yaml",
        ["beside.yaml: model.vlm.modle", "next to a class_path"],
    ),
    (f"predict {MEASURE} --model.vlm init_arg.yaml", ["init_arg.yaml: model.vlm.init_arg", "next to a class_path"]),
    (f"predict {MEASURE} --config no_callback.yaml", ["--trainer.callbacks", "no class 'callbacks.x.Y'"]),
    (f"predict {MEASURE} --config callback_typo.yaml", ["callback_typo.yaml, line 4", "panle"]),
    (f"predict {MEASURE} --trainer.plugins '[3]'", ["--trainer.plugins", "3"]),
    # another value in place of settings
    (f"predict {MEASURE} --model.vlm.lora 3", ["--model.vlm.lora", "settings are needed", "'3'"]),
    (f"predict {MEASURE} --model.vlm.images '[2]'", ["--model.vlm.images", "settings are needed", "[2]"]),
    (f"predict {MEASURE} --config no_lora.yaml", ["--model.vlm.lora", "settings are needed", "True"]),
    (f"fit {FIT} --model.vlm.limits x", ["--model.vlm.limits", "'x'"]),
    # of the commands that run others
    ("measure --lmit 3 llava-1.5-7b --limit -1", ["--limit", "-1"]),
    ("train sft --limit 0", ["--limit", "0"]),
    ("evaluate --limit=-7", ["--limit", "-7"]),
    ("evaluate nowhere", ["nowhere", "no adapter"]),
    ("evaluate file folder", ["file, folder", "no adapter"]),
    ("evaluate --config twice.yaml", ["--config", "twice.yaml", "line 3"]),
    ("train sft dpo sft", ["'sft' is named twice"]),
    ("evaluate folder trained folder", ["'folder' is named twice"]),
    ("measure llava-1.5-7b --seed_everything -1", ["--seed_everything", "-1"]),
    ("train sft --config emptied.yaml", ["emptied.yaml", "data.init_args.folder"]),
    ("export --folder SETS --safe_folder SAFE --out here --limit 0", ["--limit", "0"]),
    ("demo --out /proc/here", ["out", "/proc/here"]),
    # missing or misspelt arguments in a configuration or on the command line
    (f"fit {FIT} --config misspelt.yaml", ["trainer.max_epoch", "--trainer.max_epochs"]),
    (f"fit {FIT} --config only_a_name.yaml", ["'run'"]),
    (f"fit {FIT} --run -x", ["--run", "dash"]),
    (f"fit {FIT} --model.vlm", ["--model.vlm"]),
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
    "unseeded.yaml": b"seed_everything: false\n",
    "emptied_vlm.yaml": b"class_path: safervlm.vlm.llava.Llava\ninit_args:\n  model: ' '\n",
    "own.json": b'{"mine": {"class_path": "safervlm.data.benchmark.Benchmark", "init_args": {"source": ""}}}',
    "packed.yaml.gz": gzip.compress(b"run: x\n", mtime=0),
    "wide.yaml": "run: x\n".encode("utf-16"),
    "bomb.yaml": "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9 if n else 1}]\n" for n in range(12)).encode(),
    "zeros.yaml": bytes(100),
    "misspelt.yaml": b"trainer: {max_epoch: 7}\n",
    "only_a_name.yaml": b"run:\n",
    "null_sampling.yaml": b"model: {init_args: {sampling: null}}\n",
    "null_images.yaml": b"model: {init_args: {vlm: {init_args: {images: null}}}}\n",
    "null_arguments.yaml": b"model: {init_args: null}\n",
    "null_class.yaml": b"model: {class_path: null}\n",
    "number.yaml": b"7: x\n",
    "blank_class.yaml": b"model: {class_path: ' safervlm.measure.Measure'}\n",
    "two_dots.yaml": b"model: {class_path: ..}\n",
    "null_callback.yaml": b"trainer: {callbacks: [null]}\n",
    "two.yaml": b"run: x\n---\nrun: y\n",
    "typo.yaml": b"model:\n  class_path: safervlm.measure.Measure\n  init_args:\n    vml: x\n",
    "addressed.yaml": b"run: s3://me:pw@host/run\n",
    "section.yaml": b"run: x\ndta:\n  init_args:\n    limit: 3\n",
    "nested_typo.yaml": b"model:\n  init_args:\n    vlm:\n      init_args:\n        modle: x\n",
    "class_typo.yaml": b"data:\n  clas_path: UnsafeConcepts\n",
    "part_typo.yaml": b"init_args:\n  modle: x\n",
    "no_class.yaml": b"class_path: safervlm.vlm.Lava\ninit_args: {model: x}\n",
    "function.yaml": b"class_path: os.system\n",
    "data_class.yaml": b"class_path: safervlm.data.own.OwnData\n",
    "beside.yaml": b"class_path: safervlm.vlm.llava.Llava\nmodle: x\n",
    "init_arg.yaml": b"class_path: safervlm.vlm.llava.Llava\ninit_arg:\n  model: x\n",
    "no_callback.yaml": b"trainer: {callbacks: [{class_path: callbacks.x.Y}]}\n",
    "callback_typo.yaml": (
        b"trainer:\n  callbacks:\n  - class_path: callbacks.judge_responses.JudgeResponses\n    init_args: {panle: 1}\n"
    ),
    "no_lora.yaml": b"model: {init_args: {vlm: {init_args: {lora: yes}}}}\n",
    "mine.html": b"<title>mine</title>\n",
    "folder/notes.txt": b"mine\n",
    "trained/fit.yaml": b"run: trained\n",
    "trained/manifest.json": b'{"stages": {"sft": {"settings": {}, "finished": true}}}',
    "started/predict.yaml": b"run: started\n",
    "started/responses.jsonl": b"",
    "started/manifest.json": b'{"stages": {"measure": {"settings": {}, "finished": false}}}',
    "file": b"",
}


@pytest.mark.parametrize(("line", "named"), WRONG, ids=[line for line, _ in WRONG])
def test_invalid_command_line_is_reported_in_one_line(
    line: str, named: list[str], tmp_path: Path, tiny_llava: Path, tiny_sets: Path
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
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


# Ten of them, and their like, in processes that import everything themselves; the others are forked.
REAL = [
    *("mesure", "--verison", "measure nothing", "measure ''", "train", "train nothing", "train sft --run x"),
    *("evaluate --out", "report nowhere", "fit --config nowhere.yaml"),
]


@pytest.mark.parametrize("line", REAL)
def test_invalid_command_line_is_reported_in_one_line_by_a_subprocess(line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "safervlm", *shlex.split(line)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    (said,) = ended.stderr.splitlines()
    assert said.startswith("safervlm: error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "two"), ("LOCAL_RANK", ""), ("RANK", "-1"), ("NODE_RANK", "1.0")]
)
def test_invalid_rank_in_the_environment_is_rejected(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=f"^the environment variable {name}: a number, .* got '{value}'; unset it$"):
        prepared(["fit"])


def test_at_least_100_invalid_command_lines_are_tested() -> None:
    assert len({line for line, _ in WRONG}) >= 100
