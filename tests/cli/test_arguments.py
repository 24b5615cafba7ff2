"""Arguments that are found in a command line before it is parsed."""

from pathlib import Path

import pytest

from safervlm.cli.arguments import MAX_SEED, prepared
from safervlm.errors import ArgumentError
from safervlm.recipes import CONFIGS


def test_short_options_are_expanded_and_shipped_recipes_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepared(["predict", "--limit", "3"]) == ["predict", "--data.limit", "3"]
    assert prepared(["predict", "--limit=3"]) == ["predict", "--data.limit=3"]
    assert prepared(["fit", "--config", "configs/sft.yaml"]) == ["fit", "--config", str(CONFIGS / "sft.yaml")]


@pytest.mark.parametrize("number", ["-1e-3", "-3", "-0.5", "-.5", "-1E+2"])
def test_a_negative_number_is_a_value(number: str) -> None:
    assert prepared(["fit", "--model.lr", number, "--run", "r"]) == ["fit", f"--model.lr={number}", "--run", "r"]


ALLOWED = [
    ["--model.vlm.system", ""],
    ["--model.vlm.init_args.system="],
    ["--seed_everything", "0"],
    ["--seed_everything", str(MAX_SEED)],
    ["--data.sets.mme.init_args.seed", "3"],  # not linked
    ["--data.own", "{mine: {class_path: X, init_args: {seed: 3}}}"],
    ["--model.vlm.system", '{"seed": -1}'],  # a text
    ["--model.vlm.lora.target_modules", "[qk]_proj"],
    ["--data.name", "{not yaml"],
    ["--config", "nowhere.yaml"],  # reported by the parser
]


@pytest.mark.parametrize("words", ALLOWED, ids=" ".join)
def test_valid_arguments_are_unchanged(words: list[str]) -> None:
    assert prepared(["predict", *words])[1:] == words


FILES = {
    "good.yaml": "run: x\nmodel: {init_args: {vlm: {init_args: {system: ''}}}}\n",
    "anchored.yaml": "a: &a {x: 1}\nb: {<<: *a, y: 2}\n",
    "seed.yaml": "model: {init_args: {seed: 3}}\n",
    "short.yaml": "data: {seed: 3}\n",
    "model.yaml": "class_path: X\ninit_args: {seed: 3}\n",
    "empty_list.yaml": "data:\n  init_args:\n    capabilities: ['', alignment]\n",
    "nested_twice.yaml": "data:\n  init_args:\n    limit: 1\n    name: x\n    limit: 2\n",
    "twice.json": '{"class_path": "X", "init_args": {"lr": 1, "base": "b", "lr": 2}}',
    "twice.txt": "class_path: X\nlr: 1\nlr: 2\n",
    "bom.json": '\ufeff{"a": 1, "a": 2}',
    "names_json.yaml": "model: {init_args: {judge: twice.json}}\n",
    "names_json.json": '{"model": {"init_args": {"judge": "twice.json"}}}',
    "bomb.json": "[&a [x, x, x, x, x, x, x, x, x, x], "
    + ", ".join(f"&{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in ("ab", "bc", "cd", "de", "ef", "fg"))
    + "]",
    "text.txt": "Is it: safe? {question}\n: [",
    "weights.bin": "\0\1{",
    "bom.yaml": "\ufeffrun: x\n",
    "deep.yaml": "[" * 3000,
    "nul.yaml": "run: a\0b\n",
    "own.json": '{"mine": {"class_path": "X", "init_args": {"file": " "}}}',
    "names_file.yaml": "model: model.yaml\n",
    "names_itself.yaml": "model: {init_args: {vlm: names_itself.yaml}}\ndata: {seed: 1}\n",
    "random.yaml": "seed_everything: true\n",
    "negative.yaml": "seed_everything: -4\n",
    "large.yaml": "data: {init_args: {sets: {a: {init_args: {seed: 4294967296}}}}}\n",
    "dotted.yaml": "model.init_args.seed: 3\n",
    "dotted_twice.yaml": "trainer: {max_epochs: 5}\ntrainer.max_epochs: 3\n",
    "dotted_inside.yaml": "model:\n  init_args.lr: 1\n  init_args: {lr: 2}\n",
    "no_trainer.yaml": "run: x\ntrainer:\n",
    "listed_trainer.yaml": "trainer: [max_epochs]\n",
    "numbered_data.yaml": "data: 3\n",
    "zero.yaml": 'run: "a\\0b"\n',
    "merged.yaml": "a: &a {x: 1}\nouter: {inner: &b {<<: *a, x: 2}}\nc: {<<: *b}\n",
    "bomb.yaml": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 12)),
    "merge_bomb.yaml": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}\n" for n in range(1, 12)),
    "endless.yaml": "a: &a [*a]\n",
    "tag.yaml": "run: !!python/object/apply:os.system [touch owned]\n",
}
REJECTED = {
    "--model.seed=3": ["--model.seed", "--seed_everything"],
    "--data.init_args.seed 3": ["--data.init_args.seed", "--seed_everything"],
    "--trainer.default_root_dir=x": ["--trainer.default_root_dir", "--run"],
    "--data.collator x": ["--data.collator", "--model"],
    "--run=": ["--run", "empty"],
    "--data.folder \t": ["--data.folder", "empty"],
    "--seed_everything=-1": ["--seed_everything", "-1"],
    f"--seed_everything {MAX_SEED + 1}": ["--seed_everything", str(MAX_SEED + 1)],
    "--config=seed.yaml": ["seed.yaml", "model.init_args.seed", "--seed_everything"],
    "--config short.yaml": ["short.yaml", "data.seed"],
    "--model model.yaml": ["model.yaml", "model.init_args.seed"],
    "--config empty_list.yaml": ["empty_list.yaml", "data.init_args.capabilities", "empty"],
    "--config nested_twice.yaml": ["nested_twice.yaml, line 5", "'limit'", "twice"],
    "--config deep.yaml": ["deep.yaml"],
    "--config nul.yaml": ["nul.yaml"],
    "--config tag.yaml": ["tag.yaml", "line 1"],
    "--config .": ["--config", "'.'"],
    "--data .": ["--data", "'.'"],
    "--seed_everything true": ["--seed_everything", "true"],
    "--seed_everything=False": ["--seed_everything", "False"],
    "--data.sets.mme.seed -2": ["--data.sets.mme.seed", "-2"],
    """--model {"class_path": "X", "init_args": {"seed": 3}}""": ["--model: model.init_args.seed", "--seed_everything"],
    """--model={"seed":3}""": ["--model: model.seed", "--seed_everything"],
    """--model.init_args {"seed": 3}""": ["--model.init_args: ", "seed", "--seed_everything"],
    """--data {class_path: X, dict_kwargs: {seed: 3}}""": ["--data: data.dict_kwargs.seed", "--seed_everything"],
    """--data {class_path: X, init_args: {folder: ""}}""": ["--data: data.init_args.folder", "empty"],
    """--trainer {default_root_dir: x}""": ["--trainer: trainer.default_root_dir", "--run"],
    """--data.capabilities ["", alignment]""": ["--data.capabilities", "empty"],
    """--model.sampling {"top_p": 1, "top_p": 0.5}""": ["--model.sampling", "'top_p'", "twice"],
    """--config {"model": {"seed": 3}}""": ["--config: model.seed", "--seed_everything"],
    "--config run: x\ndata: {seed: 3}\n": ["--config: data.seed"],
    """--data.own {mine: {class_path: X, init_args: {file: ""}}}""": [
        "--data.own: data.own.mine.init_args.file",
        "empty",
    ],
    "--data.own own.json": ["own.json: data.own.mine.init_args.file", "' '"],
    "--data.own {mine: large.yaml}": ["large.yaml", "4294967296"],
    "--model.vlm negative.yaml": ["negative.yaml", "-4"],
    "--model.judge nested_twice.yaml": ["nested_twice.yaml, line 5", "twice"],
    "--model.judge twice.json": ["--model.judge", "twice.json", "'lr' occurs twice"],
    "--model.judge twice.txt": ["--model.judge", "twice.txt", "line 3", "'lr' occurs twice"],
    "--model.judge bom.json": ["bom.json", "'a' occurs twice"],
    "--model.judge bomb.json": ["bomb.json", "aliases"],
    "--trainer.strategy.config twice.json": ["twice.json", "'lr' occurs twice"],
    "--trainer.callbacks.judge=twice.json": ["twice.json", "'lr' occurs twice"],
    "--config names_json.yaml": ["twice.json", "'lr' occurs twice"],
    "--config names_json.json": ["names_json.json", "twice.json", "'lr' occurs twice"],
    "--config names_file.yaml": ["model.yaml", "model.init_args.seed"],
    "--config names_itself.yaml": ["names_itself.yaml", "data.seed"],
    "--config random.yaml": ["random.yaml: seed_everything", "True"],
    "--config negative.yaml": ["negative.yaml: seed_everything", "-4"],
    "--config large.yaml": ["large.yaml", "4294967296"],
    "--config dotted.yaml": ["dotted.yaml", "model.init_args.seed"],
    "--config dotted_twice.yaml": ["dotted_twice.yaml", "trainer.max_epochs", "twice"],
    "--config dotted_inside.yaml": ["dotted_inside.yaml", "model.init_args.lr", "twice"],
    "--config zero.yaml": ["zero.yaml: run", "'a\\x00b'", "zero character"],
    "--config no_trainer.yaml": ["no_trainer.yaml", "trainer", "None"],
    "--config listed_trainer.yaml": ["listed_trainer.yaml", "trainer", "['max_epochs']"],
    "--config numbered_data.yaml": ["numbered_data.yaml", "data", "3"],
    "--model.sampling {a.b: 1, a: {b: 2}}": ["--model.sampling", "a.b", "twice"],
    "--seed_everything  -1": ["--seed_everything", "-1"],
    "--seed_everything 9_999_999_999": ["--seed_everything", "9_999_999_999"],
    "--seed_everything=-0x10": ["--seed_everything", "-0x10"],
    "--": ["'--'"],
    "--config bomb.yaml": ["bomb.yaml", "aliases"],
    "--config merge_bomb.yaml": ["merge_bomb.yaml", "aliases"],
    "--config endless.yaml": ["endless.yaml", "aliases"],
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)


@pytest.mark.parametrize("line", REJECTED)
def test_invalid_arguments_are_rejected_in_one_line(line: str, files: None) -> None:
    option, _, value = line.partition(" ")
    with pytest.raises(ArgumentError) as caught:
        prepared(["fit", option, *([value] if value else [])])
    assert "\n" not in str(caught.value)
    missing = [part for part in REJECTED[line] if part not in str(caught.value)]
    assert not missing, caught.value
    assert not Path("owned").exists()


@pytest.mark.parametrize("name", ["good.yaml", "anchored.yaml", "merged.yaml", "bom.yaml"])
def test_valid_configuration_files_are_accepted(name: str, files: None) -> None:
    assert prepared(["fit", "--config", name]) == ["fit", "--config", name]


@pytest.mark.parametrize(
    "option", ["--model.judge text.txt", "--model.judge.checkpoint weights.bin", "--data.responses twice.json"]
)
def test_arguments_naming_data_or_weight_files_are_unchanged(option: str, files: None) -> None:
    assert prepared(["fit", *option.split(" ")]) == ["fit", *option.split(" ")]


@pytest.mark.parametrize("recipe", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_recipes_are_accepted(recipe: Path) -> None:
    assert prepared(["fit", "--config", str(recipe)])[-1] == str(recipe)
