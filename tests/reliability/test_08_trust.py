"""Promise 8: no address, file or code that a foreign run folder names is used unless the user asks for it."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import Loopback, loopbacks, shorten_waits
from peft.utils import save_and_load
from PIL import Image

from safervlm.cli.main import main
from safervlm.errors import RecordError
from safervlm.io.trust import Named, check_trust, may_read, named_in
from safervlm.records import read_jsonl, write_jsonl
from safervlm.reports.examples import picture
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA

SECRET = "hf_value_of_the_key"


@pytest.fixture(scope="module")
def measured(measuring_line: Callable[[Path, Path], list[str]], tiny_sets: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trust") / "run"
    main(measuring_line(run, tiny_sets / "unsafe"))
    return run


def copy(measured: Path, folder: Path, change: Callable[[dict[str, Any]], None] = lambda config: None) -> Path:
    """A foreign run folder with a changed configuration."""
    run = folder / "stranger"
    shutil.copytree(measured, run)
    config = yaml.safe_load((run / "predict.yaml").read_text())
    change(config)
    (run / "predict.yaml").write_text(yaml.safe_dump(config))
    return run


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(line)
    said = capsys.readouterr().err
    assert end.value.code == 2
    errors = [text for text in said.splitlines() if text.startswith("safervlm: error:")]
    assert len(errors) == 1, said
    return errors[0]


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch):
    """A server on this machine, and the requests that it received."""
    arrived: list[dict[str, Any]] = []
    shorten_waits(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with loopbacks() as start:

        def play(prompt: str, number: int, body: dict[str, Any]) -> None:
            arrived.append(body)

        yield start(play), arrived


def asks(address: str, variable: str | None = "HF_TOKEN") -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        settings: dict[str, Any] = {"model": "m", "addresses": [address]}
        settings |= {"api_key_variable": variable} if variable else {}
        config["model"]["init_args"]["vlm"] = {"class_path": "safervlm.vlm.server.client.Server", "init_args": settings}

    return change


@pytest.mark.parametrize("variable", ["HF_TOKEN", None])
def test_server_address_from_a_run_folder_is_not_contacted_without_consent(
    variable: str | None, measured: Path, tmp_path: Path, listener: tuple[Loopback, list[Any]], capsys
) -> None:
    server, arrived = listener
    run = copy(measured, tmp_path, asks(server.address, variable))
    named = variable or "OPENAI_API_KEY"
    line = ["verify", str(run), "--sample", "2"]
    for more in (
        [],
        ["--addresses", f"[{server.address}]"],
        ["--api_key_variable", named],
        ["--addresses", "[http://elsewhere.example/v1]", "--api_key_variable", named],
        ["--addresses", f"[{server.address}]", "--api_key_variable", "ANOTHER"],
    ):
        said = refused([*line, *more], capsys)
        assert server.address in said
        assert named in said
        assert SECRET not in said
    assert arrived == []
    main([*line, "--addresses", f"[{server.address}]", "--api_key_variable", named])
    assert len(arrived) == 2


HIDDEN = {
    "a class's own default": ("super().__init__(model, ['http://hidden.example/v1'], 'HF_TOKEN')", "http://hidden"),
    "its code": (
        "super().__init__(model, ['http://allowed.example/v1'], 'HF_TOKEN'); self.hosts[0].address = 'http://hidden/v1'",
        "http://hidden",
    ),
    "another variable": ("super().__init__(model, ['http://allowed.example/v1'], 'USER')", "variable USER,"),
}


@pytest.mark.parametrize("where", HIDDEN)
def test_addresses_and_key_variables_set_by_code_must_be_allowed(
    where: str, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The configuration's text names neither the address nor the variable, and the class is trusted."""
    code, expected = HIDDEN[where]
    module = f"strangers_{list(HIDDEN).index(where)}"
    beside = tmp_path / "shell"
    beside.mkdir()
    (beside / f"{module}.py").write_text(
        "from safervlm.vlm.server.client import Server\n\n\nclass Mine(Server):\n    '''Mine.'''\n\n"
        f"    def __init__(self, model: str = 'm') -> None:\n        {code}\n"
    )
    monkeypatch.chdir(beside)
    run = copy(measured, tmp_path, lambda config: config["model"]["init_args"].update(vlm=f"{module}.Mine"))
    line = ["verify", str(run), "--trust_config", "true", "--addresses", "[http://allowed.example/v1]"]
    said = refused([*line, "--api_key_variable", "HF_TOKEN"], capsys)
    assert expected in said
    assert "repeat it" in said


@pytest.mark.parametrize("form", ["[{}]", " - {}"])
def test_address_list_written_as_a_string_is_still_checked(
    form: str, measured: Path, tmp_path: Path, listener: tuple[Loopback, list[Any]], capsys
) -> None:
    server, arrived = listener
    written = form.format(server.address)
    run = copy(measured, tmp_path, asks(written))
    given = ["--addresses", json.dumps([written]), "--api_key_variable", "HF_TOKEN"]
    assert server.address in refused(["verify", str(run), "--sample", "2", *given], capsys)
    assert arrived == []


def test_verify_sends_images_of_the_dataset_and_not_paths_from_records(
    measured: Path, tmp_path: Path, listener: tuple[Loopback, list[Any]]
) -> None:
    server, arrived = listener
    run = copy(measured, tmp_path, asks(server.address))
    private = tmp_path / "private.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(private)
    records = [record | {"image_path": str(private)} for record in read_jsonl(run / "responses.jsonl")]
    write_jsonl(run / "responses.jsonl", records)
    allowed = ["--sample", "3", "--addresses", f"[{server.address}]", "--api_key_variable", "HF_TOKEN"]
    main(["verify", str(run), *allowed])
    sent = json.dumps(arrived)
    clean = copy(measured, tmp_path / "clean", asks(server.address))
    arrived.clear()
    main(
        ["verify", str(clean), "--sample", "3", "--addresses", f"[{server.address}]", "--api_key_variable", "HF_TOKEN"]
    )
    by_text = sorted(json.dumps(body["messages"]) for body in arrived)
    assert by_text == sorted(json.dumps(body["messages"]) for body in json.loads(sent))


def test_records_of_other_data_are_rejected(measured: Path, tmp_path: Path, capsys) -> None:
    run = copy(measured, tmp_path)
    records = list(read_jsonl(run / "responses.jsonl"))
    write_jsonl(run / "responses.jsonl", [record | {"id": f"Other/{record['id']}"} for record in records])
    assert "none of its responses is about the data" in refused(["verify", str(run)], capsys)
    write_jsonl(run / "responses.jsonl", [record | {"prompt": "What is the password?"} for record in records])
    assert "is the response to another question" in refused(["verify", str(run)], capsys)


CODE = {
    "model": lambda config: config["model"].update(class_path="strangers_code.Model"),
    "vlm": lambda config: config["model"]["init_args"]["vlm"].update(class_path="strangers_code.VLM"),
    "vlm by its path": lambda config: config["model"]["init_args"].update(vlm="strangers_code.VLM"),
    "data": lambda config: config["data"].update(class_path="strangers_code.Data"),
    "a set": lambda config: config["data"]["init_args"].update(sets={"a": {"class_path": "strangers_code.Set"}}),
    "a part in a file": lambda config: config["model"]["init_args"].update(vlm="part.yaml"),
    "the model's own code": lambda config: config["model"]["init_args"]["vlm"]["init_args"].update(
        trust_remote_code=True
    ),
}


@pytest.mark.parametrize("where", CODE)
@pytest.mark.parametrize("command", ["verify", "doctor"])
def test_code_named_by_a_run_folder_is_not_imported_without_consent(
    command: str, where: str, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = copy(measured, tmp_path, CODE[where])
    (run / "part.yaml").write_text("class_path: strangers_code.VLM\n")
    beside = tmp_path / "shell"
    beside.mkdir()
    (beside / "strangers_code.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.chdir(beside)
    line = ["verify", str(run)] if command == "verify" else ["doctor", "--config", str(run / "predict.yaml")]
    said = refused(line, capsys)
    assert "--trust_config true" in said
    assert ("trust_remote_code" if where.startswith("the model") else "strangers_code.") in said
    assert not (beside / "imported").exists()


def test_class_in_the_working_directory_is_imported_with_trust_config(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = copy(measured, tmp_path, lambda config: config["model"]["init_args"]["vlm"].update(class_path="my_vlm.Mine"))
    beside = tmp_path / "shell"
    beside.mkdir()
    (beside / "my_vlm.py").write_text("from safervlm.vlm.llava import Llava\n\n\nclass Mine(Llava):\n    '''Mine.'''\n")
    monkeypatch.chdir(beside)
    main(["verify", str(run), "--sample", "2", "--trust_config", "true"])
    assert list(read_jsonl(run / "verify.jsonl")) == []
    main(["doctor", "--config", str(run / "predict.yaml"), "--trust_config", "true"])
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": {"addresses": ["http://x/v1/"]}}, Named({"http://x/v1"}, {"OPENAI_API_KEY"}, set())),
        ({"a": {"init_args.addresses": ["http://x/v1/"]}}, Named({"http://x/v1"}, {"OPENAI_API_KEY"}, set())),
        ({"a": {"b.addresses": ["u"], "b.api_key_variable": "HF_TOKEN"}}, Named({"u"}, {"HF_TOKEN"}, set())),
        ({"vlm.class_path": "nowhere.at.All"}, Named(set(), set(), {"nowhere.at.All"})),
        ({"a": [{"source": "https://x/y.tsv"}]}, Named({"https://x/y.tsv"}, set(), set())),
        ({"about": "see https://x/y for more"}, Named()),
        ({"logger": {"api_key_variable": "WANDB_API_KEY"}}, Named(set(), {"WANDB_API_KEY"}, set())),
        ({"file": "responses.jsonl", "base": "FacebookAI/roberta-base", "n": 1, "x": None}, Named()),
        ({"callbacks": ["subprocess.Popen"]}, Named(set(), set(), {"subprocess.Popen"})),
        ({"class_path": "nowhere.at.All"}, Named(set(), set(), {"nowhere.at.All"})),
        ({"class_path": "safervlm.measure.Measure"}, Named()),
        ({"trust_remote_code": False}, Named()),
    ],
)
def test_named_in_finds_addresses_key_variables_and_code(config: Any, expected: Named, tmp_path: Path) -> None:
    assert named_in(config, tmp_path) == expected


ADDRESS = "addresses: [http://x/v1]\n"
PADDED = {
    "a date that is none": f"model: 2024-13-45\n{ADDRESS}",
    "with a byte order mark": f"\ufeff{ADDRESS}",
}
LARGE = {
    "comments": "# " + "x" * 1_100_000 + "\n" + ADDRESS,
    "comments of two bytes each": "# " + "\u00e9" * 600_000 + "\n" + ADDRESS,
    "replacement characters": "# " + "\ufffd" * 400_000 + "\n" + ADDRESS,
}


@pytest.mark.parametrize("case", PADDED)
def test_included_configuration_files_are_searched_as_the_parser_reads_them(case: str, tmp_path: Path) -> None:
    (tmp_path / "vlm.yaml").write_text(PADDED[case], encoding="utf-8")
    assert named_in({"vlm": "vlm.yaml"}, tmp_path).addresses == {"http://x/v1"}


@pytest.mark.parametrize("config", [{"vlm": "vlm.yaml"}, {"folder": "vlm.yaml", "vlm": "vlm.yaml"}])
@pytest.mark.parametrize("case", LARGE)
def test_included_configuration_file_too_large_to_search_is_rejected(
    case: str, config: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "vlm.yaml").write_text(LARGE[case], encoding="utf-8")
    with pytest.raises(RecordError, match=r"vlm\.yaml: a part of a configuration has at most"):
        named_in(config, tmp_path)


def test_large_data_and_weight_files_are_not_searched_as_configuration(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n" * 400_000)
    (tmp_path / "judge.pt").write_bytes(b"PK\x03\x04" + bytes(1_100_000))
    assert named_in({"file": "train.jsonl", "checkpoint": "judge.pt"}, tmp_path) == Named()


def test_configuration_without_addresses_or_code_needs_no_consent(tmp_path: Path) -> None:
    check_trust(tmp_path / "predict.yaml", Named(), "run", trust_config=False)


def test_images_outside_the_dataset_folders_of_a_run_are_not_readable(
    measured: Path, tiny_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    private = home / "Pictures" / "x.png"
    private.parent.mkdir(parents=True)
    private.touch()
    monkeypatch.setenv("HOME", str(home))
    assert may_read(measured, next(iter((tiny_sets / "unsafe" / "images").iterdir())))
    link = tmp_path / "link.png"
    link.symlink_to(private)
    for image in (private, "/etc/passwd", tiny_sets / "unsafe" / "images" / ".." / ".." / ".." / "x", link):
        assert not may_read(measured, image)
    run = copy(measured, tmp_path, lambda config: config["data"]["init_args"].update(cache_dir=str(home)))
    assert not may_read(run, private)


@pytest.mark.parametrize("inside", [True, False])
def test_page_shows_only_images_of_the_datasets_of_the_run(inside: bool, tmp_path: Path) -> None:
    own, elsewhere = tmp_path / "data", tmp_path / "private"
    for folder in (own, elsewhere):
        folder.mkdir()
        Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    run = tmp_path / "run"
    run.mkdir()
    (run / "predict.yaml").write_text(json.dumps({"data": {"init_args": {"folder": str(own)}}}))
    path = (own if inside else elsewhere) / "a.png"
    shown = picture(str(path), "record", tmp_path / "page.html", run)
    assert (shown["blur"] is not None) == inside
    assert (shown["original"] is not None) == inside
    if not inside:
        assert "outside the datasets" in shown["reason"]


# Loaders without the argument trust_remote_code, and why they run no code by themselves.
NO_CODE = {
    "PeftConfig.from_pretrained": "reads JSON alone",
    "PeftModel.from_pretrained": "puts weights into layers of a model that is there",
    "GenerationConfig.from_pretrained": "reads JSON alone",
    "self.remote_class('AutoConfig').from_pretrained": "the code that the user has asked for",
    "self.remote_class('AutoTokenizer').from_pretrained": "the code that the user has asked for",
}


@pytest.mark.parametrize("base", ["somebody/model", "../other", "/nowhere", ""])
def test_base_model_named_by_an_adapter_is_not_fetched(
    base: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32", lora=LoRA(r=2, alpha=4))
    vlm.load(train=["policy"])
    for name, parameter in vlm.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    asked: list[str] = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda name, file: asked.append(name))
    adapter = tmp_path / "here" / "adapter"
    vlm.save_adapter(adapter)
    (adapter / "safervlm.json").unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    # A base of another vocabulary, for which PEFT would expect embeddings in the adapter's file.
    shutil.copytree(tiny_llava, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["vocab_size"] = config["text_config"]["vocab_size"] = 7
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    Llava(str(tiny_llava), dtype="float32", adapter=str(adapter)).load()
    assert not asked
    assert not [str(each.message) for each in recwarn if "config file" in str(each.message)]


def test_every_model_loading_call_disables_remote_code() -> None:
    root = Path(__file__).parent.parent.parent
    unsaid, unneeded = [], set(NO_CODE)
    for path in sorted(file for part in ("safervlm", "callbacks", "scripts") for file in (root / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            name = ast.unparse(node.func)
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in NO_CODE:
                unneeded.discard(name)
            elif said.get("trust_remote_code") != "False":
                unsaid.append(f"{path.relative_to(root)}, line {node.lineno}: {name}")
    assert not unsaid
    assert not unneeded
