"""Code blocks, commands, links and names of the README and the pages of docs/."""

import re
import shlex
from pathlib import Path

from safervlm.cli.sequence import Typed, recipe_file, typed

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in DOCUMENTS.items()}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def file_of(block: str) -> tuple[str, str] | None:
    """Returns the file name in the comment of a block's first line, and the block; None without such a comment."""
    named = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", block)
    return (named[1], block) if named else None


def commands(text: str) -> list[str]:
    """The shell commands of a document's bash blocks, one per item, without comments."""
    found = []
    for block in blocks(text, "bash"):
        joined = re.sub(r"\s*\\\n\s*", " ", re.sub(r"(\\\n[^\n]*?)  #[^\n]*", r"\1", block))
        for line in joined.splitlines():
            words = shlex.split(line, comments=True)
            parts: list[list[str]] = [[]]
            for word in words:
                if word == "&&":
                    parts.append([])
                elif word != "&":
                    parts[-1].append(word)
            found += [shlex.join(part) for part in parts if part]
    return found


def inline_commands(text: str) -> list[str]:
    """The commands with arguments in sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [
        code
        for code in re.findall(r"`([^`\n]+)`", prose)
        if re.match(r"safervlm (fit|predict|validate|export) -", code)
    ]


def safervlm_commands(command: str) -> list[list[str]]:
    """Returns the arguments of ``safervlm`` in a documented command: called directly, by a command or by torchrun."""
    program, *words = shlex.split(command)
    if program == "safervlm" and words[0] in ("train", "evaluate", "measure"):
        given = typed(words[1:], {"runs": "", "original": "", "out": ""})
        own = [f"--{option}" for option, value in given.options.items() if value]
        return [[words[0], *own], *commands_of(words[0], given)]
    if program == "safervlm":
        return [words]
    if program == "torchrun":
        return [words[words.index("safervlm") + 1 :]]
    return []


def commands_of(name: str, given: Typed) -> list[list[str]]:
    """The commands that ``safervlm train | evaluate | measure`` runs, without the run folders."""
    if name == "train":
        overlay = ["--config", "configs/pictograms/{}.yaml"] if given.options["pictograms"] else []
        return [
            ["fit", "--config", recipe_file(name, "configs"), *(a.replace("{}", name) for a in (*overlay, *given.rest))]
            for name in given.names
        ]
    recipe = ["predict", "--config", f"configs/{name}.yaml"]
    recipe += ["--config", f"configs/pictograms/{name}.yaml"] if given.options["pictograms"] else []
    if name == "evaluate":
        return [[*recipe, *given.rest]]
    return [[*recipe, *given.rest, "--model.vlm", recipe_file(vlm, "configs/vlm")] for vlm in given.names]
