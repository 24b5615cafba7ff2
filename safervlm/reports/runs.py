"""The runs of a report: their scores, names and settings."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.escape import visible, without_folders
from safervlm.io.reading import read_object
from safervlm.io.settings import flat
from safervlm.io.tables import say
from safervlm.protocol import CAPABILITIES
from safervlm.results.measures import NEW_CONCEPTS, THESE_CONCEPTS, UnfinishedAs
from safervlm.results.runs import load_run
from safervlm.results.scores import overall, scores
from safervlm.run import reject_active_run
from safervlm.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """A run with its scores.

    Attributes:
        name: Unique name, used in all tables.
        folder: The run folder.
        frame: Its responses and verdicts, a result of :func:`safervlm.results.runs.load_run`.
        scores: Result of :func:`safervlm.results.scores.scores`.
        manifest: Stage -> dotted key -> value; empty without ``manifest.json``.
        variants: Responses and verdicts to questions that depart from the published protocol.
    """

    name: str
    folder: Path
    frame: pd.DataFrame
    scores: pd.DataFrame
    manifest: dict[str, dict[str, str]]
    variants: pd.DataFrame = field(default_factory=pd.DataFrame)


def load_runs(
    folders: Sequence[Path], unfinished: UnfinishedAs = "apart", tell: Callable[[str], None] = say
) -> list[Run]:
    """Loads and scores runs.

    Args:
        folders: The run folders.
        unfinished: See :func:`safervlm.results.runs.load_run`.
        tell: Receives each message on a run; by default it is printed.

    Raises:
        ArgumentError: A folder is named twice.
        RecordError: A run can't be read, has no responses to the protocol's questions, or is being written by another
            command.
    """
    paths = [Path(folder) for folder in folders]
    runs = []
    for path, name in zip(paths, run_names(paths), strict=True):
        reject_active_run(path)
        every = load_run(path, unfinished, variants=True, tell=tell)
        published = every["variant"] == ""
        frame, variants = (every[rows].reset_index(drop=True) for rows in (published, ~published))
        kinds = frame["capability"].value_counts()
        if others := {str(kind): int(count) for kind, count in kinds.items() if kind not in CAPABILITIES}:
            listed = ", ".join(f"{count} {kind}" for kind, count in others.items())
            tell(f"{name}: {listed} responses aren't in a report but in `safervlm evaluation {path}`")
        table = scores(frame)
        if table.empty:
            raise RecordError(
                f"{path}: it has no responses to the protocol's questions, which a report is about; use `safervlm "
                f"evaluation {path}`"
            )
        runs.append(Run(name, path, frame, table, read_summary(RunFolder(path).manifest), variants))
    return runs


def run_names(paths: Sequence[Path]) -> list[str]:
    """Names runs by their folders, with as many parent folders as are needed to make the names unique.

    Args:
        paths: The run folders.

    Raises:
        ArgumentError: A folder is named twice.
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ArgumentError(f"runs: {', '.join(map(str, paths))}: the same folder is named twice; name each once")
    names: list[str] = []
    for own in parts:
        above = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        names.append(visible("/".join(own[-above:])))
    # Two names may become equal when their control characters are made visible.
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def read_summary(path: Path) -> dict[str, dict[str, str]]:
    """Reads a run's settings and provenance: stage -> dotted key -> value, as texts; empty if there is no manifest.

    Args:
        path: ``manifest.json``.

    Raises:
        RecordError: It can't be read, or has no stages.
    """
    if not path.is_file():
        return {}
    stages = read_object(path, "move it away to report without it", finite=False).get("stages")
    if not isinstance(stages, dict):
        raise RecordError(f"{path}: no manifest, it has no stages; move it away to report without it")
    return {str(stage): {key: _as_text(value) for key, value in flat(entry)} for stage, entry in stages.items()}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def interval_row(table: pd.DataFrame, column: str) -> "pd.Series[Any] | None":
    """Returns the overall row of a column: over new concepts if it has an interval, else over these concepts.

    Args:
        table: Result of :func:`safervlm.results.scores.scores`.
        column: A key of :data:`safervlm.results.measures.COLUMNS`.

    Returns:
        The row; None if the column was not measured.
    """
    new = overall(table, column, NEW_CONCEPTS)
    if new is None or not np.isnan(new["low"]):
        return new
    these = overall(table, column, THESE_CONCEPTS)
    return new if these is None else these


def shown_settings(manifest: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Returns a manifest for display, without absolute paths, which may contain a user's name.

    Args:
        manifest: Result of :func:`read_summary`.
    """
    return {
        without_folders(stage): {without_folders(key): without_folders(value) for key, value in entries.items()}
        for stage, entries in manifest.items()
    }


def settings_of(manifests: Sequence[tuple[str, Mapping[str, Mapping[str, str]]]]) -> dict[str, Any]:
    """Tabulates the settings of runs for display, one row per setting.

    Args:
        manifests: Name of each run, and its manifest, a result of :func:`read_summary`.

    Returns:
        ``differ``: pairs of ``stage: key`` and its value in each run, of the settings in which runs differ; ``rest``:
        the same of everything else that a manifest contains; ``unknown``: names of the runs without a manifest. A value
        is empty if the run doesn't have it.
    """
    entries = [
        {f"{stage}: {key}": value for stage, entry in shown_settings(manifest).items() for key, value in entry.items()}
        for _, manifest in manifests
    ]
    keys = dict.fromkeys(key for entry in entries for key in entry)
    rows = [(key, [entry.get(key, "") for entry in entries]) for key in keys]
    differ = {key: values for key, values in rows if ": settings." in key and len(set(values)) > 1}
    return {
        "differ": [(key.replace("settings.", "", 1), values) for key, values in differ.items()],
        "rest": [(key, values) for key, values in rows if key not in differ],
        "unknown": [name for name, manifest in manifests if not manifest],
    }
