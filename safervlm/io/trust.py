"""Trust in run folders: limits on what a folder's configuration, possibly written by others, can make a command do.

A run folder contains a configuration, which names addresses, environment variables and classes, and records, which name
image files. A command that reads the folder uses none of them unless its user has repeated or allowed them on the
command line, and reads images only from the folders of the run's data.
"""

import codecs
import os
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
from safervlm.io.settings import LARGEST_PART, from_yaml, read_settings
from safervlm.plugins import STARTED_IN
from safervlm.run_folder import RunFolder

# Packages whose classes a configuration may name without the user's consent.
OURS = ("safervlm", "callbacks", "lightning", "torch", "jsonargparse", "builtins")
# Arguments of our data modules whose values are always paths.
PATHS = {"folder", "safe_folder", "source", "file", "validation_file", "contexts", "responses", "answers", "cache_dir"}
KEY_VARIABLE = "OPENAI_API_KEY"  # the default of safervlm.vlm.server.client.Server


@dataclass
class Named:
    """Addresses, environment variables and code that a configuration names.

    Attributes:
        addresses: URLs that are contacted.
        variables: Environment variables whose value is sent there.
        code: Classes of other packages, and settings that allow a model's own code to run.
    """

    addresses: set[str] = field(default_factory=set)
    variables: set[str] = field(default_factory=set)
    code: set[str] = field(default_factory=set)


def allow_imports_from_current_folder() -> None:
    """Allows importing classes from the current folder; it is searched last, so that it shadows no package."""
    for known in (sys.path, STARTED_IN):
        if str(Path.cwd()) not in known:
            known.append(str(Path.cwd()))


def read_config(file: Path) -> dict[str, Any]:
    """Reads a configuration as plain data.

    Args:
        file: YAML file.

    Raises:
        RecordError: The file can't be read, is not YAML, or not a mapping.
    """
    return read_settings(file, error=RecordError)


def named_in(config: Any, folder: Path) -> Named:
    """Finds the addresses, variables and code that a configuration names, also in the files that it includes.

    Args:
        config: Configuration as plain data, or a part of it.
        folder: Folder of the configuration, to resolve relative paths.

    Returns:
        Its addresses, environment variables and code.

    Raises:
        RecordError: An included file has a duplicate key or too many aliases.
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
    """Rejects addresses, variables and code of a folder's configuration that the user has not allowed.

    Args:
        file: Configuration file, for the error message.
        named: Addresses, variables and code that it names; see :func:`named_in`.
        argument: Argument that names the folder, for the error message.
        trust_config: Whether classes of other packages may be imported.
        addresses: Addresses that the user has repeated.
        api_key_variable: Environment variable that the user has repeated.

    Raises:
        ArgumentError: Something is not allowed; the message names all of it.
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
    """Returns whether an image that a run's records name belongs to the run's data.

    Args:
        run: Run folder, whose configuration names the locations of its data.
        image: ``image_path`` of one of its records.
    """
    path = Path(image).expanduser().resolve()
    return any(path.is_relative_to(folder) for folder in data_folders(Path(run).absolute()))


@lru_cache(maxsize=64)
def data_folders(run: Path) -> tuple[Path, ...]:
    """Returns the folders that a run's configuration names for its data, and the Hub's cache.

    A folder that contains the user's home is excluded.

    Args:
        run: Absolute path of the run folder.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    found = {Path(HF_HUB_CACHE).resolve()}
    for config in (RunFolder(run).predict_config, RunFolder(run).fit_config):
        if not config.is_file():
            continue
        data = read_config(config).get("data", {})
        for text in _paths(data):
            with suppress(OSError, ValueError, RuntimeError):  # the text is not a path
                path = Path(text).expanduser().resolve(strict=True)
                found.add(path if path.is_dir() else path.parent)
    return tuple(folder for folder in found if not Path.home().resolve().is_relative_to(folder))


def _paths(value: Any, key: str = "") -> Iterator[str]:
    """Iterates over the texts of a configuration that may be paths: those of :data:`PATHS`, or with a slash."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _paths(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, key)
    elif isinstance(value, str) and value.strip() and (key in PATHS or "/" in value or os.sep in value):
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


def _search(value: Any, folders: tuple[Path, ...], named: Named, seen: set[Path], may_be_data: bool = False) -> None:
    if isinstance(value, Mapping):
        # The parser also takes dotted keys, such as ``init_args.addresses``.
        last = [(str(key).rpartition(".")[2], inner) for key, inner in value.items()]
        addresses = [inner for key, inner in last if key == "addresses"]
        if addresses:
            named.addresses |= {text.rstrip("/") for text in _texts(addresses)}
            given = [str(inner) for key, inner in last if key == "api_key_variable" and inner]
            named.variables |= set(given or [KEY_VARIABLE])
        for key, inner in last:
            if key == "trust_remote_code" and inner:
                named.code.add(f"trust_remote_code: {inner}")
            elif key == "class_path" and str(inner).split(".")[0] not in OURS and "." in str(inner):
                named.code.add(str(inner))
            elif key.endswith("_variable") and isinstance(inner, str):
                named.variables.add(inner)
            else:
                _search(inner, folders, named, seen, may_be_data=key in PATHS)
    elif isinstance(value, list):
        for inner in value:
            _search(inner, folders, named, seen, may_be_data)
    elif isinstance(value, str):
        _search_text(value, folders, named, seen, may_be_data)


def _search_text(text: str, folders: tuple[Path, ...], named: Named, seen: set[Path], may_be_data: bool) -> None:
    if re.fullmatch(r"\s*\w[\w+.-]*://\S+\s*", text):
        named.addresses.add(text.strip().rstrip("/"))
        return
    top = text.split(".")[0]
    # A class may also be given by its path alone; a file's name, such as responses.jsonl, has the same form.
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text) and top not in OURS and _importable(top):
        named.code.add(text)
    for folder in folders:
        content = None
        with suppress(OSError, ValueError, RuntimeError):  # not a configuration file
            file = (folder / text).resolve(strict=True)
            if file not in seen and file.is_file():
                with file.open("rb") as opened:
                    beginning = opened.read(LARGEST_PART + 1)
                large = len(beginning) > LARGEST_PART
                # The beginning of a large text may end within a character; weights are not text.
                content = codecs.getincrementaldecoder("utf-8-sig")().decode(beginning, final=not large)
        if content is None or "\0" in content:
            continue
        if large:
            if may_be_data:
                continue
            raise RecordError(
                f"{file}: a part of a configuration has at most {LARGEST_PART} bytes, as it is searched for addresses; "
                "move it away, or name another folder"
            )
        seen.add(file)
        try:
            part = from_yaml(content)
        except UserError as error:  # another parser may use the unchecked value of a duplicate key
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
    except (ImportError, ValueError):  # modules without a spec, such as __main__, exist
        return True
