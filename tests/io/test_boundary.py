"""Any exception of a command becomes one line and an exit code."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from safervlm.errors import ArgumentError, RecordError
from safervlm.io.boundary import one_line_errors, run_folder


def wrapped() -> Exception:
    """A library's error whose cause is one of ours."""
    try:
        try:
            raise RecordError("data.csv, line 7: no label; add one")
        except RecordError as ours:
            raise RuntimeError("DataLoader worker 0 failed\nwith a page of text") from ours
    except RuntimeError as error:
        return error


def decoding() -> Exception:
    try:
        b"caf\xe9".decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError


def of_package(module: str, text: str) -> Exception:
    """An error of a class that a package defines, which its caller wraps."""
    kind = type("UsageError", (Exception,), {"__module__": module})
    error = ValueError("a page\nof text")
    error.__cause__ = kind(text)
    return error


EXPECTED: dict[str, tuple[Exception, list[str]]] = {
    "ours": (ArgumentError("data.limit: at least 1, got 0"), ["data.limit: at least 1, got 0"]),
    "of two lines": (ArgumentError("data.limit: no\n  number"), ["data.limit: no number"]),
    "control characters": (RecordError("the name 'a\x1b[2Jb'"), [r"\x1b[2J"]),
    "led to a library's": (wrapped(), ["data.csv, line 7: no label; add one"]),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), ["'/x/y'", "No space left", "free some"]),
    "full disk, no name": (OSError(errno.ENOSPC, "No space left on device"), ["No space left", "resumes"]),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "f"), ["'f'", "quota", "free some"]),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "f"), ["'f'", "Read-only", "name a folder"]),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "f"), ["'f'", "Permission denied"]),
    "two files": (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), ["'a' to 'b'", "cross-device"]),
    "missing": (FileNotFoundError(errno.ENOENT, "No such file or directory", "f"), ["'f'", "check the path"]),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "f"), ["'f'", "name a file"]),
    "vanished": (OSError(errno.EIO, "Input/output error", "f"), ["'f'", "Input/output error"]),
    "torch, full disk": (
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64"),
        ["unexpected pos"],
    ),
    "torch, writer": (RuntimeError("PytorchStreamWriter failed writing file data/1"), ["can't be written"]),
    "safetensors, full disk": (ValueError("I/O error: No space left on device (os error 28)"), ["No space left"]),
    "W&B": (of_package("wandb.errors.errors", "No API key.\nMore"), ["--trainer.logger: No API key;", "offline true"]),
    "MLflow": (of_package("mlflow.exceptions", "No host"), ["--trainer.logger: No host;", "MLFLOW_TRACKING_URI"]),
    "memory": (MemoryError(), ["out of memory", "data.batch_size"]),
    "memory of the CPU": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:99] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        ["out of memory", "data.batch_size"],
    ),
    "memory of the GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["out of memory", "data.batch_size"]),
    "package": (ModuleNotFoundError("No module named 'wandb'", name="wandb"), ["wandb", "pip install wandb"]),
    "package of another name": (ModuleNotFoundError("No module named 'PIL'", name="PIL.Image"), ["pip install pillow"]),
    "package of a space": (
        ModuleNotFoundError("No module named 'google.protobuf'", name="google.protobuf"),
        ["pip install protobuf"],
    ),
    "package unknown": (
        ModuleNotFoundError("No module named 'made_up'", name="made_up.part"),
        ["install the package that provides the module made_up"],
    ),
    "encoding": (decoding(), ["UTF-8", "iconv"]),
    "Lightning": (
        MisconfigurationException("`devices` should be\nan int"),
        ["--trainer: `devices` should be an int; correct"],
    ),
    "connection": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), ["Connection refused"]),
    "no number": (OSError("the model can't be loaded\nand a page"), ["the model can't be loaded"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_error_is_reported_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, parts = EXPECTED[name]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("safervlm: error: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("typed", "said", "code"),
    [
        (["--model.lr", "-1"], "model.lr: above 0, got -1.0", 64),
        (["--limit=0"], "data.limit: at least 1, got 0", 64),
        (["--model.init_args.vlm.lora.r", "0"], "lora.r: at least 1, got 0", 64),
        (["--trainer.devices", "-3"], "--trainer.devices -3: an int above 0; correct it", 64),
        (["--model.lr", "1"], "vlm.model: 'x' can't be read", 2),  # applies to this run only
        (["--model.lr", "1"], "color: none", 2),
        (["--run", "r"], "--run: the folder 'r' holds another run", 2),
        ([], "model.lr: above 0, got -1.0", 2),
    ],
)
def test_argument_rejected_by_every_command_of_a_sequence_has_its_own_exit_code(
    typed: list[str], said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the error is raised after the run folder has been created."""

    def failing() -> None:
        run_folder.set(tmp_path)
        raise ArgumentError(said)

    for variable, expected in (({"SAFERVLM_REJECTED": "64"}, code), ({}, 2)):
        monkeypatch.delenv("SAFERVLM_REJECTED", raising=False)
        for name, value in variable.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended, one_line_errors(["fit", *typed]):
            failing()
        assert ended.value.code == expected


UNEXPECTED = [
    KeyError("questions"),
    ZeroDivisionError("division by zero"),
    AssertionError(),
    ImportError(name="safervlm.x"),
]


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_an_unexpected_exception_keeps_its_traceback(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        run_folder.set(tmp_path)
        raise error

    before = run_folder.get()
    with pytest.raises(SystemExit) as ended, one_line_errors():
        failing()
    assert run_folder.get() == before  # the working directory of the next command is another
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"unexpected {type(error).__name__}" in line
    assert str(tmp_path / "traceback.txt") in line
    assert "raise error" in (tmp_path / "traceback.txt").read_text()


def test_traceback_without_a_run_folder_is_saved_in_the_temporary_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit), one_line_errors():
        raise KeyError("x")
    (file,) = tmp_path.iterdir()
    assert str(file) in capsys.readouterr().err
    assert "KeyError" in file.read_text()


@pytest.mark.parametrize("kept", ["notes of mine\n", "Traceback (most recent call last):\nKeyError: 'before'\n"])
def test_users_file_named_traceback_txt_is_not_overwritten(kept: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "traceback.txt").write_text(kept)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def failing() -> None:
        run_folder.set(tmp_path / "run")
        raise KeyError("x")

    with pytest.raises(SystemExit), one_line_errors():
        failing()
    ours = kept.startswith("Traceback")
    assert (str(tmp_path / "run" / "traceback.txt") in capsys.readouterr().err) == ours
    assert ((tmp_path / "run" / "traceback.txt").read_text() == kept) != ours


def test_error_line_is_printed_if_no_traceback_can_be_saved(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit), one_line_errors():
        raise KeyError("x")
    assert "unexpected KeyError: 'x'; its traceback can't be saved" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(capsys) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_closed_output_pipe_is_not_reported_as_an_error() -> None:
    script = (
        "from safervlm.io.boundary import one_line_errors\n"
        "with one_line_errors():\n"
        "    for number in range(100000): print(number)\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 141
    assert said == ""
