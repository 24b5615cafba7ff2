"""The shipped recipes: where they are, and how a command line names them."""

from pathlib import Path

PACKAGE = Path(__file__).parent
# In a wheel the recipes lie inside the package, in a source tree beside it.
CONFIGS = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())


def local_or_shipped(argument: str) -> str:
    """``configs/NAME.yaml`` means the shipped recipe where there is no such file here.

    Args:
        argument: a word of the command line, ``configs/NAME.yaml`` or ``--option=configs/NAME.yaml``.
    """
    name, equals, value = argument.rpartition("=")
    if value.startswith("configs/") and not Path(value).exists():
        shipped = CONFIGS / value.removeprefix("configs/")
        return f"{name}{equals}{shipped}" if shipped.exists() else argument
    return argument
