"""docs/notebook.ipynb runs from the first cell to the last, and is stored without outputs."""

import json
from pathlib import Path

import pandas as pd
import pytest

NOTEBOOK = json.loads((Path(__file__).parent.parent.parent / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_notebook_is_stored_without_outputs() -> None:
    assert len(CELLS) > 5
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_notebook_cells_run(world: Path, tmp_path: Path) -> None:
    (tmp_path / "pictograms").symlink_to(world)
    names: dict[str, object] = {}
    for number, cell in enumerate(CELLS):
        code = "\n".join(line for line in cell.splitlines() if not line.startswith("%"))  # magics are IPython's
        exec(compile(code, f"cell {number}", "exec"), names)
    table = names["table"]
    assert isinstance(table, pd.DataFrame)
    assert {"modality_gap", "accuracy"} <= set(table["measure"])
    assert len(names["responses"]) == 2  # type: ignore[arg-type]
