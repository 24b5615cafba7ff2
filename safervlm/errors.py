"""User errors: failures that the user can correct, each reported in one line."""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An expected failure that the user can correct.

    The message is one line: the argument or file (with its line number), the value, and how to correct it. The command
    line prints only the message and exits with code 2. Any other exception is treated as a defect, and its traceback is
    kept.
    """


class ArgumentError(UserError):
    """Raised for an invalid argument; the message begins with the argument's name."""


class RecordError(UserError):
    """Raised for an invalid record of a data file or run folder; the message names the record or file."""


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of an exception's message, or its class name if there is none.

    Args:
        error: Exception, usually raised by a library; its message may span many lines. PyTorch's advice to run the
            contains more than data, advises to load it with the code in it, and is replaced.
    """
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        code = re.search(r"GLOBAL ([\w.]+)|(?:instantiate|function|class) ([\w.]+\.\w+)", str(error))
        return (
            f"it needs the code {code[1] or code[2]}, which is not run" if code else "it contains more than plain data"
        )
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


@contextmanager
def explained(
    what: str, remedy: str, *kinds: type[BaseException], error: type[UserError] = RecordError
) -> Iterator[None]:
    """Context manager that converts a library's exceptions to a one-line error: ``WHAT (REASON); REMEDY``.

    Args:
        what: What is wrong, beginning with the argument or file, for example ``vlm.adapter: 'x' can't be read``.
        remedy: How to correct it.
        *kinds: Exception classes that the library raises for a damaged or missing file.
        error: Class of the error to raise.

    Raises:
        UserError: One of ``kinds`` was raised inside the block. A UserError passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as cause:
        raise error(f"{what} ({first_line(cause)}); {remedy}") from cause
