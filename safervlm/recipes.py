"""Location of the shipped recipes, and how the command line refers to them."""

from pathlib import Path

PACKAGE = Path(__file__).parent
# A wheel has the recipes inside the package, a source tree next to it.
CONFIGS = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())


def local_or_shipped(argument: str) -> str:
    """Resolves ``configs/NAME.yaml`` to the shipped recipe if the current folder has no such file.

    Args:
        argument: Word of the command line, ``configs/NAME.yaml`` or ``--option=configs/NAME.yaml``.

    Returns:
        The word with the path of the shipped recipe; unchanged if the file exists here or no recipe has that name.
    """
    name, equals, value = argument.rpartition("=")
    if value.startswith("configs/") and not Path(value).exists():
        shipped = CONFIGS / value.removeprefix("configs/")
        return f"{name}{equals}{shipped}" if shipped.exists() else argument
    return argument
