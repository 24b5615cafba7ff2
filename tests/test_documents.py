"""The README and docs/: every command is parsed, every file, link and name exists."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml
from documents import DOCUMENTS, ROOT, TEXTS, blocks, commands, file_of, inline_commands, safervlm_commands

from safervlm.cli.main import main
from safervlm.run_folder import RunFolder

# The name of a run does not matter; a placeholder for a file or a class cannot be parsed.
ALL = sorted(
    {
        re.sub(r" --run \S+", "", shlex.join(words))
        for text in TEXTS.values()
        for command in [*commands(text), *inline_commands(text)]
        for words in safervlm_commands(command)
        if not {"CLASS", "runs/NAME/fit.yaml"} & set(words)
    }
)
LIGHTNING = [line for line in ALL if line.startswith(("fit ", "validate ", "predict "))]
# Phrases for which the field has established terms.
DIALECT = (
    "can't be had", "goes on where", "held the truth", "stands behind", "told apart", "left out and said", "whole line",
    "the judge reads", "made of it", "drawn apart", "without being said", "takes it back", "has the last word",
)  # fmt: skip


@pytest.fixture
def shown_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder holds the files that the documents show."""
    modules = set(sys.modules)
    for text in TEXTS.values():
        for shown in filter(None, map(file_of, blocks(text, "python") + blocks(text, "yaml"))):
            path = tmp_path / shown[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shown[1], encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield
    for name in {file.stem for file in tmp_path.glob("*.py")} - modules:
        sys.modules.pop(name, None)


@pytest.mark.slow  # a second each, and there are many
@pytest.mark.usefixtures("shown_files")
@pytest.mark.parametrize("line", LIGHTNING)
def test_documented_training_and_prediction_commands_are_parsed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    helps = any(word.endswith(".help") for word in shlex.split(line))
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(line), *([] if helps else ["--print_config"])])
    said = capsys.readouterr()
    assert end.value.code in (0, None), said.err
    assert len(said.out.splitlines()) > 10


def test_the_documents_name_every_file_of_a_run() -> None:
    files = RunFolder("run")
    names = [
        value.relative_to("run").parts[0]
        for name, kind in vars(RunFolder).items()
        if isinstance(kind, property) and isinstance(value := getattr(files, name), Path)
    ]
    table = TEXTS["docs/quickstart.md"].partition("## The run folder")[2].partition("\n## ")[0]
    assert len(names) > 25
    assert [name for name in names if name not in table and not name.endswith("-unfinished.jsonl")] == []


@pytest.mark.parametrize("line", sorted(set(ALL) - set(LIGHTNING)))
def test_documented_options_of_other_commands_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = shlex.split(line)
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert not end.value.code
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert {word for word in words if word.startswith("--")} <= set(known)


def test_there_are_commands_to_check() -> None:
    assert len(LIGHTNING) > 30
    assert any("--model.vlm.dry_run" in line for line in LIGHTNING)
    assert "scripts/demo.sh" in TEXTS["README.md"]


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", each) for each in words}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_links_exist(name: str) -> None:
    text, folder = TEXTS[name], DOCUMENTS[name].parent
    for path in set(
        re.findall(r"(?<![\w./-])(?:configs|scripts|tests|docs)/[\w/-]+\.(?:yaml|py|sh|md|png|txt)\b", text)
    ):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (folder / target).is_file(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        if "://" not in target:
            page = folder / target if target else DOCUMENTS[name]
            assert anchor in anchors(page.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_classes_and_modules_exist(name: str) -> None:
    dotted = r"(?<![\w./-])(?:safervlm|callbacks)(?:\.\w+)+"
    for found in set(re.findall(dotted, TEXTS[name])):
        if not found.endswith((".yaml", ".md", ".html", ".py", ".git")):
            resolve_name(found)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_blocks_are_valid_in_their_language(name: str) -> None:
    text = TEXTS[name]
    languages = re.findall(r"^```(\w*)$", text, re.MULTILINE)[::2]
    assert set(languages) <= {"bash", "python", "yaml", "json", "text", "bibtex"}
    assert not re.findall(
        r"^    (?:safervlm|bash|pip|python) .*$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
    )
    for block in blocks(text, "python"):
        compile(block, name, "exec")
    for block in blocks(text, "yaml"):
        yaml.safe_load(block)
    for block in blocks(text, "json"):
        try:
            json.loads(block)
        except json.JSONDecodeError:
            for line in block.splitlines():
                json.loads(line)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_use_standard_terms(name: str) -> None:
    text = " ".join(TEXTS[name].split()).lower()
    assert [phrase for phrase in DIALECT if phrase in text] == []


def test_the_readme_is_short_and_has_all_parts() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 110
    headings = re.findall(r"^## (.*)$", TEXTS["README.md"], re.MULTILINE)
    assert headings[:3] == ["Two commands", "Install", "Measure, align, evaluate"]
    assert headings[-2:] == ["Care", "Citation"]
    for tool in ("pip install", "uv pip install", "conda create"):
        assert tool in TEXTS["README.md"]


def test_every_page_is_in_the_sites_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for each in (part.values() if isinstance(part, dict) else part) for page in pages(each)]

    assert sorted(pages(site["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert site["strict"] is True
    assert site["theme"]["font"] is False
