"""``safervlm --print_shtab SHELL``."""

import subprocess
from pathlib import Path

import pytest

from safervlm.cli.main import main

# Typed words -> some of their completions.
TYPED = {
    "me": "measure",
    "fit --trainer.max_e": "--trainer.max_epochs",
    "predict --data.capab": "--data.capabilities",
    "validate --ckpt": "--ckpt_path",
    "train s": "sft",
    "measure qwen": "qwen2-vl-7b",
    "evaluate --ori": "--original",
    "verify --dt": "--dtype",
}
TRY = 'COMP_WORDS=(safervlm $0); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_safervlm; echo "${COMPREPLY[@]}"'


@pytest.mark.slow
def test_bash_completes_commands_options_and_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    main(["--print_shtab", "bash"])
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)
    for typed, expected in TYPED.items():
        line = ["bash", "-c", f"source completion.sh; {TRY}", typed]
        ended = subprocess.run(line, capture_output=True, text=True, check=False)
        assert expected in ended.stdout.split(), (typed, ended)


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--print_shtab", "fish"], "fish"), (["--print_shtab"], "bash"), (["--print_shtab=cmd"], "cmd")],
)
def test_unknown_shell_is_rejected(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert named in capsys.readouterr().err
