"""Error boundary of the command line: every exception becomes one line and an exit code."""

import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

from safervlm.addresses import public_text
from safervlm.errors import UserError, first_line
from safervlm.io.escape import for_terminal
from safervlm.io.signals import exit_code_and_reason
from safervlm.run_folder import RunFolder

# Run folder of the current command, if it has one; tracebacks of unexpected errors are written to it.
run_folder: ContextVar[Path | None] = ContextVar("run_folder", default=None)
# Environment variable of a command that another one runs: its exit code, instead of 2, if its arguments are rejected:
# before it has a run folder, or with a message that names an argument. The other commands would reject them, too.
REJECTED = "SAFERVLM_REJECTED"
BEGINS = "Traceback (most recent call last)"

# Messages of libraries' own errors about a failed write, which have no errno.
DISK = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error|File too large"
    r"|PytorchStreamWriter failed|unexpected pos|iostream error|os error (5|27|28|30|122)\b"
)
ALLOCATION = re.compile(r"DefaultCPUAllocator: (can't|not enough)")  # a RuntimeError of PyTorch
# Package of a logger -> remedy for an error that it raises: a missing key, an address that does not answer.
LOGGERS = {
    "mlflow": "correct MLFLOW_TRACKING_URI or the logger's arguments, or omit the logger",
    "wandb": "log in, give --trainer.logger.offline true, or omit the logger",
}
# Module -> package to install, for modules that our dependencies import on use.
PACKAGES = {
    **{
        name: name
        for name in (
            *("accelerate", "av", "bitsandbytes", "datasets", "decord", "deepspeed", "einops", "librosa", "matplotlib"),
            *("num2words", "openai", "openpyxl", "pandas", "peft", "pyarrow", "requests", "rich", "scipy", "timm"),
            *("safetensors", "sentencepiece", "tensorboard", "tiktoken", "tokenizers", "torch", "torchaudio"),
            *("torchvision", "transformers", "triton", "wandb", "xformers"),
        )
    },
    "bs4": "beautifulsoup4",
    "comet_ml": "comet-ml",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "flash_attn": "flash-attn",
    "google": "protobuf",
    "hf_xet": "hf-xet",
    "PIL": "pillow",
    "pillow_avif": "pillow-avif-plugin",
    "pillow_heif": "pillow-heif",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tensorboardX": "tensorboardX",
    "yaml": "pyyaml",
}
REMEDIES = {
    errno.ENOSPC: "free some space, then give the same command again: it resumes",
    errno.EDQUOT: "free some space, then give the same command again: it resumes",
    errno.EROFS: "name a folder on a disk that can be written",
    errno.EACCES: "name a folder or file that you may read and write",
    errno.EPERM: "name a folder or file that you may read and write",
    errno.ENOENT: "check the path; paths begin where the command is typed",
    errno.ENOTDIR: "a part of the path is a file; name another path",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "it already exists; name another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower data.num_workers",
}


@contextmanager
def one_line_errors(words: Sequence[str] = ()) -> Iterator[None]:
    """Context manager that ends the process with one line instead of a traceback, whatever exception is raised inside.

    Args:
        words: Words of the command line, to name an argument that a library's message does not name.

    Exit codes: 2 for an error that the user can correct; 1 for a defect, whose traceback is written to a file, or if
    another process of the run died; 130 after Ctrl-C; 143 after SIGTERM; 141 if the reader of the output has ended. A
    SystemExit raised inside passes unchanged.

    Raises:
        SystemExit: An exception was raised inside the block.
    """
    before = run_folder.set(None)  # one process may run several commands
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command resumes\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has ended, as in `safervlm report RUN | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (Python flushes it once more at the end)
        sys.exit(141)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the outermost handler; a panic of a Rust library is not an Exception
        if ended := exit_code_and_reason(error):
            code, said = ended
            sys.stderr.write(f"safervlm: {said}\n" if said else "")
            raise SystemExit(code) from error
        line = explain(error, words)
        if line is None:
            line = f"unexpected {type(error).__name__}: {first_line(error)}; {keep_traceback(error)}"
            warn(f"error: {line}")
            raise SystemExit(1) from error
        warn(f"error: {line}")
        raise SystemExit(_user_error(line, words)) from error
    finally:
        run_folder.reset(before)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Iterates over an exception and its causes, as a traceback would show them.

    Args:
        error: Exception to begin with.
    """
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        hidden = following.__suppress_context__
        following = following.__cause__ or (None if hidden else following.__context__)


def explain(error: BaseException, words: Sequence[str] = ()) -> str | None:
    """Returns the one-line message of an expected failure; None for a defect.

    Args:
        error: Exception that was raised. Its causes are examined too, as libraries wrap our errors in theirs.
        words: Words of the command line.
    """
    chain = list(causes(error))
    for each in chain:
        if isinstance(each, UserError):
            return " ".join(str(each).split())
    for each in chain:
        kinds = {kind.__name__ for kind in type(each).__mro__}
        if "MisconfigurationException" in kinds:  # Lightning's; compared by name to avoid the import
            return trainer_line(each, words)
        if "OutOfMemoryError" in kinds or isinstance(each, MemoryError) or ALLOCATION.search(str(each)):
            return f"out of memory ({first_line(each)}): lower data.batch_size, or use a machine with more"
        if isinstance(each, OSError) and each.errno is not None:
            files = " to ".join(repr(str(name)) for name in (each.filename, each.filename2) if name is not None)
            remedy = REMEDIES.get(each.errno, "check the path, the disk and the network, then try again")
            return f"{files}{': ' if files else ''}{each.strerror}; {remedy}"
        if DISK.search(str(each)):
            return f"a file can't be written ({first_line(each)}); {REMEDIES[errno.ENOSPC]}"
        if isinstance(each, OSError):
            return f"{first_line(each)}; check the path, the disk and the network, then try again"
        if way_out := LOGGERS.get(type(each).__module__.split(".")[0]):
            return f"--trainer.logger: {first_line(each).rstrip('.')}; {way_out}"
        if isinstance(each, ImportError) and str(each.name).split(".")[0] not in ("safervlm", "callbacks"):
            return f"a package is missing ({first_line(each)}){install_hint(each.name) if each.name else ''}"
        if isinstance(each, UnicodeDecodeError):
            return f"a text file isn't in UTF-8 ({first_line(each)}); convert it, for example by iconv -t UTF-8"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TypeError | ValueError) and frames and "/lightning/" in frames[-1].filename:
        return trainer_line(error, words)
    return None


def trainer_line(error: BaseException, words: Sequence[str]) -> str:
    """Returns the message of an error of Lightning's trainer, with a remedy, which Lightning's own may not contain.

    Args:
        error: Exception raised by Lightning.
        words: Words of the command line, of which one is named with its value if the message is about it.
    """
    said = " ".join(str(error).split()).rstrip(".")
    typed = re.findall(r"--trainer\.(\w+)[= ](\S+)", " ".join(words))
    given = next((f".{name} {value}" for name, value in typed if re.search(rf"\b{name}\b", said)), "")
    return f"--trainer{given}: {said}; correct that --trainer argument, or omit it"


def install_hint(module: str) -> str:
    """Returns how to install a missing module; a package's name may differ from its module's.

    Args:
        module: Dotted name of the module.
    """
    top = module.split(".")[0]
    package = PACKAGES.get(module) or PACKAGES.get(top)
    return f"; pip install {package}" if package else f"; install the package that provides the module {top}"


def keep_traceback(error: BaseException) -> str:
    """Writes a traceback to the run folder, or else to a temporary file, and returns a line that states where it is.

    Args:
        error: Exception with its traceback.
    """
    text = public_text("".join(traceback.format_exception(error)))
    for write in (_to_run_folder, _to_temporary_file):
        with suppress(OSError):
            if file := write(text):
                return f"its traceback is in {file}; please report it"
    return "its traceback can't be saved: no folder is writable"


def _to_run_folder(text: str) -> Path | None:
    """Returns None if there is no run folder, or if a user's file has the name."""
    folder = run_folder.get()
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)  # a command that failed early has removed it
    file = RunFolder(folder).traceback
    if file.exists() and BEGINS not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    file.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return file


def _to_temporary_file(text: str) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix="safervlm-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(text)
    return Path(file.name)


def warn(line: str) -> None:
    """Writes one line to stderr; control characters are escaped, and words of more than 300 characters are cut.

    Args:
        line: Text, which may contain names from data and servers, and arguments of any length.
    """
    line = re.sub(r"\S{300,}", lambda word: f"{word[0][:150]}...{word[0][-50:]}", line)
    sys.stderr.write(f"safervlm: {for_terminal(line)}\n")


def fail(line: str) -> NoReturn:
    """Ends the process with one line on stderr and exit code 2.

    Args:
        line: Message; control characters are escaped.

    Raises:
        SystemExit: Always.
    """
    warn(f"error: {line}")
    sys.exit(_user_error(line, ()))


def _user_error(line: str, words: Sequence[str]) -> int:
    """Returns the exit code of an error that the user can correct.

    Args:
        line: Message.
        words: Words of the command line. If the message begins with the name of one of its arguments, the command has
            rejected it.
    """
    about = re.match(r"(?:--)?([\w.]+)(?: \S+)?:", line)
    typed = {word[2:].partition("=")[0].replace("init_args.", "") for word in words if word.startswith("--")} - {"run"}
    pairs = [(f".{name}", f".{about[1]}") for name in typed] if about else []
    named = any(one.endswith(other) or other.endswith(one) for one, other in pairs)
    return int(os.environ.get(REJECTED, 2)) if named or not run_folder.get() else 2
