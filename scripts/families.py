"""Writes the tables of tested model types in docs/models.md, from a run of tests/vlm/test_transformers.py.

python scripts/families.py                 # runs the tests (some minutes of one core), and writes the table
python scripts/families.py --junit FILE    # takes the results of `pytest --junit-xml=FILE`
python scripts/families.py --vision        # the families that need torchvision, in an environment with [test,vision]
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

from safervlm.io.files import write_atomically

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "vlm" / "test_transformers.py"
DOCUMENT = ROOT / "docs" / "models.md"
# Name of a table -> marker expression of its tests.
TABLES = {"families": "not gpu and not torchvision", "vision": "not gpu and torchvision"}
# Heading of a column -> the checks that it stands for.
CHECKS = {
    "image matters": ("another_image_changes_the_logits",),
    "generate": (
        "greedy_responses_equal_transformers_generate_one_by_one",
        "a_question_that_is_asked_twice_is_answered_twice",
        "no_special_token_is_ever_sampled",
    ),
    "sample": ("sampled_responses_depend_only_on_their_record",),
    "score": ("scores_equal_one_plain_forward_pass_per_completion",),
    "share": ("questions_about_an_image_share_image_and_prefix", "an_image_is_encoded_once"),
    "LoRA": ("lora_is_on_every_linear_layer_of_the_language_model_and_on_no_other",),
    "SFT": ("training_lowers_the_loss_and_changes_only_the_adapter", "checkpointed_gradients_are_the_same"),
    "reload": ("a_saved_adapter_scores_the_same", "the_collator_is_small_and_pickles"),
}


def edges(name: str) -> tuple[str, str]:
    """Returns the comments around a table in the document.

    Args:
        name: Name of the table.
    """
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def results(junit: Path) -> dict[str, dict[str, str]]:
    """Returns for each family the outcome of each check, and the properties that the checks recorded.

    A family of which every check is skipped, because it needs a package that is missing, is left out.

    Args:
        junit: Results of pytest in JUnit's format.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ET.parse(junit).iter("testcase"):  # noqa: S314 (written by pytest)
        test, _, family = case.attrib["name"].removesuffix("]").partition("[")
        check = test.removeprefix("test_")
        if not any(check in checks for checks in CHECKS.values()):
            continue
        bad = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), None)
        found[family][check] = "passed" if bad is None else bad
        for each in case.iter("property"):
            found[family][each.attrib["name"]] = each.attrib["value"]
    return {family: outcome for family, outcome in found.items() if set(outcome.values()) != {"skipped"}}


def table(found: dict[str, dict[str, str]], name: str = "families") -> str:
    """Returns the table in Markdown, with the number of model types that pass every check.

    Args:
        found: The results of :func:`results`.
        name: Name of the table.
    """
    rows, passing = [], set()
    for family, outcome in found.items():
        cells = []
        for checks in CHECKS.values():
            bad = [outcome.get(check, "not run") for check in checks if outcome.get(check) != "passed"]
            cells.append(bad[0] if bad else "passed")
        if set(cells) == {"passed"}:
            passing.add(outcome["type"])
        for column in ("share", "LoRA"):  # a passed check recorded the value
            place = list(CHECKS).index(column)
            cells[place] = outcome.get(column, "passed") if cells[place] == "passed" else cells[place]
        rows.append([family, f"`{outcome.get('type', '-')}`", *cells])
    lines = [["family", "model type", *CHECKS], ["---"] * (len(CHECKS) + 2), *rows]
    vision = name == "vision"
    counted = f"{len(passing)} of the {len(TYPES)} model types of `AutoModelForImageTextToText` pass every check"
    if vision:
        counted = f"With torchvision, {len(passing)} model types pass every check"
    packages = ("transformers", "torch", *(["torchvision"] if vision else []))
    versions = ", ".join(f"{package} {version(package).partition('+')[0]}" for package in packages)
    command = f"python scripts/families.py{' --vision' if vision else ''}"
    head = f"{counted}; {versions}, {date.today().isoformat()}, written by `{command}`."
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    """Writes the table; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--junit", type=Path, help="results of pytest; by default the tests are run")
    parser.add_argument("--vision", action="store_true", help="the families that need torchvision")
    given = parser.parse_args()
    junit, name = given.junit, "vision" if given.vision else "families"
    if given.vision:
        try:
            version("torchvision")
        except PackageNotFoundError:
            parser.error("--vision: torchvision is missing: pip install '.[test,vision]'")
    with tempfile.TemporaryDirectory() as folder:
        if junit is None:
            junit = Path(folder) / "results.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={junit}"]
            subprocess.run([*command, "-m", TABLES[name], str(TESTS)], cwd=ROOT, check=False)  # noqa: S603
        found = results(junit)
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = edges(name)
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    content = f"{before}{begin}\n{table(found, name)}\n{end}{after}"
    write_atomically(DOCUMENT, lambda path: path.write_text(content, encoding="utf-8"))
    if any(value in ("failure", "error") for outcome in found.values() for value in outcome.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
