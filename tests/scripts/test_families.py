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
    cases.append('<testcase name="test_the_limits_are_arguments"/>')
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
    document.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    monkeypatch.setattr(script, "DOCUMENT", document)
    monkeypatch.setattr(sys, "argv", ["families.py", "--junit", str(junit(script, tmp_path / "r.xml", "failure"))])
    with pytest.raises(SystemExit, match="1"):
        script.main()
    text = document.read_text()
    assert re.fullmatch(rf"before\n{script.BEGIN}\n1 of the .*\n{script.END}\nafter\n", text, re.DOTALL)
    assert "old" not in text


def test_the_documented_table_is_of_the_tested_families(script: ModuleType) -> None:
    """And every check of it passed."""
    tests = script.TESTS.read_text(encoding="utf-8")
    names = re.findall(r"\(families\.(\w+), (?:None|QUESTION|\"[^\"]*\")\),", tests)
    more = (ROOT / "tests" / "vlm" / "more_families.py").read_text(encoding="utf-8")
    names += re.findall(r"\w+", re.sub(r"\*|\(|\)|#.*", " ", more.partition("BUILDERS = (")[2].partition("\n)")[0]))
    text = script.DOCUMENT.read_text(encoding="utf-8").partition(script.BEGIN)[2].partition(script.END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == names, "run scripts/families.py"
    assert not {"failure", "error", "skipped", "not run"} & {cell for row in rows for cell in row}
    types = {row[1] for row in rows}
    stated = re.match(r"(\d+) of the \d+ model types of `AutoModelForImageTextToText`", text.strip())
    assert stated is not None
    assert int(stated[1]) == len(types) >= 30
    assert stated[0] in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
