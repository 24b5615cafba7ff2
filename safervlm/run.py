"""Run directory layout and manifest.

``manifest.json`` has one entry per stage that ran in the folder, keyed by the lower-case name of its module
(``measure``, ``panel``, ``sft``): ``settings``, which determine the result, and ``provenance``, which documents how it
was made. A stage that runs again in the folder must have the same settings. It then resumes, and ``continued`` records
the time, the command, and each changed item of the provenance. A training may be longer with ``--extend``; ``extended``
records its length before and after.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safervlm.errors import RecordError
from safervlm.io.caches import LOCK, TEMPORARY, remove_leftovers
from safervlm.io.files import write_text_atomically
from safervlm.io.locks import Lock, acquire, holder
from safervlm.io.reading import json_text, read_object
from safervlm.io.settings import flat
from safervlm.io.sharded import remove_replaced
from safervlm.legacy import with_todays_names
from safervlm.run_folder import RunFolder

MOMENT = 0.5  # seconds to wait for a lock, as commands that read a folder hold it for a moment
BUDGET = ("trainer.max_epochs", "trainer.max_steps")  # settings that --extend may change
NOISE = "model.noise"  # setting: version of the sampling noise
OLD_NAMES = ("manifest", "responses", "responses-failed", "verdicts", "ratings", "scores", "labels", "verify", "report")


class SettingsDifferError(RecordError):
    """Raised if a run folder was made with other settings."""


def read_manifest(run: Path) -> dict[str, Any]:
    """Reads the manifest of a run folder; returns an empty manifest if there is none.

    Args:
        run: Run folder.

    Raises:
        RecordError: The file is damaged or not a manifest.
    """
    path = RunFolder(run).manifest
    if not path.exists():
        return {"stages": {}}
    manifest = read_object(path, "restore it, or name another run folder", finite=False)
    stages = manifest.get("stages")
    if not isinstance(stages, dict) or not all(map(is_stage, stages.values())):
        raise RecordError(f"{path}: damaged (no object with stages); restore it, or name another run folder")
    return manifest


def is_stage(entry: Any) -> bool:
    """Returns whether a manifest's entry of a stage has the required parts with the correct types.

    Args:
        entry: JSON value.
    """
    if not isinstance(entry, dict):
        return False
    settings, continued = entry.get("settings", {}), entry.get("continued", [])
    if not isinstance(settings, dict) or not isinstance(continued, list):
        return False
    model, data = settings.get("model", {}), settings.get("data", {})
    objects = [model, data, entry.get("provenance", {}), *continued]
    objects += [data.get("sets", {})] if isinstance(data, dict) else []
    return all(isinstance(each, dict) for each in objects)


# Descriptions of a split's records, see :meth:`safervlm.data.module.SaferData.describe`.
OF_RECORDS = (".examples", ".ids", ".content", ".images")


def check_settings(run: Path, stage: str, settings: Mapping[str, Any], extend: bool = False) -> dict[str, list[Any]]:
    """Rejects a run folder whose results were made with other settings.

    A folder without results is accepted. These differences are ignored: the images, if questions failed, because
    replacing an image is the remedy that a failure names; datasets of a :class:`safervlm.data.suite.Suite` that are not
    both asked now and asked before; and the location of an adapter, as its weights identify it.

    Args:
        run: Run folder.
        stage: Name of the stage.
        settings: Settings of the stage now; values must be serialisable as JSON.
        extend: Whether the training may be longer now.

    Returns:
        The settings of the training's length that ``extend`` allowed to change, each with its value before and now.

    Raises:
        SettingsDifferError: Settings differ; the message names at most five.
        RecordError: The manifest is damaged, or is missing although there are results.
    """
    files = RunFolder(run)
    require_manifest(files, stage)
    there = read_manifest(run)["stages"].get(stage)
    if there is None or not has_results(run):
        return {}
    # Settings are compared after a round trip through JSON, which turns tuples into lists.
    if not isinstance(there.get("settings"), dict):
        raise RecordError(
            f"{files.manifest}: damaged ({stage} has no settings); restore it, or name another run folder"
        )
    before, now = (
        with_todays_names(dict(flat(each))) for each in (there["settings"], json.loads(json.dumps(settings)))
    )
    if "trainer" not in settings:  # validation of a fitted module: the trainer's settings are not compared
        before = {key: value for key, value in before.items() if not key.startswith("trainer.")}
    both = set.intersection(
        *({key.split(".")[2] for key in each if key.startswith("data.sets.")} for each in (before, now))
    )
    differing = [
        key
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and not (key.startswith("data.sets.") and key.split(".")[2] not in both)
        and not key.endswith(".adapter.folder")
        and not (key.startswith("data.") and key.endswith(".images") and files.failed.exists())
    ]
    longer = {key: [before.get(key), now.get(key)] for key in differing if key in BUDGET} if extend else {}
    for key, (old, new) in longer.items():
        if old not in (None, -1) and new not in (None, -1) and new < old:
            raise SettingsDifferError(f"--extend: {key}: {old} there, {new} now; give more than {old}")
    differing = [key for key in differing if key not in longer]
    require_same_noise(run, stage, before.get(NOISE), now.get(NOISE), "--run")
    if "data.limit" in differing:  # it determines which records there are
        differing = [key for key in differing if not key.endswith(OF_RECORDS)]
    if differing:
        differing.sort(key=lambda key: key.endswith((".ids", ".content", ".images", ".sha256")))  # hashes last
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        remedy = "add --extend to train on, " if set(differing) <= set(BUDGET) else ""
        raise SettingsDifferError(
            f"--run: {run} holds results of {stage} made with other settings: {shown}{more}; {remedy}name another "
            "folder, or delete it"
        )
    return longer


def require_same_noise(run: Path, stage: str, before: int | None, now: int | None, argument: str) -> None:
    """Rejects a run whose responses were sampled with the noise of another version: a seed then has other responses.

    Greedy responses and those of servers have no noise: a run that now has none is not rejected here, as its other
    settings differ.

    Args:
        run: Run folder.
        stage: Name of the stage.
        before: Version of the noise (``safervlm.vlm.noise.NOISE``) in the manifest; None for none.
        now: Version of the noise now; None for none.
        argument: Argument that names the run, for the message.

    Raises:
        SettingsDifferError: The versions differ.
    """
    if now is not None and before != now:
        raise SettingsDifferError(
            f"{argument}: {run} holds results of {stage} with the sampling noise of another version of SaferVLM "
            f"({NOISE}: {before} there, {now} now); use that version, or another folder"
        )


def require_same_weights(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Rejects a measurement whose base weights or adapter have changed since: an adapter may have been trained further.

    Args:
        run: Run folder of the measurement.
        before: Settings of the model in the manifest. Fingerprints that are unknown are not compared.
        now: Settings of the model as it would be loaded now.

    Raises:
        SettingsDifferError: A fingerprint of weights differs.
    """
    there, here = dict(flat(before)), dict(flat(now))
    for key in there.keys() & here.keys():
        if key.endswith((".weights", ".sha256")) and None not in (there[key], here[key]) and there[key] != here[key]:
            raise SettingsDifferError(
                f"run: the responses of {run} are of other weights (model.{key}: {there[key]} there, {here[key]} now); "
                "restore them, or measure again in another folder"
            )


def require_manifest(files: RunFolder, stage: str) -> None:
    """Rejects a folder with results of unknown settings, or with a user's files of the same names.

    Args:
        files: Files of the run.
        stage: Name of the stage. Responses without a manifest may be judged, but not continued. Checkpoints have their
            settings in their seals.

    Raises:
        RecordError: There is no manifest, but there is a file that it would describe.
    """
    if files.manifest.exists():
        return
    made = [files.scores, files.metrics, files.rollouts]
    made += [files.responses, files.shards] if stage == "measure" else []
    if there := [file for file in made if file.exists()]:
        raise RecordError(
            f"--run: {there[0]} is there and {files.manifest.name} is not, so that its settings are unknown; restore "
            "the manifest, name another folder, or move the file away"
        )


def has_results(run: Path) -> bool:
    """Returns whether a run folder contains results, and not only the settings that it was started with.

    Args:
        run: Run folder.
    """
    return any(map(is_result, run.rglob("*")))


def is_result(path: Path) -> bool:
    """Returns whether a file of a run folder is a result: non-empty, and no settings, manifest, lock or temporary file.

    Args:
        path: File or folder; a folder is not a result.
    """
    if (
        path.suffix == ".yaml"
        or path.name in (RunFolder("").manifest.name, RunFolder("").traceback.name, LOCK)
        or path.name.startswith(TEMPORARY)
    ):
        return False
    return path.is_file() and path.stat().st_size > 0


def lock(run: Path) -> Lock | None:
    """Locks a run folder against other commands until the returned lock is closed or the process dies.

    Unfinished files of commands that died are removed.

    Args:
        run: Run folder.

    Returns:
        The lock; None if its file can't be opened for writing.

    Raises:
        RecordError: Another process holds the lock.
    """
    try:
        held = acquire(run / LOCK, create=True, wait=MOMENT)
    except BlockingIOError:
        raise RecordError(
            f"--run: {_lock_holder_text(run)} is running in {run}; wait until it ends, or name another folder"
        ) from None
    except OSError:
        return None  # writing the results raises its own error
    with suppress(OSError):  # on a full disk, writing the results raises its own error
        held.write_process()
    remove_unfinished(run)
    return held


def _lock_holder_text(run: Path) -> str:
    """Returns a description of the command that holds the lock of a run, with its process id, for the error message."""
    process = holder(run / LOCK)
    return "another command" if process is None else f"another command (process {process})"


def reject_active_run(run: Path) -> None:
    """Rejects reading a run folder while another command writes to it, as its files may be inconsistent.

    Any number of commands may read at the same time. No write permission is needed.

    Args:
        run: Run folder.

    Raises:
        RecordError: Another process holds the lock.
    """
    try:
        acquire(run / LOCK, wait=MOMENT).close()
    except BlockingIOError:
        raise RecordError(
            f"{run}: {_lock_holder_text(run)} is running in it; wait until it ends, or copy the folder"
        ) from None
    except OSError:
        return  # the folder was never locked, or its lock can't be read


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Context manager that locks a run folder against other commands (see :func:`lock`).

    Args:
        run: Run folder.

    Raises:
        RecordError: Another process holds the lock.
    """
    held = lock(run)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def remove_unfinished(run: Path) -> None:
    """Removes the unfinished files that dead commands left in a run folder, and nothing else.

    Args:
        run: Run folder, which must be locked.
    """
    files = RunFolder(run)
    written = (run, files.checkpoints, files.adapter, files.judge, files.first_implementation)
    deeper = (*files.shards.glob("*"), *files.first_implementation.glob("*/*"))
    for folder in (*written, *deeper):
        remove_leftovers(folder)
    remove_replaced(files.last_checkpoint)
    # Names of the temporary files of older versions.
    pattern = re.compile(rf"\.({'|'.join(OLD_NAMES)})\.\d+\.(jsonl?|csv|xlsx|tex|html)")
    for file in run.glob(".*.*"):
        if pattern.fullmatch(file.name) and file.is_file():
            with suppress(OSError):
                file.unlink()


def write_stage(run: Path, stage: str, **entry: Any) -> None:
    """Merges values into a stage's entry of the manifest.

    Args:
        run: Run folder.
        stage: Name of the stage.
        **entry: Values to set, such as ``settings`` or ``finished``.

    Raises:
        RecordError: The existing manifest is damaged.
        OSError: The manifest can't be written.
    """
    manifest = read_manifest(run)
    manifest["stages"][stage] = manifest["stages"].get(stage, {}) | entry
    text = json_text(manifest, indent=2, finite=False) + "\n"
    write_text_atomically(RunFolder(run).manifest, text)


def finished(run: Path, stage: str) -> bool:
    """Returns whether a stage of a run is complete.

    Args:
        run: Run folder.
        stage: Name of the stage.
    """
    return bool(read_manifest(run)["stages"].get(stage, {}).get("finished"))
