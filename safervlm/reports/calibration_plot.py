"""The calibration plot of a report: how often people agree with the judge, by the judge's confidence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safervlm.labelling.summary import with_confidence
from safervlm.protocol import CAPABILITIES
from safervlm.reports.findings import Number
from safervlm.reports.plots import PERCENTAGES, figure, line_of, panel_of
from safervlm.reports.tables import percent
from safervlm.results.corrected import LabelledRun
from safervlm.statistics.calibration import reliability


def calibration_plot(labelled: Mapping[str, LabelledRun], names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the plot: a panel for each run and capability, a line for each bin of the confidence.

    Args:
        labelled: Name -> run, labelled by people.
        names: All runs of the report, in their order.

    Returns:
        The plot for the template; None if no run is labelled.
    """
    panels = []
    for name, run in labelled.items():
        index = names.index(name)
        people = run.rows["people"]
        found = with_confidence(run.rows, dict(zip(run.rows["id"], people, strict=True)), people != "")
        for capability in CAPABILITIES:
            own = found[found["capability"] == capability]
            columns = [own[column].to_numpy(np.float64) for column in ("confidence", "agreed", "weight")]
            lines = []
            for each in reliability(*columns) if len(own) else ():
                number = Number(each.accuracy, each.low, each.high)
                hint = f"{each.labels} labels"
                line = line_of(f"confidence {percent(each.confidence)} %", [(index, name, number)], PERCENTAGES, hint)
                line["dots"] = [{"run": index, "x": PERCENTAGES.place(100 * each.confidence), "y": 9}]
                lines.append(line)
            if lines:
                panels.append(panel_of(f"{name}: {capability.replace('_', ' ')}", lines, PERCENTAGES))
    if not panels:
        return None
    description = (
        "How often people agree with the judge's verdict, in percent with 95 % intervals, by the judge's confidence "
        "(the dot). If the judge is calibrated, the intervals should contain the dots."
    )
    return figure("Calibration of the judge", description, panels, [])
