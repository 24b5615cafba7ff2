"""One bad record never ends a run: an exception that it raises becomes its reason, and the others go on."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning.pytorch.utilities.exceptions import SIGTERMException

from safervlm.errors import RecordError, UserError, first_line

Item = TypeVar("Item")
Made = TypeVar("Made")

# These end a run, whatever record they come with.
ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit, SIGTERMException)


def reason_of(error: BaseException) -> str:
    """Why a record failed, in one line.

    Args:
        error: what it raised. Not every one is an ``Exception``: a panic of the tokenizers library is not.

    Raises:
        BaseException: the error itself, where it concerns the run and not the record: a request to end, or an
            argument that can't be used.
    """
    if isinstance(error, ENDS) or (isinstance(error, UserError) and not isinstance(error, RecordError)):
        raise error
    line = first_line(error)
    if not isinstance(error, RecordError) and line != type(error).__name__:
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= 500 else f"{line[:500]} ..."


def in_halves(
    items: Sequence[Item], make: Callable[[Sequence[Item]], Made]
) -> tuple[list[Made], list[tuple[Item, str]]]:
    """Makes something of all items together; in halves where that raises an exception, to find the one to blame.

    Args:
        items: any number of them.
        make: what is done with some of them.

    Returns:
        What was made, mostly one thing; and the items for which nothing was, each with its reason.

    Raises:
        BaseException: see :func:`reason_of`.
    """
    if not items:
        return [], []
    try:
        return [make(items)], []
    except BaseException as error:
        reason = reason_of(error)
    # Only here is what the failed attempt held free again.
    if len(items) == 1:
        return [], [(items[0], reason)]
    middle = len(items) // 2
    first, second = in_halves(items[:middle], make), in_halves(items[middle:], make)
    return first[0] + second[0], first[1] + second[1]
