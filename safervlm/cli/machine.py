"""What ``safervlm doctor`` checks of this machine: Python, packages, GPUs, disk space and the Hub's token."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One result of the checks.

    Attributes:
        state: ``error`` if a run can't succeed.
        what: What was checked.
        found: Result, with the remedy if there is a problem.
    """

    state: Literal["ok", "warning", "error"]
    what: str
    found: str


def machine() -> Iterator[Finding]:
    """Checks Python, packages, GPUs and disk space."""
    yield Finding("ok", "Python", sys.version.split()[0])
    for text in requires("safervlm") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            yield Finding("error", requirement.name, f"is missing; pip install '{requirement}'")
            continue
        if requirement.specifier.contains(there, prereleases=True):
            yield Finding("ok", requirement.name, there)
        else:
            yield Finding(
                "error", requirement.name, f"{there}, {requirement.specifier} is needed; pip install '{requirement}'"
            )
    if not torch.cuda.is_available():
        yield Finding("warning", "GPU", "none: the pictograms need none, a 7B model does; see nvidia-smi")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        bf16 = "" if torch.cuda.get_device_capability(number) >= (8, 0) else ", no bfloat16: use vlm.dtype float32"
        found = f"{torch.cuda.get_device_name(number)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free{bf16}"
        yield Finding("warning" if bf16 or free < total / 2 else "ok", f"GPU {number}", found)
    for what, folder in (("disk here", Path.cwd()), ("disk of the Hub's cache", Path(HF_HUB_CACHE))):
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(place).free
        state: Literal["ok", "warning"] = "ok" if free > 20 * GIB else "warning"
        more = "" if state == "ok" else "; a 7B takes 14 GiB"
        yield Finding(state, what, f"{free / GIB:.0f} GiB free in {place}{more}")


def hub_token() -> Iterator[Finding]:
    """Checks whether a token of the Hub is stored; the token is never shown."""
    if get_token():
        yield Finding("ok", "Hub token", "there is one")
    else:
        yield Finding("warning", "Hub token", "none; UnsafeConcepts and some models are gated: hf auth login")


def size_text(size: int) -> str:
    """Returns a number of bytes in GiB, or in MiB if it is less than one GiB.

    Args:
        size: Number of bytes.
    """
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
