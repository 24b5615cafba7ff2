"""Files that other tools read: citation, pre-commit hooks, workflows, the image for a GPU machine."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def missing(text: str) -> list[str]:
    """The files and folders of the project that a shell command names but that do not exist."""
    words = [word.removesuffix("/") for word in shlex.split(re.sub(r"\$\{\{.*?\}\}", "", text), comments=True)]
    named = [
        word for word in words if re.fullmatch(r"(?:scripts|tests|docs|configs|safervlm|callbacks)(?:/[\w./-]+)?", word)
    ]
    named += [word for word in words if re.fullmatch(r"[\w./-]+\.(?:sh|py|toml|txt|yml|yaml|md)", word)]
    return [word for word in named if word != "safervlm" and not (ROOT / word).exists()]


def test_missing_files_are_found() -> None:
    assert missing('bash scripts/test.sh -m "not slow" # scripts/nothing.sh') == []
    assert missing("bash scripts/nothing.sh && pytest tests/nowhere") == [
        "scripts/nothing.sh",
        "tests/nowhere",
        "scripts/nothing.sh",
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_files_that_exist(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert missing(step.get("run", "")) == [], step
            for value in map(str, step.get("with", {}).values()):
                assert missing(value) == [], step


def test_the_workflows_cover_versions_and_platforms() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "test.yml")
    jobs = workflow["jobs"]
    on = workflow[True]  # YAML parses the word as a boolean
    assert {"push", "pull_request", "schedule"} <= on.keys()
    assert "schedule" in jobs["full"]["if"]
    assert [each["name"] for each in jobs["versions"]["strategy"]["matrix"]["include"]] == ["oldest", "newest"]
    assert jobs["platforms"]["strategy"]["matrix"]["os"] == ["windows-latest", "macos-latest"]
    assert "mkdocs build --strict" in [step.get("run") for step in jobs["docs"]["steps"]]
    commands = jobs["wheel"]["steps"][-1]["run"]
    assert all(f"safervlm {name} " in commands for name in ("measure", "report", "train", "evaluate"))


def test_the_site_is_built_with_the_projects_own_requirements() -> None:
    (install,) = (step["run"] for step in read(WORKFLOWS[0])["jobs"]["docs"]["steps"] if step.get("name") == "install")
    assert set(shlex.split(install)[4:]) == set(PROJECT["optional-dependencies"]["docs"])


def test_hooks_run_the_projects_own_linters() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["id"]: hook["language"] for hook in repository["hooks"]} == dict.fromkeys(
        ("ruff", "ruff-format", "mypy"), "system"
    )


def test_the_citation_is_complete() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license", "references"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert "2507.11155" in paper["url"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"version = {{{PROJECT['version']}}}" in readme
    assert paper["title"] in readme


def test_docker_image_copies_required_files_and_does_not_run_as_root() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    copied = {source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert {"pyproject.toml", "README.md", "safervlm", "callbacks", "configs"} <= copied
    assert next(line for line in reversed(lines) if line.startswith("USER ")) != "USER root"
    assert 'ENTRYPOINT ["safervlm"]' in lines
