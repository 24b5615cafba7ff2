"""Prints the oldest version of each dependency that pyproject.toml allows, as requirements of pip.

torch is left out: its older releases bring several GB of CUDA packages.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["api"], *extras["remote"], *extras["completion"]]:
    if not requirement.startswith("torch>="):
        print(re.sub(r">=([0-9.]+).*", r"==\1", requirement))
