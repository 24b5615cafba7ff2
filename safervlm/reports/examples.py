"""Examples of responses and their images, which are blurred."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image, ImageFilter

from safervlm.errors import RecordError
from safervlm.hashing import seed_for
from safervlm.io.escape import without_folders
from safervlm.io.images import open_image
from safervlm.io.trust import may_read
from safervlm.reports.runs import Run
from safervlm.results.scores import category_order

EXAMPLES = {"alignment": 2, "alignment_text_only": 1, "perception": 1}  # that the page shows of each category

GRAIN = 5  # colours along the longer side of a blurred image: all that is left of it
THUMBNAIL = 160  # pixels along its longer side


# --- examples ---------------------------------------------------------------------------------------------------------


def examples(runs: Sequence[Run], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Questions with every run's answer, by capability.

    The choice looks at the question's id alone: it doesn't depend on what was answered, and stays the same from report
    to report. Questions that every run was asked come first.

    Args:
        runs: the first one's questions are shown.
        out: the page's file, from which images are linked.
    """
    answers = [run.frame.set_index("id", drop=False) for run in runs]
    shared = set.intersection(*(set(frame.index) for frame in answers))
    first = answers[0]
    pictures: dict[str, dict[str, Any]] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for capability, count in EXAMPLES.items():
        asked = first[first["capability"] == capability]
        by_side = sorted(
            asked.groupby(["side", "category"]),
            key=lambda part: (part[0][0] == "safe", category_order(str(part[0][1]))),
        )
        cards = []
        for _, part in by_side:
            ranked = sorted(part["id"], key=lambda name: (name not in shared, seed_for("example", name)))
            distinct = dict.fromkeys(part.loc[ranked, "image"])
            for image in list(distinct)[:count]:
                name = next(name for name in ranked if part.loc[name, "image"] == image)
                cards.append(_card(first.loc[name], runs, answers, pictures, out))
        if cards:
            chosen[capability] = cards
    return chosen


def _card(
    question: "pd.Series[Any]",
    runs: Sequence[Run],
    answers: Sequence[pd.DataFrame],
    pictures: dict[str, dict[str, Any]],
    out: Path,
) -> dict[str, Any]:
    name = question["id"]
    path = question["image_path"]
    if path is not None and path not in pictures:
        pictures[path] = picture(path, name, out, runs[0].folder)
    given = []
    for colour, (run, frame) in enumerate(zip(runs, answers, strict=True)):
        if name in frame.index:
            row = frame.loc[name]
            given.append(
                {
                    "run": run.name,
                    "colour": colour,
                    "response": row["response"],
                    "label": row["label"],
                    "probability": row["probabilities"].get(row["label"]),
                    "right": row["label"] == row["answer"],
                }
            )
    asked = {str(key): value for key, value in question.items()}
    return asked | {"picture": pictures.get(path) if path else None, "answers": given}


def picture(path: str, record: str, out: Path, run: Path) -> dict[str, Any]:
    """An image's blur as a ``data:`` URI and a link to the file; the reason instead, where it can't be shown.

    Only images of the run's own data are read (:func:`safervlm.io.trust.may_read`): the records of a folder that
    somebody else made may name any file.

    Args:
        path: the image's file.
        record: the id of the question that it belongs to, for the reason.
        out: the page's file; the link is relative to its folder.
        run: the run folder whose record names the image.
    """
    if not may_read(run, path):
        reason = f"{Path(path).name} is not shown: it lies outside the datasets that the run's configuration names"
        return {"blur": None, "original": None, "reason": reason}
    try:
        blur = blurred(open_image(path, record))
    except RecordError as error:
        return {"blur": None, "original": None, "reason": without_folders(str(error).replace(path, Path(path).name))}
    buffer = io.BytesIO()
    blur.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    # A browser takes `..` out of an address before links are followed: so does abspath.
    link = os.path.relpath(os.path.abspath(path), os.path.abspath(out.parent))  # noqa: PTH100
    return {
        "blur": Markup("data:image/png;base64,") + data,
        "width": blur.width,
        "height": blur.height,
        "original": Markup(quote(os.fsencode(Path(link).as_posix()))),  # noqa: S704 (quoted)
    }


def blurred(image: Image.Image) -> Image.Image:
    """An image of which nothing is left but the broad colours.

    It is first reduced to at most 5 x 5 colours (the means of its fifths: nothing that is smaller survives, however
    cleverly one deconvolves), then enlarged and blurred to look soft. Only pixels are kept: no EXIF data, whose preview
    would show it all.

    Args:
        image: in RGB.
    """
    scale = max(image.size)
    coarse = [max(1, round(GRAIN * side / scale)) for side in image.size]
    large = [max(1, round(THUMBNAIL * side / scale)) for side in image.size]
    few = Image.fromarray(np.asarray(image.convert("RGB").resize((coarse[0], coarse[1]), Image.Resampling.BOX)))
    return few.resize((large[0], large[1]), Image.Resampling.BICUBIC).filter(
        ImageFilter.GaussianBlur(THUMBNAIL / GRAIN / 2)
    )
