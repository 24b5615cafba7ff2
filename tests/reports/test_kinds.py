"""``safervlm report``: whether run folders contain measurements or evaluations."""

import json
from pathlib import Path

import pytest

from safervlm.records import write_jsonl
from safervlm.reports import kinds

SUITE = {"stages": {"measure": {"settings": {"data": {"sets": {"mme": {}}}}}}}


def folder(name: str, capability: str = "", manifest: object = None) -> None:
    """A run folder with a response of this capability."""
    Path(name).mkdir(parents=True, exist_ok=True)
    if capability:
        write_jsonl(Path(name) / "responses.jsonl", [{"id": "x", "capability": capability}])
    if manifest:
        (Path(name) / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("runs", "kind"),
    [
        (["measured"], "report"),
        (["measured", "both"], "report"),
        (["both"], "report"),
        (["both/evaluation"], "evaluation"),
        (["trained"], "evaluation"),
        (["trained", "both"], "evaluation"),
        (["smid"], "evaluation"),
        (["measured", "suite"], "evaluation"),  # which says that the first one has no evaluation
        (["missing", "suite"], "evaluation"),
        (["missing"], "report"),  # which says that there is nothing
        ([], "report"),
    ],
)
def test_report_type_is_chosen_by_the_run_folders(runs: list[str], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder("measured", "alignment")
    folder("both", "perception")
    folder("both/evaluation", "alignment", SUITE)
    folder("trained/evaluation", "alignment", SUITE)
    folder("suite", "alignment", SUITE)
    folder("smid", "generalisation")
    called = []
    for name in ("report", "evaluation"):
        monkeypatch.setattr(kinds, name, lambda paths, *rest, name=name: called.append((name, paths)))
    kinds.report_runs([Path(run) for run in runs])
    assert called == [(kind, [Path(run) for run in runs])]
