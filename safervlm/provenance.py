"""Provenance of an output: versions of packages and the commit of the source tree."""

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("safervlm", "torch", "lightning", "transformers", "peft", "tokenizers", "datasets", "numpy", "pillow")


@cache  # reading a package's metadata takes milliseconds, and every checkpoint records the versions
def installed_version(package: str) -> str:
    """Returns the version of an installed package.

    Args:
        package: Name of the package.

    Raises:
        PackageNotFoundError: The package is not installed.
    """
    return version(package)


def git_commit() -> str | None:
    """Returns the commit of the source tree that the package runs from; None outside a repository.

    The commit ends in ``-dirty`` if the tree has uncommitted changes.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
