"""Example responses for a report, with blurred images."""

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

EXAMPLES = {"alignment": 2, "alignment_text_only": 1, "perception": 1}  # images per category on the page

GRAIN = 5  # colours along the longer side of a blurred image
THUMBNAIL = 160  # pixels along its longer side


# --- examples ---------------------------------------------------------------------------------------------------------


def examples(runs: Sequence[Run], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Selects questions with every run's response, by capability.

    The selection depends only on the question's id, not on the responses, so it is the same in all reports. Questions
    that every run answered come first.

    Args:
        runs: The runs; questions are selected from the first one's.
        out: The page's file, from which images are linked.

    Returns:
        Capability -> cards for the template, each with the question, its image and the responses.
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
    """Returns an image's blur as a ``data:`` URI with a link to the file, or the reason why it can't be shown.

    Only images of the run's configured datasets are read (:func:`safervlm.io.trust.may_read`): the records of a folder
    from someone else may name any file.

    Args:
        path: The image's file.
        record: The id of its question, for error messages.
        out: The page's file; the link is relative to its folder.
        run: The run folder whose record names the image.

    Returns:
        ``blur``, ``width``, ``height`` (pixels of the blur) and ``original`` (the quoted link); or ``blur`` and
        ``original`` None with ``reason``.
    """
    if not may_read(run, path):
        reason = f"{Path(path).name} is not shown: it lies outside the datasets that the run's configuration names"
        return {"blur": None, "original": None, "reason": reason}
    try:
        # Resolve `..` without following links, as a browser does: abspath, not resolve.
        link = os.path.relpath(os.path.abspath(path), os.path.abspath(out.parent))  # noqa: PTH100
    except ValueError:
        reason = f"{Path(path).name} is not shown: it lies on another drive than the page"
        return {"blur": None, "original": None, "reason": reason}
    try:
        blur = blurred(open_image(path, record))
    except RecordError as error:
        return {"blur": None, "original": None, "reason": without_folders(str(error).replace(path, Path(path).name))}
    buffer = io.BytesIO()
    blur.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {
        "blur": Markup("data:image/png;base64,") + data,
        "width": blur.width,
        "height": blur.height,
        "original": Markup(quote(os.fsencode(Path(link).as_posix()))),  # noqa: S704 (quoted)
    }


def blurred(image: Image.Image) -> Image.Image:
    """Reduces an image to its coarse colours.

    It is first averaged to at most 5 x 5 colours, so that all smaller structures are lost and no deconvolution can
    recover them, then enlarged and blurred to look smooth. Only pixels are kept, no EXIF data, which may contain a
    preview of the image.

    Args:
        image: Any mode; it is converted to RGB.

    Returns:
        An RGB image whose longer side has :data:`THUMBNAIL` pixels.
    """
    scale = max(image.size)
    coarse = [max(1, round(GRAIN * side / scale)) for side in image.size]
    large = [max(1, round(THUMBNAIL * side / scale)) for side in image.size]
    few = Image.fromarray(np.asarray(image.convert("RGB").resize((coarse[0], coarse[1]), Image.Resampling.BOX)))
    return few.resize((large[0], large[1]), Image.Resampling.BICUBIC).filter(
        ImageFilter.GaussianBlur(THUMBNAIL / GRAIN / 2)
    )
