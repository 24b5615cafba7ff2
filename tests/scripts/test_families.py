"""scripts/families.py: the table of tested model types, and that the documented one is of these tests."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "families.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def junit(script: ModuleType, path: Path, bad: str = "") -> Path:
    """Results of two families: every check of the first passes, and one of the second ends otherwise."""
    cases = []
    for family in ("llava", "emu3"):
        for check in (check for checks in script.CHECKS.values() for check in checks):
            inside = f"<{bad}/>" if bad and family == "emu3" and check.startswith("score") else ""
            if check.startswith("questions"):
                inside += f'<properties><property name="type" value="{family}"/></properties>'
            cases.append(f'<testcase name="test_{check}[{family}]">{inside}</testcase>')
    cases.append('<testcase name="test_text_limits_are_configurable"/>')
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


@pytest.mark.parametrize(("bad", "count"), [("", 2), ("failure", 1), ("error", 1), ("skipped", 1)])
def test_the_table_has_the_outcome_of_each_check(script: ModuleType, tmp_path: Path, bad: str, count: int) -> None:
    text = script.table(script.results(junit(script, tmp_path / "results.xml", bad)))
    assert re.match(rf"{count} of the \d+ model types of `AutoModelForImageTextToText` pass every check", text)
    head, _, llava, emu3 = text.splitlines()[2:]
    place = head.split("|").index(" score ")
    assert llava.split("|")[place].strip() == "passed"
    assert emu3.split("|")[place].strip() == (bad or "passed")


def test_a_failed_check_is_written_and_ends_the_script_with_1(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "models.md"
    begin, end = script.edges("families")
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(script, "DOCUMENT", document)
    monkeypatch.setattr(sys, "argv", ["families.py", "--junit", str(junit(script, tmp_path / "r.xml", "failure"))])
    with pytest.raises(SystemExit, match="1"):
        script.main()
    text = document.read_text()
    assert re.fullmatch(rf"before\n{begin}\n1 of the .*\n{end}\nafter\n", text, re.DOTALL)
    assert "old" not in text


def test_family_with_every_check_skipped_is_omitted(script: ModuleType, tmp_path: Path) -> None:
    """It needs a package that is missing, and is in the table of an environment that has it."""
    file = junit(script, tmp_path / "results.xml")
    whole = re.sub(
        r'(<testcase name="test_\w+\[emu3\]">)[^\n]*?</testcase>', r"\1<skipped/></testcase>", file.read_text()
    )
    file.write_text(whole)
    assert list(script.results(file)) == ["llava"]


def test_torchvision_families_have_a_separate_table(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (begin, end), (other, last) = map(script.edges, ("vision", "families"))
    document = tmp_path / "models.md"
    document.write_text(f"{other}\nkept\n{last}\n{begin}\nold\n{end}\n")
    monkeypatch.setattr(script, "DOCUMENT", document)
    monkeypatch.setattr(sys, "argv", ["families.py", "--vision", "--junit", str(junit(script, tmp_path / "r.xml"))])
    known = script.version

    def version(name: str) -> str:
        return "0.29.1+cpu" if name == "torchvision" else known(name)

    monkeypatch.setattr(script, "version", version)
    script.main()
    text = document.read_text()
    assert text.startswith(f"{other}\nkept\n{last}\n{begin}\nWith torchvision, 2 model types pass every check; ")
    assert "torchvision 0.29.1, " in text
    assert "`python scripts/families.py --vision`." in text

    def missing(name: str) -> str:
        raise script.PackageNotFoundError(name)

    monkeypatch.setattr(script, "version", missing)
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "torchvision is missing: pip install '.[test,vision]'" in capsys.readouterr().err


def documented(script: ModuleType, name: str) -> tuple[str, list[list[str]]]:
    """The sentence before a table of the document, and the table's rows; every check passed."""
    begin, end = script.edges(name)
    text = script.DOCUMENT.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert not {"failure", "error", "skipped", "not run"} & {cell for row in rows for cell in row}
    return text.splitlines()[0], rows


def builders(file: str) -> list[str]:
    """The names in the tuple BUILDERS of a file beside tests/vlm/test_transformers.py."""
    text = (ROOT / "tests" / "vlm" / file).read_text(encoding="utf-8").partition("BUILDERS = (")[2]
    return re.findall(r"\w+", re.sub(r"\*|\(|\)|#.*", " ", re.split(r"\n\)|\)\n", text)[0]))


def test_documented_table_lists_the_tested_families(script: ModuleType) -> None:
    tests = script.TESTS.read_text(encoding="utf-8")
    names = re.findall(r"\(families\.(\w+), (?:None|QUESTION|\"[^\"]*\")\),", tests)
    head, rows = documented(script, "families")
    assert [row[0] for row in rows] == [*names, *builders("more_families.py")], "run scripts/families.py"
    types = {row[1] for row in rows}
    stated = re.match(r"(\d+) of the \d+ model types of `AutoModelForImageTextToText`", head)
    assert stated is not None
    assert int(stated[1]) == len(types) >= 30
    assert stated[0] in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_documented_torchvision_table_lists_the_tested_families(script: ModuleType) -> None:
    head, rows = documented(script, "vision")
    assert [row[0] for row in rows] == builders("vision_families.py"), "run scripts/families.py --vision"
    assert re.match(rf"With torchvision, {len({row[1] for row in rows})} model types pass .*, torchvision \d", head)
