"""Takes the screenshots for README.md and docs/ from the reports of the demo's models, with Chromium.

bash scripts/demo.sh
safervlm evaluate runs/demo/sft runs/demo/dpo runs/demo/ppo --original runs/demo/original --pictograms
safervlm report runs/demo/original runs/demo/sft runs/demo/dpo runs/demo/ppo --out runs/report.html
python scripts/screenshots.py report=runs/report.html evaluation=runs/evaluation.html
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

from safervlm.io.images import open_image

DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 1200  # pixels
HEIGHTS = {"report": 900, "evaluation": 1300}
COLOURS = 128  # a palette makes the files small


def take(pages: dict[str, Path], folder: Path) -> None:
    """Writes FOLDER/NAME.png with the top of each page.

    Args:
        pages: name -> HTML file.
        folder: folder for the pictures.

    Raises:
        SystemExit: there is no Chromium.
    """
    found = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
    if found is None:
        raise SystemExit("no chromium: install Debian's (apt-get install chromium)")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as temporary:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, page in pages.items():
            tab = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHTS.get(name, HEIGHTS["report"])}, color_scheme="light"
            )
            tab.goto(page.resolve().as_uri())
            picture = Path(temporary) / f"{name}.png"
            tab.screenshot(path=picture)
            open_image(picture, name).quantize(COLOURS).save(folder / f"{name}.png", optimize=True)
        browser.close()


def main(args: Sequence[str] | None = None) -> None:
    """Takes the pictures.

    Args:
        args: words of the command line; None for those of ``sys.argv``.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", metavar="NAME=FILE", help="picture, and the page that it shows the top of")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pictures (default: docs)")
    options = parser.parse_args(args)
    pages = {name: Path(file) for name, _, file in (each.partition("=") for each in options.pages)}
    if missing := [str(file) for file in pages.values() if not file.is_file()]:
        raise SystemExit(f"{missing[0]}: no such file; name pages as NAME=FILE")
    take(pages, options.out)


if __name__ == "__main__":
    main()
