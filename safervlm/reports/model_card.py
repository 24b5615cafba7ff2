"""The model card of a merged model: README.md with the metadata of the Hub at its beginning.

It is meant to be published with the weights, so absolute paths, which may contain a user's name, are shortened.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers.utils.hub import cached_file

from safervlm.errors import RecordError, UserError
from safervlm.io.escape import visible, without_folders
from safervlm.io.settings import from_yaml
from safervlm.io.tables import JUDGE_NOTE, say
from safervlm.io.trust import read_config
from safervlm.reports.evaluated import folder_of
from safervlm.results.suite import Evaluation, load_suite, stage_settings
from safervlm.results.suite_columns import DIVERSITIES, Column, columns
from safervlm.results.suite_estimates import evaluate
from safervlm.run import read_manifest, reject_active_run
from safervlm.run_folder import RunFolder
from safervlm.vlm.adapters import adapter_fingerprint

HEADINGS = ("group", "measure", "value", "95 % interval", "sampling unit", "n", "thinking unfinished", "judge")


def model_card(run: Path, base: str, revision: str | None, dtype: str, rounding: str) -> str:
    """Returns the text of the card: a description of the model, its scores with their judges, and its training.

    Args:
        run: The folder of the training; an evaluation of its adapter, in it or in ``evaluation``, provides the scores.
        base: Folder of the base model, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.
        dtype: Data type of the merged weights.
        rounding: Effect of merging, in one or more sentences.
    """
    licence, name = licence_of(base, revision), without_folders(base)
    head = {"base_model": name, "library_name": "transformers", "license": licence or "other"}
    named = licence or "see the base model's card and the files beside this one"
    settings = {key: stage["settings"] for key, stage in read_manifest(run)["stages"].items() if "settings" in stage}
    parts = [
        f"---\n{yaml.safe_dump(head)}---\n\n# {_cell(run.resolve().name)}, merged\n",
        f"`{name}` with the adapter of a training by SaferVLM in its weights (`safervlm merge`), in "
        f"{dtype}.\n\nBase model's licence: {named}.\n",
        f"{rounding}\n",
        _scores(run),
    ]
    for stage, trained in settings.items():
        if "lora" not in trained.get("model", {}):
            continue  # a measurement in the same folder, or its ratings
        model = {key: value for key, value in trained["model"].items() if key != "judge"}
        parts.append(f"## Objective: {stage}\n\n{_block(model)}")
        if judge := trained["model"].get("judge"):
            parts.append(
                f"## Judge of the reward\n\nFingerprint: `{judge}`. Scores by the same judge may be better than by "
                "another one, because the model was trained on its verdicts.\n"
            )
        parts.append(f"## Data\n\n{_block(trained['data'])}")
    return "\n".join(parts)


def licence_of(model: str, revision: str | None) -> str | None:
    """Returns the licence in the metadata of a model's card; None if it names none or there is no card.

    Args:
        model: Folder of the model, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.
    """
    card = Path(model, "README.md")
    if not Path(model).is_dir():
        try:
            card = Path(cached_file(model, "README.md", revision=revision) or "")
        except OSError:  # there is no card, or no network
            return None
    head = card.read_text(encoding="utf-8", errors="replace").split("---", 2) if card.is_file() else []
    if len(head) < 3 or head[0].strip():
        return None
    try:
        named = from_yaml(head[1])
    except (UserError, yaml.YAMLError, RecursionError):
        return None
    return str(named["license"]) if isinstance(named, dict) and named.get("license") else None


def _scores(run: Path) -> str:
    """Returns the table of the run's evaluation, or the reason why there is none."""
    try:
        return _table(run)
    except UserError as error:
        reason = without_folders(str(error))
        say(f"{run}: the model card has no scores: {reason}")
        return f"## Scores\n\nNone: {_cell(reason)}.\n"


def _table(run: Path) -> str:
    folder = folder_of(run)
    if folder != run:  # this command has locked the run itself
        reject_active_run(folder)
    measured = stage_settings(folder, "measure").get("model", {})
    vlm = measured.get("vlm", {})
    if (vlm.get("adapter") or {}).get("sha256") != adapter_fingerprint(str(RunFolder(run).adapter)):
        raise RecordError(
            f"{folder}: the evaluation is of another model than this adapter's; evaluate again: safervlm evaluate {run}"
        )
    evaluation = load_suite(folder, run.name)
    wanted = columns([evaluation])
    judges = {column.key: _judges(evaluation, column) for column in wanted}
    sampling = ", ".join(f"{key} {value}" for key, value in measured.get("sampling", {}).items())
    lines = [
        f"## Scores\n\nOf base plus adapter in {vlm.get('dtype')}, before merging ({sampling}).\n",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
    ]
    for row in evaluate(evaluation, wanted).to_dict("records"):
        if not row["n"] + row["thinking_unfinished"]:
            continue  # its responses were not rated
        value = "none" if np.isnan(row["value"]) else f"{row['value']:.4g}"
        interval = "none" if np.isnan(row["low"]) else f"[{row['low']:.4g}, {row['high']:.4g}]"
        cells = [row["group"], row["heading"], value, interval, row["sampling_unit"], row["n"]]
        cells += [row["thinking_unfinished"], judges[row["column"]]]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, f"\n{JUDGE_NOTE} {_checkpoints(folder)}\n"])


def _judges(evaluation: Evaluation, column: Column) -> str:
    """Returns what classified or rated the responses of a column: fingerprints, or the names of rules."""
    if column.measure in DIVERSITIES:
        return "none"
    part = column.part(evaluation.ratings if column.measure == "ratio" else evaluation.answers)
    return ", ".join(sorted(set(part["judge"]))) or "none"


def _checkpoints(folder: Path) -> str:
    """Returns a sentence on the judges' checkpoints that the evaluation's configuration names; empty for none."""
    file = RunFolder(folder).predict_config
    config = read_config(file) if file.is_file() else {}
    found: dict[str, str] = {}

    def search(value: Any, name: str) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("checkpoint"), str):
                found.setdefault(name, value["checkpoint"])
            for key, inner in value.items():
                search(inner, name if key in ("class_path", "init_args") else key)
        elif isinstance(value, list):
            for inner in value:
                search(inner, name)

    search((config.get("trainer") or {}).get("callbacks"), "")
    named = ", ".join(f"{name} `{without_folders(checkpoint)}`" for name, checkpoint in found.items())
    return f"Hexadecimal judges are fingerprints of classifiers; checkpoints: {named}." if named else ""


def _cell(value: Any) -> str:
    return visible(str(value)).replace("|", "\\|")


def _block(settings: Any) -> str:
    return f"```yaml\n{yaml.safe_dump(_shortened(settings), sort_keys=False)}```\n"


def _shortened(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _shortened(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_shortened(value) for value in settings]
    return without_folders(settings) if isinstance(settings, str) else settings
