"""What a run folder may make a command do: it may be somebody else's.

A run folder holds a configuration, which names addresses, environment variables and classes, and records, which name
image files. A command that reads the folder uses none of them unless its user has repeated or allowed them on the
command line, and reads images only where the run's data lies.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from safervlm.errors import ArgumentError, RecordError, UserError
from safervlm.io.settings import from_yaml, read_settings

CONFIGS = ("predict.yaml", "fit.yaml")
# Packages whose classes a configuration may name.
OURS = ("safervlm", "callbacks", "lightning", "torch", "jsonargparse", "builtins")
# Arguments of our data modules that are paths, whatever they are called.
PATHS = {"folder", "safe_folder", "source", "file", "validation_file", "contexts", "responses", "answers", "cache_dir"}
KEY_VARIABLE = "OPENAI_API_KEY"  # the default of safervlm.vlm.server.client.Server


@dataclass
class Named:
    """What a configuration names outside of this machine's installed packages.

    Attributes:
        addresses: URLs that are contacted.
        variables: environment variables whose value is sent there.
        code: classes that are not ours, and settings that let a model's own code run.
    """

    addresses: set[str] = field(default_factory=set)
    variables: set[str] = field(default_factory=set)
    code: set[str] = field(default_factory=set)


def find_beside_the_shell() -> None:
    """Lets classes in the current folder be named; it is searched last, so that it never takes a package's place."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def read_config(file: Path) -> dict[str, Any]:
    """A configuration as plain data.

    Raises:
        RecordError: it can't be read, is no YAML, or no mapping.
    """
    return read_settings(file, error=RecordError)


def named_in(config: Any, folder: Path) -> Named:
    """What a configuration names, in the files too that it names for parts of itself.

    Args:
        config: plain data, or a part of it.
        folder: where the configuration lies.
    """
    named = Named()
    _search(config, (folder, Path.cwd()), named, set())
    return named


def check_trust(
    file: Path,
    named: Named,
    argument: str,
    trust_config: bool,
    addresses: Sequence[str] | None = None,
    api_key_variable: str | None = None,
) -> None:
    """Refuses what a folder's configuration names and the user has not allowed.

    Args:
        file: the configuration, for the error.
        named: see :func:`named_in`.
        argument: by which the folder was named.
        trust_config: whether classes that are not ours may be imported.
        addresses: that the user has repeated.
        api_key_variable: that the user has repeated.

    Raises:
        ArgumentError: something is not allowed, naming all of it.
    """
    if named.code and not trust_config:
        raise ArgumentError(
            f"{argument}: {file} names code that is not SaferVLM's: {', '.join(sorted(named.code))[:300]}; read it, "
            "then allow it by --trust_config true"
        )
    unasked = named.addresses - {address.rstrip("/") for address in addresses or []}
    unnamed = named.variables - {api_key_variable}
    if unasked or unnamed:
        variable = min(named.variables, default="")
        to_type = f"--addresses '[{', '.join(sorted(named.addresses))}]'" if named.addresses else ""
        to_type += f" --api_key_variable {variable}" if variable else ""
        sent = f", and the environment variable {variable}, whose value would be sent there" if variable else ""
        raise ArgumentError(
            f"{argument}: {file} names the address {', '.join(sorted(named.addresses)) or '(none)'}{sent}; if you "
            f"trust this, repeat it: {to_type.strip()}"
        )


def may_read(run: str | Path, image: str | Path) -> bool:
    """Whether an image that a run's records name belongs to the run's data.

    Args:
        run: the run folder, whose configuration says where its data lies.
        image: ``image_path`` of one of its records.
    """
    path = Path(image).expanduser().resolve()
    return any(path.is_relative_to(folder) for folder in data_folders(Path(run).absolute()))


@lru_cache(maxsize=64)
def data_folders(run: Path) -> tuple[Path, ...]:
    """The folders that a run's configuration names for its data, and the Hub's cache; never one that holds the home.

    Args:
        run: the absolute path of the run folder.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    found = {Path(HF_HUB_CACHE).resolve()}
    for name in CONFIGS:
        if not (run / name).is_file():
            continue
        data = read_config(run / name).get("data", {})
        for text in _paths(data):
            with suppress(OSError, ValueError, RuntimeError):  # no path at all
                path = Path(text).expanduser().resolve(strict=True)
                found.add(path if path.is_dir() else path.parent)
    return tuple(folder for folder in found if not Path.home().resolve().is_relative_to(folder))


def _paths(value: Any, key: str = "") -> Iterator[str]:
    """The texts of a configuration that may be paths: a word such as ``test``, or nothing, is none."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _paths(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, key)
    elif isinstance(value, str) and value.strip() and (key in PATHS or "/" in value):
        yield value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def _search(value: Any, folders: tuple[Path, ...], named: Named, seen: set[Path]) -> None:
    if isinstance(value, Mapping):
        if "addresses" in value:
            named.addresses |= {text.rstrip("/") for text in _texts(value["addresses"])}
            named.variables.add(str(value.get("api_key_variable") or KEY_VARIABLE))
        for key, inner in value.items():
            if key == "trust_remote_code" and inner:
                named.code.add(f"trust_remote_code: {inner}")
            elif key == "class_path" and str(inner).split(".")[0] not in OURS and "." in str(inner):
                named.code.add(str(inner))
            elif str(key).endswith("_variable") and isinstance(inner, str):
                named.variables.add(inner)
            else:
                _search(inner, folders, named, seen)
    elif isinstance(value, list):
        for inner in value:
            _search(inner, folders, named, seen)
    elif isinstance(value, str):
        _search_text(value, folders, named, seen)


def _search_text(text: str, folders: tuple[Path, ...], named: Named, seen: set[Path]) -> None:
    if re.fullmatch(r"\s*\w[\w+.-]*://\S+\s*", text):
        named.addresses.add(text.strip().rstrip("/"))
        return
    top = text.split(".")[0]
    # A class may stand as its path alone, too; a file's name, such as responses.jsonl, looks alike.
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text) and top not in OURS and _importable(top):
        named.code.add(text)
    for folder in folders:
        content = None
        with suppress(OSError, ValueError, RuntimeError):  # no part of a configuration
            file = (folder / text).resolve(strict=True)
            if file not in seen and file.is_file() and file.stat().st_size <= 1_000_000:
                content = file.read_text(encoding="utf-8")
                seen.add(file)
        if content is None:
            continue
        try:
            part = from_yaml(content)
        except UserError as error:  # of two keys the parser would take the one that isn't looked at here
            raise RecordError(f"{file}: {error}") from None
        except (ValueError, RecursionError, yaml.YAMLError):
            continue
        if isinstance(part, Mapping | list):
            _search(part, (file.parent, *folders[-1:]), named, seen)


def _importable(top: str) -> bool:
    if (Path.cwd() / top).is_dir() or (Path.cwd() / f"{top}.py").is_file():
        return True
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):  # __main__ and its like: it is there
        return True
