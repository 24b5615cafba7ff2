"""Per-record failure handling: a record that raises an exception is stored with the reason, and the run continues."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning.pytorch.utilities.exceptions import SIGTERMException

from safervlm.addresses import public_text
from safervlm.errors import RecordError, UserError, first_line

Item = TypeVar("Item")
Made = TypeVar("Made")

# Exceptions that end the run, whichever record was being processed.
ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit, SIGTERMException)


def reason_of(error: BaseException) -> str:
    """Returns the reason why a record failed, in one line of at most 500 characters.

    Args:
        error: Exception raised while processing the record. It need not be an ``Exception``: a panic of the tokenizers
            library derives directly from ``BaseException``.

    Raises:
        BaseException: ``error`` itself, if it concerns the run and not the record: a request to end, or a UserError
            that is not a RecordError, such as an invalid argument.
    """
    if isinstance(error, ENDS) or (isinstance(error, UserError) and not isinstance(error, RecordError)):
        raise error
    line = public_text(first_line(error))
    if not isinstance(error, RecordError) and line != type(error).__name__:
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= 500 else f"{line[:500]} ..."


def in_halves(
    items: Sequence[Item], make: Callable[[Sequence[Item]], Made]
) -> tuple[list[Made], list[tuple[Item, str]]]:
    """Processes all items together; if that raises, splits them in halves recursively to isolate the failing items.

    Args:
        items: Items to process; may be empty.
        make: Function that processes several items at once.

    Returns:
        The results of the successful calls (one if no item failed), and the failed items, each with its reason.

    Raises:
        BaseException: See :func:`reason_of`.
    """
    if not items:
        return [], []
    try:
        return [make(items)], []
    except BaseException as error:
        reason = reason_of(error)
    # Memory held by the failed attempt is released only after the except block.
    if len(items) == 1:
        return [], [(items[0], reason)]
    middle = len(items) // 2
    first, second = in_halves(items[:middle], make), in_halves(items[middle:], make)
    return first[0] + second[0], first[1] + second[1]
