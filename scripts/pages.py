"""Tables that scripts write between markers in Markdown pages."""

import re
from pathlib import Path


def write_between(page: Path, name: str, text: str) -> None:
    """Replaces the text between ``<!-- name -->`` and ``<!-- end of name -->``.

    Args:
        page: the Markdown file.
        name: the name of the markers.
        text: Markdown.

    Raises:
        SystemExit: the page does not have these markers exactly once.
    """
    written, found = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)",
        lambda match: f"{match[1]}\n{text}\n\n{match[2]}",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{page}: no markers of {name}")
    page.write_text(written, encoding="utf-8")
