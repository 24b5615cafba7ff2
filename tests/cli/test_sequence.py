"""``safervlm train | evaluate | measure``: commands one after the other, their exit codes, and signals."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import must_end

from safervlm.cli.main import main
from safervlm.cli.sequence import recipe_file, typed
from safervlm.errors import ArgumentError

ROOT = Path(__file__).parent.parent.parent
TERM, INT = signal.SIGTERM, signal.SIGINT
CODES = {TERM: 143, INT: 130}


def test_sequence_separates_names_own_options_and_passed_arguments() -> None:
    given = typed(
        ["--runs=r", "sft", "dpo", "--limit", "3", "--pictograms", "--out", "o", "--", "--out", "p"],
        {"runs": "", "out": ""},
    )
    assert given.names == ["sft", "dpo"]
    assert given.options == {"pictograms": "yes", "runs": "r", "out": "o"}
    assert given.rest == ["--limit", "3", "--out", "p"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--runs"], "--runs"),
        (["--runs="], "--runs"),
        ([""], "''"),
        (["sft", "--run", "x"], "--run"),
        (["--", "--run=x"], "--run"),
        (["sft", "--limit", "0"], "--limit: at least 1, got 0"),
        (["sft", "--", "--data.limit=-3"], "--data.limit: at least 1, or null, got -3"),
        (["sft", "--data.folder", " "], "--data.folder: .* empty"),
        (["--limit", "2", "sft"], "'sft': not the value of an option; names come first"),
        (["sft", "--limit=2", "dpo"], "'dpo': not the value of an option"),
    ],
)
def test_ambiguous_sequence_arguments_are_rejected(words: list[str], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        typed(words, {"runs": "runs"})


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "sft", "nothing"],
        ["measure", "nothing"],
        ["evaluate", "--out"],
        ["train", "sft", "--run=x"],
    ],
)
def test_an_error_in_the_arguments_starts_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``driver(words, body)`` starts a command that runs others, which are replaced by a shell script."""
    started: list[subprocess.Popen[str]] = []

    def start(words: list[str], body: str) -> subprocess.Popen[str]:
        script = tmp_path / "stub"
        script.write_text(f"#!/usr/bin/env bash\n{body}\n")
        script.chmod(0o755)
        code = "import sys; from safervlm.cli import main, sequence; sequence.PROGRAM = [sys.argv[1]]; "
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code + "main.main(sys.argv[2:])", str(script), *words],
                env=os.environ | {"LOG": str(tmp_path / "log.txt")},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # SIGINT has its default action, as in a terminal; tests may be started with it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


SEQUENCES = [["train", "sft", "dpo"], ["evaluate"], ["measure", "llava-1.5-7b", "cogvlm-chat"]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("words", SEQUENCES, ids=lambda words: words[0])
def test_sequence_forwards_a_signal_and_starts_no_further_command(
    words: list[str], number: int, driver, tmp_path: Path
) -> None:
    """The stub ends after 0.3 s; the sequence waits for it, and starts no other command."""
    running = driver(
        words,
        'echo began >>"$LOG"\n'
        "trap 'sleep 0.3; echo heard >>\"$LOG\"; exit 143' TERM\nfor i in $(seq 600); do sleep 0.1; done",
    )
    log = tmp_path / "log.txt"
    end = time.monotonic() + 200
    while not log.exists():
        assert time.monotonic() < end
        assert running.poll() is None, running.stdout
        time.sleep(0.02)
    time.sleep(0.2)
    running.send_signal(number)
    must_end(lambda: running.poll() is None)
    assert running.returncode == CODES[signal.Signals(number)]
    assert log.read_text().split() == ["began", "heard"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "begun", "ends"),
    [(0, 3, 0), (2, 3, 1), (3, 3, 3), (130, 1, 130), (143, 1, 143), (-9, 3, 1), (-15, 1, 143)],
)
def test_exit_code_of_a_sequence_follows_its_commands(code: int, begun: int, ends: int, driver, tmp_path: Path) -> None:
    """The second measurement starts however the first one ended, except after a signal."""
    vlms = ["llava-1.5-7b", "llava-1.5-13b", "cogvlm-chat"]
    stop = f"exit {code}" if code >= 0 else f"kill {code} $$"
    running = driver(["measure", *vlms], f'echo began >>"$LOG"; echo told; {stop}')
    said = running.communicate(timeout=200)[0]
    assert running.returncode == ends, said
    assert (tmp_path / "log.txt").read_text().split() == ["began"] * begun
    assert (tmp_path / "runs" / "query" / "llava-1.5-7b.log").read_text() == "told\n"
    assert said.count("told") >= begun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "commands", "code"),
    [
        (["train", "sft"], 1, 2),
        (["evaluate"], 2, 2),  # the second command writes the table
        (["evaluate"], 2, 3),
        (["measure", "llava-1.5-7b"], 1, 2),
        (["measure", "llava-1.5-7b"], 1, 3),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_sequence_commands_report_failures_in_the_same_form(
    words: list[str], commands: int, code: int, driver, tmp_path: Path
) -> None:
    running = driver([*words, "--config", "of/{}.yaml"], f'echo "$@" >>"$LOG"; exit {code}')
    said = running.communicate(timeout=200)[0]
    assert running.returncode == (1 if code == 2 else 3), said
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == commands
    name = "original" if words[0] == "evaluate" else words[1]
    assert f"--config of/{name}.yaml" in lines[0]
    ends = [line for line in said.splitlines() if line.startswith("safervlm: ")]
    assert len(ends) == commands
    expected = r"failed: .* \(exit code 2\)" if code == 2 else "incomplete: .*"
    assert all(re.search(expected, line) for line in ends), ends


@pytest.mark.slow
@pytest.mark.parametrize("words", SEQUENCES, ids=lambda words: words[0])
def test_arguments_that_the_first_command_rejects_end_the_sequence(words: list[str], driver, tmp_path: Path) -> None:
    """The other commands would repeat the error; without shared arguments it is a failure of one command only."""
    body = 'echo began >>"$LOG"; echo "safervlm: error: unknown argument" >&2; exit "$SAFERVLM_REJECTED"'
    running = driver([*words, "--limti", "3"], body)
    said = running.communicate(timeout=200)[0]
    assert running.returncode == 2, said
    assert said.count("safervlm: ") == 1
    assert (tmp_path / "log.txt").read_text().split() == ["began"]
    assert driver(words, body).wait(200) == 1


@pytest.mark.slow
def test_sequence_ends_even_if_a_command_ignores_the_signal(driver, tmp_path: Path) -> None:
    running = driver(["train", "sft"], 'trap "" TERM INT; echo began >>"$LOG"; exec sleep 20 >/dev/null 2>&1')
    end = time.monotonic() + 200
    while not (tmp_path / "log.txt").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)
    running.send_signal(TERM)
    must_end(lambda: running.poll() is None)
    assert running.returncode == 143


def test_a_shipped_recipe_is_found_from_any_folder() -> None:
    assert recipe_file("sft", "configs") == "configs/sft.yaml"
    assert recipe_file("configs/pictograms/vlm.yaml", "configs/vlm") == "configs/pictograms/vlm.yaml"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.sh", ["train", "--runs", "runs", "sft", "--", "--x"]),
        ("eval.sh", ["evaluate", "--original", "runs/original", "--out", "runs/evaluation.html", "sft", "--", "--x"]),
        ("query_vlms.sh", ["measure", "--runs", "runs/query", "sft", "--", "--x"]),
    ],
)
def test_shell_script_runs_the_corresponding_command(script: str, words: list[str], tmp_path: Path) -> None:
    environment = tmp_path / "environment"  # as if scripts/environment.sh had made it
    (environment / "bin").mkdir(parents=True)
    command = environment / "bin" / "safervlm"
    command.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"; exit 3\n')
    command.chmod(0o755)
    (environment / ".installed-demo").touch()
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), "sft", "--", "--x"],
        env=os.environ | {"SAFERVLM_VENV": str(environment)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3
    assert ended.stdout.splitlines() == words
