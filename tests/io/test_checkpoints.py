"""Damaged and foreign checkpoints, with and without a valid checksum: rejected in one line without running code."""

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from safervlm.errors import RecordError, first_line
from safervlm.io.checkpoints import require_matching_weights, require_valid_checkpoint, unloadable
from safervlm.io.seals import SEAL, seal_file, seal_folder, verify_seal

ORIGIN = {"class": "a.B", "lr": 0.1}
WEIGHTS = {"w": torch.arange(6.0), "v": torch.ones(2, 3)}


def content(**changes: Any) -> dict[str, Any]:
    """A whole checkpoint; a change to ``del`` removes a part."""
    parts = {
        "state_dict": WEIGHTS,
        "trained": list(WEIGHTS),
        "loops": {"fit_loop": {}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(6)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "pytorch-lightning_version": "2.6.6",
        "epoch": 1,
    } | changes
    return {name: value for name, value in parts.items() if value is not del_}


del_ = object()


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


DAMAGED = {
    "no progress": ({"loops": del_}, "lacks its part loops"),
    "no state of the optimizer": ({"optimizer_states": del_}, "lacks its part optimizer_states"),
    "an empty state of the optimizer": ({"optimizer_states": []}, "lacks its part optimizer_states"),
    "no version": ({"pytorch-lightning_version": del_}, "lacks its part pytorch-lightning_version"),
    "progress is nothing": ({"loops": None}, "loops is a NoneType, not a dict"),
    "schedules in a text": ({"lr_schedulers": "x"}, "lr_schedulers is a str, not a list"),
    "callbacks in a list": ({"callbacks": [1]}, "callbacks is a list, not a dict"),
    "weights in a list": ({"state_dict": [WEIGHTS]}, "state_dict is a list, not a dict"),
    "names in a dictionary": ({"trained": {}}, "trained is a dict, not a list"),
    "a text for a weight": ({"state_dict": WEIGHTS | {"w": "0"}}, "its weight 'w' is not a tensor"),
    "a number for a name": ({"state_dict": {1: torch.ones(1)}}, "its weight 1 is not a tensor"),
    "NaN in a weight": ({"state_dict": WEIGHTS | {"w": torch.tensor([1, float("nan")])}}, "not finite"),
    "infinity deep in the optimizer": (
        {"optimizer_states": [{"state": {0: {"deep": [(torch.tensor([float("inf")]),)]}}}]},
        "its optimizer_states has numbers that are not finite",
    ),
    "code": ({"callbacks": {"x": Code()}}, "it needs the code posix.mkdir, which is not run"),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoint_is_reported_in_one_line(case: str, sealed: bool, tmp_path: Path) -> None:
    changes, message = DAMAGED[case]
    path = tmp_path / "last.ckpt"
    torch.save(content(**changes), path)
    if sealed:
        seal_file(path, ORIGIN)
    with pytest.raises(RecordError) as caught:
        verify_seal(path, ORIGIN)
    assert str(caught.value).startswith(f"--ckpt_path: {str(path)!r}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice to run the code
    assert not Path("ran").exists()


def test_a_whole_checkpoint_is_accepted(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "last.ckpt")
    require_valid_checkpoint(tmp_path / "last.ckpt", "--ckpt_path")
    verify_seal(tmp_path / "last.ckpt", ORIGIN)
    seal_file(tmp_path / "last.ckpt", ORIGIN)
    verify_seal(tmp_path / "last.ckpt", ORIGIN)


def with_seal(path: Path, text: str) -> None:
    """Appends any text as the seal, with the right checksum."""
    torch.save(content(), path)
    body = path.read_bytes()[:-2] + struct.pack("<H", len(text.encode()) + 64) + text.encode()
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())


SEALS = ["", "{", "null", "[]", "1e999", '"x"', "{}", '{"origin": []}', '{"origin": null}']
SEALS += ['{"origin": {}, "origin": {}}', '{"origin": {}, "files": ["x"]}', '{"origin": {}, "files": {"x": 3}}']
SEALS += [f'{{"origin": {"[" * 9999}', f'{{"origin": {{"lr": {"7" * 5000}}}}}']


@pytest.mark.parametrize("text", SEALS, ids=lambda text: text[:30])
def test_malformed_seal_is_reported_in_one_line(text: str, tmp_path: Path) -> None:
    with_seal(tmp_path / "last.ckpt", text)
    with pytest.raises(RecordError) as caught:
        verify_seal(tmp_path / "last.ckpt", ORIGIN)
    assert str(tmp_path / "last.ckpt") in str(caught.value)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "latest").write_text("step")
    (folder / SEAL).write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
    with pytest.raises(RecordError) as caught:
        verify_seal(folder, ORIGIN)
    assert SEAL in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sealed_adapter_is_not_accepted_as_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    seal_folder(tmp_path, ORIGIN)
    with pytest.raises(RecordError, match="not a checkpoint"):
        verify_seal(tmp_path, ORIGIN)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(RecordError, match="is not a regular file"):
        verify_seal(tmp_path / "last.ckpt", ORIGIN)


UNFIT = {
    "a weight is missing from the weights alone": {"state_dict": {"w": WEIGHTS["w"]}},
    "a weight is missing from the names alone": {"trained": ["w"]},
    "names that are numbers": {"trained": [1, 2]},
    "another shape": {"state_dict": WEIGHTS | {"v": torch.ones(3, 2)}},
    "whole numbers": {"state_dict": WEIGHTS | {"v": torch.ones(2, 3, dtype=torch.int64)}},
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit_are_rejected(case: str) -> None:
    with pytest.raises(RecordError, match="weights don't fit"):
        require_matching_weights(content(**UNFIT[case]), WEIGHTS)


def test_weights_that_fit_are_accepted() -> None:
    require_matching_weights(content(), WEIGHTS)
    require_matching_weights({"trained": list(WEIGHTS), "state_dict": {}}, WEIGHTS)  # DeepSpeed has them elsewhere


def test_only_errors_while_restoring_are_attributed_to_the_checkpoint() -> None:
    def raised(name: str, file: str) -> BaseException:
        source = f"def {name}(): raise KeyError('hidden')\n{name}()"
        try:
            exec(compile(source, file, "exec"), {})  # frames of any name
        except KeyError as error:
            return error
        raise AssertionError

    place = "/x/lightning/pytorch/trainer/connectors/checkpoint_connector.py"
    line = str(unloadable(raised("restore_loops", place), "a.ckpt"))
    assert "'a.ckpt'" in line
    assert "KeyError" in line
    assert "hidden" in line
    assert unloadable(raised("dump_checkpoint", place), "a.ckpt") is None  # it is being written
    assert unloadable(raised("restore_loops", "/x/elsewhere.py"), "a.ckpt") is None


def test_error_message_does_not_advise_disabling_weights_only(tmp_path: Path) -> None:
    torch.save({"w": Code()}, tmp_path / "x.pt")
    with pytest.raises(Exception) as caught:  # noqa: PT011 (PyTorch's)
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert "weights_only" in str(caught.value)
    assert first_line(caught.value) == "it needs the code posix.mkdir, which is not run"
