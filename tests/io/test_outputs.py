"""An output replaces only an earlier output of the same command."""

from pathlib import Path

import pytest

from safervlm.errors import ArgumentError
from safervlm.io.outputs import require_replaceable_page, require_replaceable_texts

PAGE = '<!doctype html><p class="eyebrow">SaferVLM {}</p>'
# The existing file, then the text of the error; None: the file may be written.
THERE: dict[str, tuple[dict[str, str], str | None]] = {
    "nothing": ({}, None),
    "an earlier page and its tables": ({"out.html": PAGE.format("report"), "out.csv": "run\n"}, None),
    "a page of the user's": ({"out.html": "<p>notes on SaferVLM report</p>"}, "out.html"),
    "an empty file": ({"out.html": ""}, "out.html"),
    "a page of another command": ({"out.html": PAGE.format("evaluation")}, "safervlm report"),
    "a table without a page": ({"out_overall.csv": "run\n"}, "out_overall.csv"),
    "a folder": ({"out.html/x.txt": ""}, "is a folder"),
    "another table": ({"other.csv": "run\n"}, None),
}


@pytest.mark.parametrize("case", THERE)
def test_page_replaces_only_an_earlier_page_of_the_same_command(case: str, tmp_path: Path) -> None:
    files, named = THERE[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    page = tmp_path / "out.html"
    if named is None:
        require_replaceable_page(page, "report", ".csv", "_overall.csv")
        return
    with pytest.raises(ArgumentError, match=r"^out: .*; name a") as caught:
        require_replaceable_page(page, "report", ".csv", "_overall.csv")
    assert named in str(caught.value)


def test_existing_text_file_with_other_content_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "sft_train.json"
    require_replaceable_texts("--out", {file: "[]"})
    file.write_text("[]")
    require_replaceable_texts("--out", {file: "[]"})
    with pytest.raises(ArgumentError, match=r"^--out: .*sft_train.json already exists.*name another folder"):
        require_replaceable_texts("--out", {file: "[1]"})
