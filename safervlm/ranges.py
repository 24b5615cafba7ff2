"""Range checks of numeric arguments, made where the arguments are given and before any data is loaded."""

import math

from safervlm.errors import ArgumentError

LARGEST = 2**63 - 1  # the largest integer that torch and NumPy compute with


def in_range(
    where: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **values: float | None,
) -> None:
    """Rejects numbers outside a range; NaN, infinities and integers beyond 64 bits are outside every range.

    Args:
        where: Prefix of the arguments' names for the error message, such as ``model`` or ``sampling``.
        least: Inclusive lower bound.
        above: Exclusive lower bound.
        most: Inclusive upper bound.
        below: Exclusive upper bound.
        **values: Name -> number; None, for an argument that was not given, is accepted.

    Raises:
        ArgumentError: A number is outside the range; the message names the first one.
    """
    for name, value in values.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ArgumentError(
                f"{where}{'.' if where else ''}{name}: an integer of at most {LARGEST}, got {str(value)[:80]}"
            )
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
