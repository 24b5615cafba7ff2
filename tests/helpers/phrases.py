"""The 44 phrases of a private dialect that were replaced by the terms of the field."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PLACES = ("safervlm", "callbacks", "scripts", "configs", "docs", "README.md", "mkdocs.yml", "pyproject.toml")
ENDINGS = {".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".html", ".ipynb"}
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for place in PLACES
    for path in ([ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*")))
    if path.suffix in ENDINGS and "site" not in path.relative_to(ROOT).parts
}

# Regular expressions of replaced phrases and names -> their replacements.
PHRASES = {
    r"Says, from a batch": "base class of training objectives",
    r"a record of the data has to have": "completions each example must provide",
    r"Refuses another objective": "validates that examples carry the expected number of completions",
    r"The trained weights alone": "only trainable parameters",
    r"The same of held-out": "validation loss",
    r"Takes (it|them) back": "restores",
    r"is content when": "can be minimised while",
    r"\bprice\b": "KL coefficient, penalty",
    r"\broom (of|for) the policy": "clipping range",
    r"is gone through": "optimisation epochs per rollout",
    r"Steps? \d to \d\.": "what the steps do",
    r"what stands elsewhere": "values outside the mask",
    r"whole response earns": "sequence-level reward",
    r"leaving the reference": "KL penalty",
    r"The surface that": "abstract interface",
    r"\bsays of [A-Z] ": "scores returned by",
    r"a whole batch, it comes": "raised when",
    r"whose weights are here": "locally loaded",
    r"\bWhatever: ": "padding token id",
    r"no habits": "resets the generation configuration",
    r"has the last word": "logit capping or scaling",
    r"gone on with|goes on where": "append, resume",
    r"\bEachOnce\b": "DeduplicatedEncoder",
    r"\bclass Sharing\b": "PrefixSharing",
    r"\bRoomyLayer\b|room at its end": "KV cache with spare capacity",
    r"\bclass (Absent|Tuples)\b": "MissingPackageStub, LegacyTupleCacheMixin",
    r"belongs to a record alone": "batch-invariant noise per record",
    r"\bclass Passing\b|went wrong may pass": "TransientFailure",
    r"\b(IN_A_ROW|UNNAMED|PAUSE|AGAIN|OF_THE_QUESTION)\b": "names that state their unit or effect",
    r"\bAskCollator\b|\bclass Asked\b|is written down of": "FaultTolerantCollator, QuestionBatch",
    r"\bmust_tell\b|Refuses to stand": "require_labels",
    r"reads which answer": "routes each response to its classifier",
    r"What varies from": "sampling unit",
    r"hand to each other": "record types exchanged between stages",
    r"a run's files stand": "run directory layout",
    r"can be told in advance": "deterministic",
    r"has been seen to work": "out-of-memory errors surface at once",
    r"can't be had": "unavailable",
    r"What matters of|Passes over what": "condenses, silences",
    r"\bh[eo]lds? the truth": "simulated coverage, contains the true value",
    r"asking a server took": "request log",
    r"leave behind\b|before it all": "analysing runs, environment check",
    r"What a 7B takes|absence of a star|stands? behind": "memory and runtime; must come after",
    r"tested with what|told apart|said, without": "test coverage matrix; distinguishes",
}


def left_phrases() -> Iterator[str]:
    """Yields the places where a replaced phrase remains in the sources and documents, with its replacement."""
    for phrase, replacement in PHRASES.items():
        for name, text in TEXTS.items():
            for match in re.finditer(phrase, text, re.IGNORECASE if phrase[0].isupper() else 0):
                line = text.count("\n", 0, match.start()) + 1
                yield f"{name}:{line}: {match[0]!r}, write: {replacement}"
