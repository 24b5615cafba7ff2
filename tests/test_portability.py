"""Windows: missing modules are guarded, and text files have the same bytes on every system."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "safervlm").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])

# Other packages are imported first: what they do on Windows can't be seen here. Our modules then find what is there.
AS_ON_WINDOWS = """
import builtins, importlib, os, signal, sys
import datasets, lightning, matplotlib.pyplot, openai, openpyxl, pandas, peft
import filelock, safetensors.torch, scipy.stats, sentencepiece, torch, torchmetrics, transformers
LACKING = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
original = builtins.__import__
def without(name, globals=None, *rest, **more):
    ours = (globals or {}).get("__name__", "").partition(".")[0] in ("safervlm", "callbacks")
    if ours and name.partition(".")[0] in LACKING:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, globals, *rest, **more)
builtins.__import__ = without
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fork", "geteuid", "getpgid", "getuid", "killpg", "mkfifo",
             "register_at_fork", "setsid", "statvfs", "sysconf", "uname"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGVTALRM", "ITIMER_VIRTUAL", "alarm", "getitimer", "setitimer"):
    delattr(signal, name)
for name in sys.argv[1:]:
    importlib.import_module(name)

from pathlib import Path
from safervlm.cli.main import main
from safervlm.io.files import write_text_atomically
from safervlm.io.images import open_regular
from safervlm.io.locks import acquire
from safervlm.io.signals import listening
from safervlm.limits import reject_slow_patterns
sys.platform = "win32"
main(["--help"])
with listening():
    write_text_atomically("a.txt", "a\\n")
acquire(Path("a.txt")).close()
assert open_regular("a.txt").read() == b"a\\n"
reject_slow_patterns(["a+"], ["aa"], "here")
"""


@pytest.mark.slow
def test_every_module_imports_without_posix_only_modules(tmp_path: Path) -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    modules = [name for name in modules if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", AS_ON_WINDOWS, *modules], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: safervlm" in done.stdout


def written_texts(tree: ast.AST) -> list[ast.Call]:
    """The calls that open a file to write text, or write one."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [
            each.value
            for each in (*node.args, *(word.value for word in node.keywords))
            if isinstance(each, ast.Constant)
        ]
        opens = any(isinstance(mode, str) and set(mode) <= set("rwaxt+") and set(mode) & set("wax+") for mode in modes)
        if name == "write_text" or (name == "open" and opens):
            found.append(node)
    return found


def test_a_text_file_has_the_same_bytes_on_every_system() -> None:
    example = 'p.write_text(x); open(p, "w"); p.open("rb"); p.open("a", encoding="utf-8"); p.open(); p.open("xb")'
    assert [call.lineno for call in written_texts(ast.parse(example))] == [1, 1, 1]
    calls = [(path, call) for path in SOURCES for call in written_texts(ast.parse(path.read_text(encoding="utf-8")))]
    differing = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, call in calls
        if "newline" not in {word.arg for word in call.keywords} and "os.devnull" not in ast.unparse(call)
    ]
    assert not differing


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_into_a_pipe_never_fails_because_of_its_encoding(encoding: str, tmp_path: Path) -> None:
    code = "import sys; from safervlm.cli.main import main; main(['--version']); print('\\u5b89')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == b"\\u5b89"
