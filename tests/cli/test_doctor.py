"""safervlm doctor: findings, remedies for missing requirements, and no network access unless requested."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import GatedRepoError

from safervlm.cli import machine, recipe_checks
from safervlm.cli.machine import Finding
from safervlm.cli.main import main
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA


@pytest.fixture
def examine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Finding]]]:
    """``examine(*arguments)``: the exit code, and the findings by subject."""

    monkeypatch.setenv("COLUMNS", "200")

    def examine(*arguments: str) -> tuple[int, dict[str, Finding]]:
        seen: list[Finding] = []
        for module in (machine, recipe_checks):
            monkeypatch.setattr(module, "Finding", lambda *given: seen.append(Finding(*given)) or seen[-1])
        code = 0
        try:
            main(["doctor", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr().out
        assert all(each.what.split()[0] in shown for each in seen)
        return code, {each.what: each for each in seen}

    return examine


def test_this_environment_has_all_packages(examine) -> None:
    code, found = examine()
    assert code == 0
    assert {"Python", "torch", "transformers", "lightning", "disk here", "Hub token"} <= found.keys()
    assert found["torch"].state == "ok"
    assert "pytest" not in found  # of an extra


def test_wrong_package_version_is_reported_with_the_install_command(examine, monkeypatch) -> None:
    monkeypatch.setattr(machine, "requires", lambda name: ["torch>=99", "no-such-package>=1"])
    code, found = examine()
    assert code == 1
    assert found["torch"].state == "error"
    assert "pip install 'torch>=99'" in found["torch"].found
    assert found["no-such-package"].found == "is missing; pip install 'no-such-package>=1'"


def test_folders_and_images_named_by_a_recipe_are_checked(
    examine, tiny_llava: Path, tiny_sets: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sets / "unsafe", tmp_path / "unsafe")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        f"model: {{init_args: {{vlm: {{init_args: {{model: {tiny_llava}}}}}}}}}\n"
        f"data: {{init_args: {{folder: {tmp_path / 'unsafe'}, safe_folder: {tmp_path / 'nowhere'}}}}}\n"
    )
    line = ["--config", "configs/sft.yaml", "--config", str(overlay)]
    code, found = examine(*line)
    assert code == 1
    assert found["VLM"].state == found["data.folder"].state == "ok"
    assert "30 images" in found["data.folder"].found
    assert found["data.safe_folder"].state == "error"
    (tmp_path / "unsafe" / "images" / "3.png").unlink()
    _, found = examine(*line)
    assert found["data.folder"].found.startswith("1 of 30 images are missing")
    assert "images/3.png" in found["data.folder"].found


def test_hub_access_is_checked_only_with_online_option(examine, monkeypatch) -> None:
    asked: list[str] = []

    def check(repo: str, repo_type: str) -> None:
        asked.append(f"{repo_type} {repo}")
        if repo_type == "dataset":
            raise GatedRepoError("gated", response=Mock(headers={}))

    monkeypatch.setattr(recipe_checks, "auth_check", check)
    code, found = examine("--config", "configs/measure.yaml")
    assert (code, asked) == (0, [])
    assert {found[what].state for what in ("VLM", "VLM's revision", "data.repo", "judge")} == {"warning"}
    code, found = examine("--config", "configs/measure.yaml", "--online", "true")
    assert code == 1
    assert "model llava-hf/llava-1.5-7b-hf" in asked
    assert found["VLM"].state == "ok"
    assert "accept its terms on https://huggingface.co/datasets/yiting/UnsafeConcepts" in found["data.repo"].found


def test_missing_config_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--config", "configs/nothing.yaml"])
    assert "safervlm: error: --config: no file 'configs/nothing.yaml'" in capsys.readouterr().err


def test_doctor_creates_no_files(examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examine("--config", "configs/measure.yaml")
    assert not list(tmp_path.iterdir())


def test_the_datasets_of_an_evaluation_are_checked(examine, tmp_path: Path) -> None:
    code, found = examine("--config", "configs/evaluate.yaml")
    assert code == 1
    contexts = found["data.sets.contexts.contexts"]
    assert contexts.state == "error"
    assert "the published questions, or yours" in contexts.found
    assert "data.sets.mme.source" in found
    for name in ("https://x.org/MME.tsv", "a/b"):
        (elsewhere,) = recipe_checks.source("data.source", name, online=False)
        assert elsewhere.state == "warning"
    (missing,) = recipe_checks.source("data.source", str(tmp_path / "x.tsv"), online=False)
    assert missing.state == "error"
    (tmp_path / "x.tsv").touch()
    (there,) = recipe_checks.source("data.source", str(tmp_path / "x.tsv"), online=False)
    assert there.state == "ok"


def test_remote_code_must_be_enabled_and_pinned_to_a_commit() -> None:
    commit = "0" * 40
    states = [
        [found.state for found in recipe_checks.remote_code(*given)]
        for given in (("a/b", commit, False), ("a/b", "main", True), ("a/b", None, True), ("a/b", commit, True))
    ]
    assert states == [["error"], ["error"], ["error"], ["ok"]]


def test_vlm_option_replaces_the_vlm_of_the_recipe(examine) -> None:
    _, found = examine("--config", "configs/measure.yaml", "--vlm", "configs/vlm/cogvlm-chat.yaml")
    assert found["VLM"].found.startswith("THUDM/cogvlm-chat-hf")
    assert "all 40 digits of the commit" in found["VLM's code"].found


def test_hub_model_size_is_compared_with_gpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size from the index in the cache, or from the Hub if network access is allowed, and whether it fits."""
    monkeypatch.setattr(recipe_checks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(recipe_checks.torch.cuda, "mem_get_info", lambda device: (0, 8 * 2**30))
    assert list(recipe_checks.size("a/b", None, online=False)) == []
    files = [Mock(rfilename="model-1.safetensors", size=7 * 2**30), Mock(rfilename="model.bin", size=99 * 2**30)]
    monkeypatch.setattr(recipe_checks, "HfApi", lambda: Mock(model_info=lambda *a, **k: Mock(siblings=files)))
    assert [(found.what, found.state) for found in recipe_checks.size("a/b", None, online=True)] == [
        ("VLM's weights", "ok"),
        ("memory", "ok"),
    ]
    monkeypatch.setattr(recipe_checks, "HfApi", lambda: Mock(model_info=Mock(side_effect=ConnectionError)))
    (unknown,) = recipe_checks.size("a/b", None, online=True)
    assert (unknown.state, unknown.found) == ("warning", "the Hub doesn't report their size (ConnectionError)")
    (tmp_path / "index.json").write_text('{"metadata": {"total_size": 15032385536}}')
    monkeypatch.setattr(recipe_checks, "try_to_load_from_cache", lambda *a, **k: str(tmp_path / "index.json"))
    weights, memory = recipe_checks.size("a/b", None, online=False)
    assert weights.found == "14.0 GiB"
    assert machine.size_text(5 * 2**19) == "2.5 MiB"
    assert memory.state == "error"


def test_a_server_that_needs_a_key_is_reported(examine, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ("--config", "configs/evaluate.yaml", "--config", "configs/rate.yaml")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    _, found = examine(*recipe)
    assert found["server"].state == "error"
    assert "api.openai.com/v1 needs a key: export OPENAI_API_KEY=" in found["server"].found
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    _, found = examine(*recipe)
    assert found["server"].state == "ok"
    assert "secret" not in found["server"].found


def test_training_memory_is_estimated_from_trainable_weights(examine, tiny_llava: Path, tmp_path: Path) -> None:
    vlm = Llava(str(tiny_llava), lora=LoRA(r=8), dtype="float32")
    vlm.load(train=["policy"])
    weights = sum(weight.numel() for name, weight in vlm.named_parameters() if "lora" in name)
    assert recipe_checks.training_memory(tiny_llava, LoRA(r=8)) == 16 * weights
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"model: {{init_args: {{vlm: {{init_args: {{model: {tiny_llava}}}}}}}}}\n")
    _, found = examine("--config", "configs/sft.yaml", "--config", str(overlay))
    assert found["training memory"].state == "ok"
    _, found = examine("--config", "configs/measure.yaml", "--config", str(overlay))
    assert "training memory" not in found
