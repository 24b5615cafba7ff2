"""The command line: fast help, a help text for every argument, errors of one line."""

import gc
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import CHECKOUT
from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import SaveConfigCallback
from lightning_utilities.core.imports import RequirementCache

import callbacks
import safervlm
from callbacks.rate_responses import RateResponses
from safervlm.cli.family import fitting_class, with_class
from safervlm.cli.lightning import DESCRIPTIONS, GROUPS, SaferCLI
from safervlm.cli.main import HELP, collection_paused, main, plain_commands, sequence_commands
from safervlm.cli.messages import one_line
from safervlm.cli.trainer import callbacks_with_lines
from safervlm.io.boundary import run_folder
from safervlm.protocol import VICUNA_SYSTEM
from safervlm.recipes import CONFIGS, local_or_shipped
from safervlm.run import read_manifest
from safervlm.vlm.base import VLM
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA
from safervlm.vlm.sampling import Sampling

PICTOGRAMS = ["--config", "configs/measure.yaml", "--config", "configs/pictograms/measure.yaml"]
RECIPES = {
    "measure": "predict",
    "judge_responses": "predict",
    "judge": "fit",
    "sft": "fit",
    "dpo": "fit",
    "ppo": "fit",
    "grpo": "fit",
    "evaluate": "predict",
}


@pytest.fixture
def only_built(monkeypatch: pytest.MonkeyPatch) -> list[SaferCLI]:
    """Parses command lines and builds their classes without running them; returns the objects."""
    built: list[SaferCLI] = []
    monkeypatch.setattr(SaferCLI, "_run_subcommand", lambda self, name: built.append(self))
    return built


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from safervlm.cli.main import main; main(['--help']); "
        "sys.exit(', '.join({'torch', 'lightning', 'jsonargparse', 'pandas', 'transformers'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == HELP


def test_garbage_collection_is_paused_only_while_importing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        with collection_paused():
            assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()  # this process goes on: its objects may be garbage later
    with collection_paused():  # PyTorch is imported
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == safervlm.__version__


def test_help_names_every_command() -> None:
    alias = {"evaluation"}
    for command in ("fit", "validate", "predict", *(sequence_commands() | plain_commands()).keys() - alias):
        assert f"\n  {command} " in HELP


def our_classes() -> Iterator[type]:
    """All classes that a recipe can name by class_path."""
    from pkgutil import walk_packages

    for package in (safervlm, callbacks):
        for info in walk_packages(package.__path__, f"{package.__name__}."):
            module = __import__(info.name, fromlist=["_"])
            for value in vars(module).values():
                here = inspect.isclass(value) and value.__module__ == info.name and not inspect.isabstract(value)
                here = here and not issubclass(value, SaveConfigCallback)  # added by the command line
                if here and issubclass(value, LightningModule | LightningDataModule | Callback | VLM):
                    yield value


def unexplained(parser: ArgumentParser) -> list[str]:
    return [
        action.dest
        for action in parser._actions
        if not (action.help or "").strip() and action.dest != "==SUPPRESS==" and not action.dest.endswith(".help")
    ]


@pytest.mark.parametrize("component", [*our_classes(), LoRA, Sampling], ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_argument_of_ours_is_explained(component: type) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(component, fail_untyped=True)
    assert not unexplained(parser)


def test_every_argument_of_the_commands_is_explained(only_built: list[SaferCLI], tiny_llava: Path) -> None:
    main(["predict", *PICTOGRAMS, "--model.vlm.model", str(tiny_llava)])
    for name, parser in only_built[0]._subcommand_parsers.items():
        assert not unexplained(parser), name
    for function in plain_commands().values():
        parser = ArgumentParser()
        parser.add_function_arguments(function, skip={"play"}, fail_untyped=True)  # no argument, see demo
        assert not unexplained(parser), function


def test_every_recipe_is_listed() -> None:
    # Overlays of measuring recipes, and a fragment of one of them.
    others = {"server", "rate", "llavabench_judge", "experts"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == RECIPES.keys() | others


SETS = ["unsafe_concepts", "contexts", "mme", "mmvet", "llavabench", "smid", "nsfw"]
OVERLAYS = [name for name in RECIPES if (CONFIGS / "pictograms" / f"{name}.yaml").exists()]


@pytest.mark.parametrize(
    ("recipe", "overlay"), [*((name, False) for name in RECIPES), *((name, True) for name in OVERLAYS)]
)
def test_every_recipe_builds(recipe: str, overlay: bool, tiny_llava: Path, only_built: list[SaferCLI]) -> None:
    line = [RECIPES[recipe], "--config", f"configs/{recipe}.yaml"]
    if overlay:
        line += ["--config", f"configs/pictograms/{recipe}.yaml"]
    if recipe not in ("judge", "judge_responses"):
        line += ["--model.vlm.model", str(tiny_llava)]
    main(line)
    (built,) = only_built
    assert built.datamodule.collator is not None
    assert built.trainer.default_root_dir == built.config[RECIPES[recipe]]["run"]
    assert built.config[RECIPES[recipe]]["seed_everything"] == built.config_init[RECIPES[recipe]]["seed_everything"]
    if recipe in ("sft", "dpo", "ppo", "grpo"):
        assert built.model.vlm.lora.r == (16 if overlay else 128)


@pytest.mark.parametrize("overlays", [["rate"], ["pictograms/evaluate", "pictograms/rate"]], ids=" ".join)
def test_rating_recipes_build(overlays: list[str], tiny_llava: Path, only_built: list[SaferCLI]) -> None:
    recipe = [part for name in ("evaluate", *overlays) for part in ("--config", f"configs/{name}.yaml")]
    main(["predict", *recipe, "--model.vlm.model", str(tiny_llava)])
    raters = [each for each in only_built[0].trainer.callbacks if isinstance(each, RateResponses)]
    assert len(raters) == 1
    assert list(only_built[0].datamodule.sets) == SETS


def test_every_dataset_of_the_suite_is_in_its_recipe() -> None:
    assert sorted(path.stem for path in (CONFIGS / "benchmarks").glob("*.yaml")) == sorted(SETS)


MINE = "class_path: safervlm.data.benchmark.Benchmark\ninit_args: {{name: Mine, {}: {}/mine.csv}}\n"


@pytest.mark.parametrize("way", ["command line", "overlay"])
def test_custom_dataset_extends_the_datasets_of_a_recipe(
    way: str, tmp_path: Path, tiny_llava: Path, only_built: list[SaferCLI]
) -> None:
    (tmp_path / "mine.yaml").write_text(MINE.format("source", tmp_path))
    (tmp_path / "overlay.yaml").write_text("data: {init_args: {own: {mine: mine.yaml}}}\n")
    more = {
        "command line": ["--data.own", f"{{mine: {tmp_path / 'mine.yaml'}}}"],
        "overlay": ["--config", str(tmp_path / "overlay.yaml")],
    }[way]
    main(["predict", "--config", "configs/evaluate.yaml", "--model.vlm.model", str(tiny_llava), *more])
    assert list(only_built[0].datamodule.sets) == [*SETS, "mine"]
    assert only_built[0].datamodule.sets["mine"].source == f"{tmp_path}/mine.csv"


def test_misspelt_argument_in_a_dataset_file_suggests_the_correct_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(MINE.format("sourse", tmp_path))
    with pytest.raises(SystemExit):
        main(["predict", "--config", "configs/evaluate.yaml", "--data", str(tmp_path / "mine.yaml")])
    assert "'sourse', which its class doesn't take; did you mean source?" in capsys.readouterr().err


# The others are built, with a tiny model of their family, by tests/vlm/test_transformers.py and test_llava_original.py.
LLAVAS = [file for file in sorted((CONFIGS / "vlm").glob("*.yaml")) if "safervlm.vlm.llava.Llava" in file.read_text()]


@pytest.mark.parametrize("file", LLAVAS, ids=lambda path: path.stem)
def test_every_llava_builds(file: Path, tiny_llava: Path, only_built: list[SaferCLI]) -> None:
    main(["fit", "--config", "configs/sft.yaml", "--model.vlm", str(file), "--model.vlm.model", str(tiny_llava)])
    assert isinstance(only_built[0].model.vlm, VLM)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((CONFIGS / "strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_strategy_parses(file: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "safervlm.cli",
            "fit",
            "--config",
            "configs/sft.yaml",
            "--config",
            str(file),
            "--print_config",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "strategy:" in process.stdout


def test_limit_option_sets_data_limit(tiny_llava: Path, only_built: list[SaferCLI]) -> None:
    line = ["predict", *PICTOGRAMS, "--model.vlm.model", str(tiny_llava)]
    main([*line, "--limit", "3"])
    main([*line, "--limit=4"])
    assert [built.datamodule.limit for built in only_built] == [3, 4]


def test_the_seed_reaches_model_and_data(tiny_llava: Path, only_built: list[SaferCLI]) -> None:
    main(["fit", "--config", "configs/sft.yaml", "--model.vlm.model", str(tiny_llava), "--seed_everything", "7"])
    assert only_built[0].model.seed == only_built[0].datamodule.seed == 7


def test_the_help_of_a_fit_begins_with_run_model_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    places = [shown.index(f"[--{name}") for name in ("run", "model", "data", "trainer")]
    assert places == sorted(places)
    details = shown[shown.index("options:") :]
    places = [details.index(f"  --{name} ") for name in ("run", "model", "data", "trainer")]
    assert places == sorted(places)
    assert shown.startswith("usage: safervlm ")
    texts = (DESCRIPTIONS["fit"], *GROUPS.values())
    assert all(text in " ".join(shown.split()) for text in texts)
    assert "<class" not in shown
    assert "A DataModule standardizes" not in shown


def vlm_overlay(folder: Path, name: str, **settings: object) -> str:
    """Writes an overlay whose recipe contains a class and settings of the VLM."""
    vlm = {"class_path": name, "init_args": {"model": "some/name", **settings}}
    (folder / "overlay.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"vlm": vlm}}}))
    return str(folder / "overlay.yaml")


def test_checkpoint_of_another_family_selects_its_own_class(
    tiny_llava: Path, tmp_path: Path, only_built: list[SaferCLI], capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings of the recipe are kept if the class has them; an explicitly given class is not replaced."""
    overlay = vlm_overlay(tmp_path, "Transformers", dtype="float32", template="{question}")
    line = ["predict", *PICTOGRAMS, "--config", overlay, "--model.vlm.model", str(tiny_llava)]
    main(line)
    vlm = only_built[0].model.vlm
    assert isinstance(vlm, Llava)
    assert (str(vlm.dtype), vlm.system) == ("torch.float32", VICUNA_SYSTEM)
    assert "is loaded by Llava; template does not apply" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "architecture", "name"),
    [
        (["--model.vlm.model={}"], "Qwen2VLForConditionalGeneration", "safervlm.vlm.auto.Transformers"),
        (["--model.vlm.model", "{}"], "LlavaLlamaForCausalLM", "safervlm.vlm.llava_original.LlavaOriginal"),
    ],
)
def test_class_is_selected_by_the_checkpoint_architecture(
    typed: list[str], architecture: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VLM, "vlm")
    arguments = {"model": str(tmp_path), "image_fit": "crop", "dtype": "float32"}
    given = parser.parse_object({"vlm": {"class_path": "safervlm.vlm.llava.Llava", "init_args": arguments}})["vlm"]
    found = fitting_class(given, ["fit", *(word.format(tmp_path) for word in typed)])
    assert found["class_path"] == name
    assert found["init_args"]["dtype"] == "float32"
    assert found["init_args"].get("image_fit") == ("crop" if "llava" in name else None)
    assert found["init_args"]["system"] == ("" if "auto" in name else VICUNA_SYSTEM)


@pytest.mark.parametrize(
    "typed",
    [
        ["--model.vlm", "Llava", "--model.vlm.model", "x"],
        ["--model.vlm.class_path=Llava", "--model.vlm.model=x"],
        ["--config", "overlay.yaml"],
        ["--model.vlm.model", "x", "--help"],
    ],
)
def test_command_line_with_explicit_class_or_no_checkpoint_is_unchanged(typed: list[str]) -> None:
    assert with_class(ArgumentParser(), ["fit", *typed]) == ["fit", *typed]


def test_arguments_of_the_class_selected_by_the_checkpoint_are_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are parsed whether or not the checkpoint can be read; the output is a settings file."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2VLForConditionalGeneration"]}))
    for model in (str(tmp_path), "./model-that-is-not-there"):
        line = ["predict", "--config", "configs/measure.yaml", "--print_config", "--model.vlm.thinking", "[<r>, </r>]"]
        line += ["--model.vlm.dtype=float32", "--model.vlm.lora.r", "4", f"--model.vlm.model={model}"]
        with pytest.raises(SystemExit) as end:
            main(line)
        assert not end.value.code
        printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["vlm"]
        assert printed["class_path"] == "safervlm.vlm.auto.Transformers"
        given = printed["init_args"]
        assert (given["model"], given["thinking"], given["lora"]["r"]) == (model, ["<r>", "</r>"], 4)
        assert given["dtype"] == "float32"


ERRORS = {
    "misspelt argument": (
        [*PICTOGRAMS, "--model.vlm.modle", "x"],
        "--model.vlm.modle; did you mean --model.vlm.model?",
    ),
    "abbreviation": ([*PICTOGRAMS, "--trainer.max_step", "3"], "--trainer.max_step; did you mean --trainer.max_steps?"),
    "not one of": (
        [*PICTOGRAMS, "--data.split", "tset"],
        "--data.split: expected 'all', 'train', 'validation', 'test', got 'tset'; did you mean test?",
    ),
    "wrong type": ([*PICTOGRAMS, "--data.batch_size", "many"], "--data.batch_size: expected int or 'auto', got 'many'"),
    "nested wrong type": ([*PICTOGRAMS, "--model.vlm.lora.r", "many"], "--model.vlm.lora.r: expected int, got 'many'"),
    "no list": (
        [*PICTOGRAMS, "--data.capabilities", "alignment"],
        "--data.capabilities: expected a list, got 'alignment'; write a list, '[alignment]'",
    ),
    "misspelt short name": ([*PICTOGRAMS, "--limt", "2"], "--limt; did you mean --limit? --help lists all"),
    "before the recipe": (["--model.vlm.model", "x", *PICTOGRAMS], "--model.vlm.model: a recipe names the classes"),
    "argument of the data": ([*PICTOGRAMS, "--split", "test"], "unknown argument --split; did you mean --data.split?"),
    "argument of the model": ([*PICTOGRAMS, "--data.image_fit", "pad"], "unknown argument --data.image_fit; --help"),
    "overlay alone": (
        ["--config", "configs/pictograms/measure.yaml"],
        "a config sets 'sampling.max_new_tokens', which its class doesn't take: an overlay comes after its own recipe",
    ),
    "argument of another class": (
        ["--config", "configs/evaluate.yaml", "--data.source", "x.tsv"],
        "unknown argument --data.source; --help lists all",
    ),
    "missing config": (["--config", "configs/mesure.yaml"], "did you mean configs/measure.yaml?"),
    "missing config, unlike all": (["--config", "configs/nosuch.yaml"], "nosuch.yaml'; see configs/"),
    "no config": ([], "give a recipe"),
    "recipe of another command": (
        ["--config", "configs/sft.yaml"],
        "safervlm.objectives.SFT is not for predict; use safervlm fit",
    ),
    "misspelt in a file": (
        [*PICTOGRAMS, "--config", str(CHECKOUT / "tests/fixtures/misspelt.yaml")],
        "misspelt.yaml, line 4: has 'temperatur', which no recipe has; did you mean temperature?",
    ),
    "wrong type in a file": (
        [*PICTOGRAMS, "--config", str(CHECKOUT / "tests/fixtures/wrong_type.yaml")],
        "wrong_type.yaml, line 3: batch_size: expected int or 'auto', got 'lots'",
    ),
    "config of another kind": ([*PICTOGRAMS, "--config", "configs/pictograms/vlm.yaml"], "it is another kind of file"),
    "no such class": (
        [*PICTOGRAMS, "--model", "safervlm.measure.Mesure"],
        "--model: no class 'safervlm.measure.Mesure'",
    ),
    "class of another kind": (
        [*PICTOGRAMS, "--data", "safervlm.measure.Measure"],
        "--data: safervlm.measure.Measure is not a LightningDataModule",
    ),
    "no pictograms": (PICTOGRAMS, "vlm.model: no folder './pictograms/vlm'; paths begin where the command is typed"),
    "refused value": (
        ["--config", "configs/measure.yaml", "--model.sampling.top_p", "3"],
        "sampling.top_p: above 0 and at most 1, got 3.0",
    ),
    "missing adapter": (
        [*PICTOGRAMS, "--model.vlm.adapter", "nowhere"],
        "adapter: no adapter_config.json in 'nowhere'",
    ),
    "missing model": ([*PICTOGRAMS, "--model.vlm.model", "nowhere"], "vlm.model: 'nowhere' can't be read"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_reported_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str], only_built: list[SaferCLI]
) -> None:
    arguments, expected = ERRORS[name]
    with pytest.raises(SystemExit) as caught:
        main(["predict", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert caught.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("safervlm: error: ")
    assert expected in lines[0]


def test_a_fitted_run_is_validated_and_resumes(
    tiny_llava: Path, tiny_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "--config=configs/sft.yaml",
        f"--model.vlm.model={tiny_llava}",
        "--model.vlm.dtype=float32",
        "--model.vlm.lora.r=2",
        f"--data.folder={tiny_sets / 'unsafe'}",
        f"--data.safe_folder={tiny_sets / 'safe'}",
        "--data.validation_fraction=0.25",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.max_epochs=1",
        f"--run={tmp_path / 'run'}",
    ]
    with pytest.raises(SystemExit):
        main(["validate", *line])
    assert "no " in (error := capsys.readouterr().err)
    assert "last.ckpt, so the adapter would be an untrained one" in error
    main(["fit", *line])
    before = (tmp_path / "run" / "manifest.json").read_text()
    out, error = capsys.readouterr()
    assert re.findall(r"^training: 100 % \((\d+) of \1 batches\), ", error, re.MULTILINE)
    assert "the training was complete" not in out
    main(["validate", *[argument for argument in line if "max_epochs" not in argument]])
    out, error = capsys.readouterr()
    assert re.search(r"^validation: 100 % \(", error, re.MULTILINE)
    assert "validating" in out
    assert "val/loss" in out
    assert (tmp_path / "run" / "manifest.json").read_text() == before
    with pytest.raises(SystemExit):
        main(["fit", *line, "--ckpt_path", "nowhere.ckpt"])
    assert "--ckpt_path: no file 'nowhere.ckpt'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", *line, "--model.lr=0.5"])
    out, error = capsys.readouterr()
    assert "model.lr" in error
    assert "resuming" not in out
    main(["fit", *line])
    assert "resuming from" in (out := capsys.readouterr().out)
    assert "the training was complete: nothing was left to do" in out


class Rates(Callback):
    """Records the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_a_finished_run_is_extended(
    tiny_llava: Path,
    tiny_sets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = [
        "fit",
        "--config=configs/sft.yaml",
        f"--model.vlm.model={tiny_llava}",
        "--model.vlm.dtype=float32",
        "--model.vlm.lora.r=2",
        "--model.lr=0.01",
        "--model.warmup_steps=0",
        f"--data.folder={tiny_sets / 'unsafe'}",
        f"--data.safe_folder={tiny_sets / 'safe'}",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.limit_train_batches=3",
        "--data.batch_size=8",
        f"--run={tmp_path / 'run'}",
    ]
    recorded: list[Rates] = []

    def with_rates(trainer: Mapping[str, Any]) -> list[Callback]:
        recorded.append(Rates())
        return [*callbacks_with_lines(trainer), recorded[-1]]

    monkeypatch.setattr("safervlm.cli.lightning.callbacks_with_lines", with_rates)
    with pytest.raises(SystemExit):
        main([*line, "--trainer.max_epochs=2", "--extend"])
    assert "--extend: there is no " in capsys.readouterr().err
    main([*line, "--trainer.max_epochs=2"])
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        main([*line, "--trainer.max_epochs=4"])
    assert "trainer.max_epochs: 2 there, 4 now; add --extend to train on" in capsys.readouterr().err
    main([*line, "--trainer.max_epochs=4", "--extend"])
    error = capsys.readouterr().err
    assert "training: 100 % (12 of 12 batches)" in error
    assert "\r" not in error
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() != adapter
    stage = read_manifest(tmp_path / "run")["stages"]["sft"]
    assert stage["finished"]
    assert stage["settings"]["trainer"]["max_epochs"] == 4
    assert [each.get("extended") for each in stage["continued"]] == [{"trainer.max_epochs": [2, 4]}]
    rows = [row.split(",") for row in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert [int(batch) for batch, name, _ in rows if name == "train/loss"] == list(range(1, 13))
    # The rates of the second half are those of a cosine over the whole.
    assert recorded[-1].rates == pytest.approx([0.005 * (1 + cos(pi * step / 12)) for step in range(6, 12)])
    assert not yaml.safe_load((tmp_path / "run" / "fit.yaml").read_text())["extend"]
    main([*line, "--trainer.max_epochs=4"])  # the same command without --extend: no training is left
    assert recorded[-1].rates == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gradient_clip_val=1", "Automatic gradient clipping is not supported"),  # reported while training
        ("devices=many", "`devices` selected with `CPUAccelerator` should be an int"),
    ],
)
def test_lightning_configuration_error_is_reported_in_one_line(
    setting: str,
    message: str,
    tiny_llava: Path,
    tiny_sets: Path,
    tiny_judges: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "fit",
                "--config=configs/ppo.yaml",
                f"--model.vlm.model={tiny_llava}",
                f"--model.judge.checkpoint={tiny_judges / 'alignment' / 'epoch_10.pt'}",
                f"--model.judge.base={tiny_judges / 'alignment'}",
                f"--data.folder={tiny_sets / 'unsafe'}",
                f"--data.safe_folder={tiny_sets / 'safe'}",
                "--trainer.accelerator=cpu",
                f"--trainer.{setting}",
                "--trainer.callbacks=callbacks.metrics_csv.MetricsCSV",
                f"--run={tmp_path / 'run'}",
            ]
        )
    assert caught.value.code == 2
    assert f"safervlm: error: --trainer.{setting.replace('=', ' ')}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["mesure"], "unknown command 'mesure'"),
        (["pictograms", "--sed", "3"], "unknown argument --sed; did you mean --seed?"),
        (["export", "--out", "x", "--name", "y"], "unknown argument --name; --help"),
        (["report"], "runs: a report needs at least one run folder"),
        (["evaluation"], "missing: runs; see --help"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_error_of_a_plain_command_is_reported_in_one_line(
    line: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    (message,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert expected in message


@pytest.mark.parametrize("folder", [None, "logs"])
def test_a_logger_writes_to_the_run_folder_and_the_configuration_stays_in_it(
    folder: str | None, tiny_llava: Path, tiny_sets: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    main(
        [
            "fit",
            "--config=configs/sft.yaml",
            f"--model.vlm.model={tiny_llava}",
            "--model.vlm.dtype=float32",
            f"--data.folder={tiny_sets / 'unsafe'}",
            f"--data.safe_folder={tiny_sets / 'safe'}",
            "--data.num_workers=0",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            "--trainer.max_steps=1",
            "--model.warmup_steps=0",
            "--trainer.enable_progress_bar=false",
            "--trainer.logger=CSVLogger",
            *([] if folder is None else [f"--trainer.logger.save_dir={folder}"]),
            f"--run={run}",
        ]
    )
    settings = yaml.safe_load((run / "fit.yaml").read_text())
    assert settings["run"] == str(run)
    assert settings["model"]["init_args"]["vlm"]["init_args"]["model"] == str(tiny_llava)
    assert settings["model"]["init_args"]["vlm"]["init_args"]["adapter"] is None  # an empty value is saved, too
    assert settings["trainer"]["logger"]["init_args"]["save_dir"] == folder  # null: that of the run that repeats it
    logs = (run if folder is None else tmp_path / folder) / "lightning_logs"
    assert list(logs.rglob("metrics.csv"))
    assert not list(logs.rglob("fit.yaml"))


@pytest.mark.parametrize(
    ("logger", "module", "flags", "extra"),
    [
        ("MLFlowLogger", "lightning.pytorch.loggers.mlflow", ["_MLFLOW_AVAILABLE"], "mlflow"),
        ("WandbLogger", "lightning.pytorch.loggers.wandb", ["_WANDB_AVAILABLE"], "wandb"),
        (
            "TensorBoardLogger",
            "lightning.fabric.loggers.tensorboard",
            ["_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"],
            "tensorboard",
        ),
    ],
)
def test_a_logger_without_its_package_names_the_extra(
    logger: str,
    module: str,
    flags: list[str],
    extra: str,
    tiny_llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flag in flags:
        missing = RequirementCache(f"safervlm-no-{extra}")
        monkeypatch.setattr(f"{module}.{flag}", missing)
    run = tmp_path / "run"
    model = f"--model.vlm.model={tiny_llava}"
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config=configs/sft.yaml", model, f"--trainer.logger={logger}", f"--run={run}"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert f"--trainer.logger: 'lightning.pytorch.loggers.{logger}' needs a package that is missing" in error
    assert error.endswith(f"; pip install 'safervlm[{extra}]'")
    assert not run.exists()
    assert extra in tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_unexpected_exception_is_one_line_and_its_traceback_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def library(*_: object) -> None:
        run_folder.set(tmp_path)
        int("x")

    monkeypatch.setattr("safervlm.cli.main.plain", library)
    with pytest.raises(SystemExit) as caught:
        main(["report"])
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("safervlm: error: unexpected ValueError: invalid literal")
    assert str(tmp_path / "traceback.txt") in line
    assert 'int("x")' in (tmp_path / "traceback.txt").read_text()


@pytest.mark.parametrize("line", ["report {}", "evaluation {} other", "verify {}", "export --out {}"])
def test_traceback_of_a_plain_command_is_saved_in_its_run_folder(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(
        runs: list[Path] | None = None, run: Path | None = None, out: str | None = None, group: list[str] | None = None
    ) -> None:
        raise KeyError("x")

    name = line.split()[0]
    monkeypatch.setattr("safervlm.cli.main.plain_commands", lambda: {name: read})
    with pytest.raises(SystemExit) as caught:
        main(line.format(tmp_path).split())
    assert caught.value.code == 1
    assert str(tmp_path / "traceback.txt") in capsys.readouterr().err
    assert "KeyError" in (tmp_path / "traceback.txt").read_text()


def test_union_messages_are_shortened() -> None:
    message = (
        'Parser key "trainer.max_epochs":\n  Does not validate against any of the Union subtypes\n  Subtypes: '
        "[<class 'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class "
        "'NoneType'>\n  Given value type: <class 'str'>\n  Given value: x"
    )
    assert one_line(message) == "--trainer.max_epochs: expected int, got 'x'"


def test_shipped_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_or_shipped("configs/sft.yaml") == str(CONFIGS / "sft.yaml")
    assert local_or_shipped("--config=configs/sft.yaml") == f"--config={CONFIGS / 'sft.yaml'}"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft.yaml").touch()
    assert local_or_shipped("configs/sft.yaml") == "configs/sft.yaml"  # the user's module first
    assert local_or_shipped("configs/none.yaml") == "configs/none.yaml"
