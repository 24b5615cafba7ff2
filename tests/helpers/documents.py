"""Code blocks, commands, links and names of the README and the pages of docs/."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in DOCUMENTS.items()}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def file_of(block: str) -> tuple[str, str] | None:
    """The file name in the comment of a block's first line, and the block; None without such a comment."""
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
    """The arguments of ``safervlm`` in a documented command, called directly or by a script or torchrun."""
    program, *words = shlex.split(command)
    if program == "safervlm":
        return [words]
    if program == "torchrun":
        return [words[words.index("safervlm") + 1 :]]
    if program != "bash":
        return []
    script, *words = words
    before = words[: words.index("--")] if "--" in words else words
    after = words[words.index("--") + 1 :] if "--" in words else []
    if script == "scripts/train.sh":
        return [["fit", "--config", f"configs/{name}.yaml", *(a.replace("{}", name) for a in after)] for name in before]
    if script == "scripts/eval.sh":
        return [["predict", "--config", "configs/evaluate.yaml", *after]]
    if script == "scripts/query_vlms.sh":
        vlms = [vlm if vlm.endswith(".yaml") else f"configs/vlm/{vlm}.yaml" for vlm in before]
        return [["predict", "--config", "configs/measure.yaml", *after, "--model.vlm", vlm] for vlm in vlms]
    return []
