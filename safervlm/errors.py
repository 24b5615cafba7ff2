"""Expected failures: what the user can correct, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An expected failure.

    The message is one line: the argument or file (with its line number), the value, and how to correct it. The command
    line prints the message alone and ends with exit code 2; any other exception is a defect, and its traceback is kept.
    """


class ArgumentError(UserError):
    """An argument can't be used; the message begins with the argument's name."""


class RecordError(UserError):
    """A record of a data file or run folder can't be used; the message names the record or file."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not empty, or else the name of its class.

    Args:
        error: of a library, which may explain itself over a page.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


@contextmanager
def explained(
    what: str, remedy: str, *kinds: type[BaseException], error: type[UserError] = RecordError
) -> Iterator[None]:
    """Within it, a library's exception becomes a line: ``WHAT (REASON); REMEDY``.

    Args:
        what: is wrong, beginning with the argument or file, for example ``vlm.adapter: 'x' can't be read``.
        remedy: how to correct it.
        kinds: the exceptions that the library raises for a damaged or missing file.
        error: the class of the line.

    Raises:
        UserError: one of the exceptions was raised. A UserError passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as cause:
        raise error(f"{what} ({first_line(cause)}); {remedy}") from cause
