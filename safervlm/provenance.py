"""What made an output: versions of packages, the commit, flat settings."""

import subprocess
from pathlib import Path

PACKAGES = ("safervlm", "torch", "lightning", "transformers", "peft", "tokenizers", "datasets", "numpy", "pillow")


def git_commit() -> str | None:
    """The commit of the source tree that the package is run from, ``-dirty`` if it was changed; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
