"""The ranges of numbers that are arguments: checked where they are given, before anything is read."""

import math

from safervlm.errors import ArgumentError


def in_range(
    where: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **values: float | None,
) -> None:
    """Rejects numbers outside a range; NaN and infinities are outside of every one.

    Args:
        where: what the arguments are of (``model``, ``sampling``), for the error.
        least: the smallest number that is allowed.
        above: or the number that they have to be larger than.
        most: the largest number that is allowed.
        below: or the number that they have to be smaller than.
        values: name -> number; None is an argument that isn't given.

    Raises:
        ArgumentError: names the first number outside.
    """
    for name, value in values.items():
        if value is None or (
            math.isfinite(value)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        ):
            continue
        low = f"at least {least}" if least is not None else f"above {above}" if above is not None else ""
        high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
        allowed = " and ".join(filter(None, (low, high))) or "a number"
        finite = "" if math.isfinite(value) or high or math.isnan(value) else ", and not infinite"
        raise ArgumentError(f"{where}{'.' if where else ''}{name}: {allowed}{finite}, got {value}")
