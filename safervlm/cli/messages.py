"""Condenses the parser's error messages to one line: argument, value, and the probably intended argument."""

import difflib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name

import torch
from lightning import LightningDataModule, Trainer

from safervlm.cli.arguments import SECTIONS, SHORT, options
from safervlm.errors import first_line
from safervlm.io.settings import read_part
from safervlm.recipes import CONFIGS
from safervlm.vlm.lora import LoRA
from safervlm.vlm.sampling import Sampling

# Top-level names of a recipe.
TOP = (*SECTIONS, "run", "seed_everything", "ckpt_path", "config")
NOWHERE = "a config"  # used if the file and line of a setting are unknown
# Options of jsonargparse that are never suggested for a misspelt setting.
NO_SETTING = {"help", "print_shtab"}
# Logger of Lightning -> extra of pyproject.toml with the package that it needs.
EXTRAS = {"MLFlowLogger": "mlflow", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}


def one_line(message: str, typed: Sequence[str] = (), known: Sequence[str] = ()) -> str:
    """Condenses a jsonargparse error to one line; its messages repeat themselves over dozens of lines for union types.

    Args:
        message: Message of jsonargparse. It names a nested argument only by its last part.
        typed: Words of the command line, to find the full name of the argument.
        known: Names of arguments, to suggest one for a misspelt name.
    """

    def find(pattern: str) -> str | None:
        found = re.search(pattern, message)
        return found[1] if found else None

    if required := find(r"arguments are required: (.*)"):
        way_out = "give a recipe, for example --config configs/measure.yaml" if "model" in required else "see --help"
        return f"missing: {required}; {way_out}"
    if unknown := find(r"[Uu]nrecognized arguments: *(?:-- )?(\S+)"):
        if not unknown.startswith("-"):
            return f"{unknown!r} is not an argument: arguments begin with two dashes: --config configs/measure.yaml"
        if not unknown.startswith("--"):
            return f"unknown argument {unknown}: arguments begin with two dashes; --help lists all"
        end = unknown.lstrip("-").split("=")[0]  # of a nested argument only the last part
        name = argument(end, typed)
        if before_config(name, typed):
            return f"unknown argument --{name}: a recipe names the classes that have it; write it after --config"
        if meant := corrected_name(name, known):
            return unknown_argument(name, f"; did you mean --{meant}?")
        parts = [part for part in ("data", "model", "trainer") if part in known]  # empty for commands without Lightning
        nested = [f"{part}.{name}" for part in parts if name in parameters(part)]
        if stem := name.removesuffix(end):
            meant = did_you_mean(end, known, stem)
        else:
            meant = did_you_mean(nested[0] if nested else name, [*nested, *known, *(SHORT if parts else ())])
        return unknown_argument(name, meant)
    if unknown := find(r"Option '([^']+)' is not accepted"):
        whole = argument(unknown, typed)
        if whole == unknown:  # it was not typed, so it is from a file
            names = ["class_path", "init_args", *parameters("data"), *parameters("model")]
            sets = f"{source_of(unknown, typed)} sets {unknown!r}, which its class doesn't take"
            if unknown not in names and (close := difflib.get_close_matches(unknown, names, 1, cutoff=0.8)):
                return f"{sets}; did you mean {close[0]}?"
            return (
                f"{sets}: an overlay comes after its own recipe, as "
                "in --config configs/sft.yaml --config configs/pictograms/sft.yaml"
            )
        stem = whole.removesuffix(unknown)
        others = [name for name in parameters(stem.split(".")[0]) if name != unknown]  # only another class accepts it
        meant = did_you_mean(unknown, others, stem)
        return unknown_argument(whole, meant)
    if unknown := find(r"does not accept option '([^']+)'"):
        section, dot, name = unknown.partition(".")
        if dot and section in ("data", "model", "trainer"):
            return (
                f"{source_of(name, typed)} sets {unknown!r}, which {section} doesn't take"
                f"{did_you_mean(name, parameters(section), f'{section}.')}"
            )
        has = f"{source_of(section, typed)} has {section!r}, which no recipe has"
        inner = {part for name in (*known, *parameters("data"), *parameters("model")) for part in name.split(".")}
        close = difflib.get_close_matches(section, TOP, 1) or difflib.get_close_matches(section, inner, 1, cutoff=0.8)
        if close:
            return f"{has}; did you mean {close[0]}?"
        return (
            f"{has}: it is another kind of file; a recipe "
            "has run, model, data, trainer; a part goes where it belongs, as in --model.vlm configs/vlm/NAME.yaml"
        )
    if nothing := find(r"Unexpected config: *(.*)"):
        return f"a config sets {nothing.rstrip(':')!r} and no value for it; give one, or omit it"
    if lacking := find(r"argument (--\S+): expected one argument"):
        without = [name for name, value in options(typed) if value is None or value.startswith("-")]
        full = {f"--{name}": f"--{SHORT.get(name, name)}" for name in without}
        lacking = next((name for name in full if full[name].startswith(lacking)), lacking)
        return f"{lacking} has no value; write {lacking}=VALUE for one that begins with a dash"
    key = find(r"""[Pp]arser key ["']([^"']+)["']""") or ""
    if missing := find(r"File does not exist: '?([^'\n]+)"):
        # Of several files with the same name the one nearest to the top is suggested.
        files = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: -len(path.parts))
        shipped = {path.stem: path.relative_to(CONFIGS.parent) for path in files}
        close = difflib.get_close_matches(Path(missing).stem, shipped, 1)
        hint = f"did you mean {shipped[close[0]]}?" if close else "see configs/"
        return f"--{key}: no file {missing!r}; {hint}"
    if file := find(r"Config file loop detected: (.+) -> "):  # jsonargparse read it again, as the name of a class
        return f"--{argument(key, typed)}: {file}: {about_class(Path(file))}"
    whole_sections = {"LightningModule": "model", "LightningDataModule": "data"}
    section = next((part for kind, part in whole_sections.items() if re.search(rf"\b{kind}\b", message)), "")
    name = f"--{section or argument(key, typed)}: " if key else ""
    got = find(r"(?:Got value|Given value): (.*)")
    if key and not section and got and argument(key, typed) == key:  # it was not typed, so it is from a file
        found = source_of(key, typed, got)
        name = name if found == NOWHERE else f"{found} {key}: "
    if path := find(r"Unexpected import path format: (.*)"):
        return f"{name}{path!r} is not the path of a class, such as safervlm.measure.Measure; correct it"
    if reason := find(r"does not correspond to a subclass of (\w+)"):
        return f"{name}{find(r'Given value: (.*)') or 'the class'} is not a {reason}; name the class_path of one"
    if path := find(r"Problem with given class_path '([^']+)'"):
        reason = find(r"class_path '[^']+':\s+(.*)") or ""
        short = path.rpartition(".")[2]
        if not name:
            name = next((f"--{option}: " for option, value in options(typed) if value in (path, short)), "")
        missing = r"[Rr]equirement|not met|not installed|is available|No module named '(?!safervlm|callbacks)"
        if re.search(missing, reason):
            extra = EXTRAS.get(short)
            way_out = f"pip install 'safervlm[{extra}]'" if extra else "install it"
            return f"{name}{path!r} needs a package that is missing ({reason}); {way_out}"
        return f"{name}no class {path!r} ({reason}); check the spelling"
    if kind := find(r"Not a valid subclass of (\w+)"):
        wrong = find(r"Got value: (.*)") or find(r"Given value: (.*)") or "it"
        return f"{name}{wrong} is not a {kind}; name the class_path of one"
    if (given := find(r"Unable to load config '(.*)'")) is not None:
        return f"{name}settings are needed, got {given!r}; give each of them, or the file that holds them"
    expected = [
        re.sub(r"^a |<class '|'>|typing\.", "", each) for each in re.findall(r"Expected (.+?)(?:\. Got|\n|$)", message)
    ]
    expected = [each for each in dict.fromkeys(expected) if each != "NoneType"]
    if expected and got is not None:
        choices = re.findall(r"'([^']+)'", " ".join(expected))
        close = difflib.get_close_matches(got, choices, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        if any("Sequence" in each for each in expected):
            meant = f"; write a list, '[{got}]'"
        kinds = re.sub(r"Literal\[(.*?)\]", r"\1", " or ".join(expected)).replace("collections.abc.Sequence", "a list")
        return f"{name}expected {kinds}, got {got!r}{meant}"
    return name + " ".join(line.strip(" -") for line in message.splitlines() if line.strip())


def about_class(file: Path) -> str:
    """Describes the error in the class that a settings file names.

    Args:
        file: File in YAML or JSON.
    """
    settings = read_part(file, str(file))
    path = settings.get("class_path") if isinstance(settings, Mapping) else None
    if path is None:
        return "it names no class; give its class_path, as safervlm.vlm.llava.Llava"
    try:
        resolve_name(path)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        return f"no class {path!r} ({first_line(error)}); check the spelling"
    return f"{path!r} is not a class that this argument takes; name another class_path"


def corrected_name(name: str, known: Sequence[str]) -> str | None:
    """Returns a dotted name with each misspelt part replaced by the most similar valid part at its position.

    Args:
        name: Name of an argument, without dashes.
        known: Names of the parser's arguments.

    Returns:
        The corrected name; None if no part is misspelt, or a part has no similar valid one.
    """
    split = [each.split(".") for each in known]
    parts: list[str] = []
    for place, part in enumerate(name.split(".")):
        # The known names may be relative to a class: they may then follow any suffix of the name's beginning.
        starts = range(1 if "data" in known else place + 1)
        sets = [
            {each[len(end)] for each in split if each[: len(end)] == end and len(each) > len(end)}
            for end in (parts[start:] for start in starts)
        ]
        there = next(filter(None, sets), set()) - NO_SETTING
        if parts and parts[0] in SECTIONS and ("data" in known or place == 1):
            there |= set(parameters(parts[0]))
        there |= set(SECTIONS) if not parts and "." in name else set()
        close = [part] if part in there else difflib.get_close_matches(part, sorted(there), 1, cutoff=0.6)
        if not close and parts == name.split(".")[:place]:
            return None
        parts.append(close[0] if close else part)  # a part after a misspelt one may be correct
    meant = ".".join(parts)
    return None if meant == name else meant


def source_of(key: str, typed: Sequence[str], value: str = "") -> str:
    """Returns where a setting comes from: the file and the line, or the argument; ``a config`` if it is not found.

    Args:
        key: Last parts of the setting's name.
        typed: Words of the command line.
        value: Text that the line of the setting contains, as a setting may be in several files.
    """
    setting = re.compile(rf"""[\s{{,'"]*{re.escape(key.partition(".")[0])}['"]?\s*:.*?{re.escape(value)}""")
    for name, given in options(typed):
        if given is None:
            continue
        if given.endswith((".yaml", ".yml", ".json")) and Path(given).is_file():
            lines = Path(given).read_text(encoding="utf-8", errors="replace").splitlines()
            number = next((number for number, line in enumerate(lines, 1) if setting.search(line)), None)
            if number is not None:
                return f"{given}, line {number}:"
        elif given.lstrip()[:1] in ("{", "[") and setting.search(given):
            return f"--{name}:"
    return NOWHERE


def argument(key: str, typed: Sequence[str]) -> str:
    """Returns the full name of an argument of which a message contains only the last parts.

    Args:
        key: Last parts of the argument's name.
        typed: Words of the command line.

    Returns:
        The first typed name that ends in ``key``; ``key`` itself if there is none.
    """
    names = [each.lstrip("-").split("=")[0] for each in typed if each.startswith("--")]
    return next((name for name in names if f".{name}".replace("init_args.", "").endswith(f".{key}")), key)


def parameters(part: str) -> list[str]:
    """Returns the names of all arguments that a section of the configuration may have.

    Args:
        part: ``trainer``, ``data`` or ``model``; for the latter two, those of all imported classes of SaferVLM.
    """
    if part == "trainer":
        return list(inspect.signature(Trainer.__init__).parameters)
    kinds = LightningDataModule if part == "data" else (torch.nn.Module, LoRA, Sampling)
    modules = [module for name, module in sys.modules.items() if name.startswith(("safervlm.", "callbacks."))]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    ours = [value for value in classes if value.__module__.startswith("safervlm.") and issubclass(value, kinds)]
    return sorted({name for value in ours for name in inspect.signature(value.__init__).parameters})


def before_config(name: str, typed: Sequence[str]) -> bool:
    """Returns whether an argument of a class precedes every ``--config``, so that the class was not known yet.

    Args:
        name: The argument, without its dashes.
        typed: Words of the command line.
    """
    order = [option for option, _ in options(typed)]
    place = order.index(name) if name in order else len(order)
    return name.partition(".")[0] in ("data", "model") and "config" in order[place:] and "config" not in order[:place]


def unknown_argument(name: str, meant: str) -> str:
    """Returns the message about an unknown argument.

    Args:
        name: The argument, without its dashes.
        meant: Result of :func:`did_you_mean`.
    """
    return f"unknown argument --{name}{meant or ';'} --help lists all"


def did_you_mean(name: str, names: Sequence[str], stem: str = "") -> str:
    """Returns a suggestion of the probably intended argument; empty if no name is similar.

    Args:
        name: Misspelt name.
        names: Known names.
        stem: Prefix of the suggested name.
    """
    close = difflib.get_close_matches(name, [each for each in names if each.split(".")[-1] not in NO_SETTING], 1)
    return f"; did you mean --{stem}{close[0]}?" if close else ""
