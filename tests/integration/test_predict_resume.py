"""Measuring: killed runs resume, and neither batches nor processes change a response."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Played, play, play_together, write_config

from safervlm.io.caches import LOCK

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = 4 + 4 * 5 + 4 * 5 + 3 * 5  # perception, alignment of both sets, three concepts' names
DDP = ("--trainer.strategy=ddp", "--trainer.devices=2")


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_llava, tiny_sets) -> Callable[..., list[object]]:
    """``command(run, *more)``: a command line that asks 59 questions of three capabilities, in batches of 3."""
    overlay = {
        "model": {
            "init_args": {
                "vlm": {"init_args": {"model": str(tiny_llava), "dtype": "float32", "system": ""}},
                "sampling": {"max_new_tokens": 8},
            }
        },
        "data": {
            "init_args": {
                "folder": str(tiny_sets / "unsafe"),
                "safe_folder": str(tiny_sets / "safe"),
                "limit": 4,
                "batch_size": 3,
                "num_workers": 0,
            }
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "callbacks.record_writer.RecordWriter"}],
        },
    }
    config = write_config(tmp_path_factory.mktemp("configs") / "overlay.yaml", overlay)
    return lambda run, *more: ["predict", "--config=configs/measure.yaml", f"--config={config}", "--run", run, *more]


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory) -> Callable[[float], bytes]:
    """``uninterrupted(temperature)``: the responses of an uninterrupted run, in batches of 3."""
    done: dict[float, bytes] = {}

    def run(temperature: float) -> bytes:
        if temperature not in done:
            folder = tmp_path_factory.mktemp("measured")
            play(command("run", f"--model.sampling.temperature={temperature}"), folder)
            done[temperature] = (folder / "run" / "responses.jsonl").read_bytes()
        return done[temperature]

    return run


def responses(folder: Path) -> bytes:
    assert not list((folder / "run" / "shards").rglob("*.jsonl"))
    return (folder / "run" / "responses.jsonl").read_bytes()


def lines_in_shards(folder: Path) -> int:
    return sum(shard.read_bytes().count(b"\n") for shard in (folder / "run" / "shards").rglob("*.jsonl"))


def test_uninterrupted_reference_run_has_varied_responses(uninterrupted):
    greedy, sampled = (
        [json.loads(line) for line in uninterrupted(temperature).splitlines()] for temperature in (0.0, 1.0)
    )
    for records in (greedy, sampled):
        assert len(records) == len({record["id"] for record in records}) == QUESTIONS
        assert {record["capability"] for record in records} == {"perception", "alignment", "alignment_text_only"}
        assert len({record["response"] for record in records}) > QUESTIONS / 3  # the tiny model depends on the image
    assert [record["response"] for record in greedy] != [record["response"] for record in sampled]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_batch_size_changes_nothing(batch_size, temperature, command, uninterrupted, tmp_path):
    more = [f"--model.sampling.temperature={temperature}", f"--data.batch_size={batch_size}"]
    play(command("run", *more), tmp_path)
    assert responses(tmp_path) == uninterrupted(temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_two_processes_change_nothing(temperature, command, uninterrupted, tmp_path):
    play_together(command("run", *DDP, f"--model.sampling.temperature={temperature}"), tmp_path)
    assert responses(tmp_path) == uninterrupted(temperature)


def test_run_killed_three_times_with_truncated_lines_resumes(command, uninterrupted, tmp_path):
    line = command("run")
    there = 0
    # After one batch a line is torn; then only the newline is missing; then a batch is complete.
    for batch, torn, kept in ((0, 40, 2), (2, 1, 8), (4, 0, 15)):
        kill = ["--trainer.callbacks+=processes.KillInPredict", f"--trainer.callbacks.batch={batch}"]
        printed = play([*line, *kill, f"--trainer.callbacks.torn={torn}"], tmp_path, code=-9)
        assert (f"{there} records already exist" in printed) == (there > 0)
        there += kept
        assert lines_in_shards(tmp_path) == there
    assert f"{there} records already exist" in play(line, tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_the_order_of_the_questions_changes_nothing(temperature, command, uninterrupted, tmp_path):
    line = command("run", f"--model.sampling.temperature={temperature}", "--data=processes.ShuffledConcepts")
    play(line, tmp_path)
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert stages["measure"]["settings"]["data"]["class"] == "processes.ShuffledConcepts"
    assert responses(tmp_path) == uninterrupted(temperature)


def test_run_killed_at_twenty_random_moments_resumes(command, uninterrupted, tmp_path):
    line = command("run", "--data.batch_size=1")
    shards = tmp_path / "run" / "shards" / "responses"
    rng = random.Random(0)
    there = []
    for _ in range(20):
        before = set(shards.glob("*.jsonl"))
        # Waits for a number of new responses, however slow the machine is, and a little longer.
        enough = (there[-1] if there else 0) + rng.randrange(4)
        played = Played(line, tmp_path)
        while played.process.exitcode is None and (
            set(shards.glob("*.jsonl")) <= before or lines_in_shards(tmp_path) < enough
        ):
            played.process.join(0.005)
        played.process.join(rng.uniform(0, 0.02))
        played.process.kill()
        played.process.join()
        there.append(lines_in_shards(tmp_path))
    assert there == sorted(there)  # nothing is lost
    assert len(set(there)) > 5, there  # the moments of the interruption differ
    assert f"{there[-1]} records already exist" in play(line, tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)


def test_four_processes_are_killed_and_one_resumes_and_then_two(command, uninterrupted, tmp_path):
    kill = ["--trainer.callbacks+=processes.KillInPredict", "--trainer.callbacks.torn=9"]
    line = command("run", "--trainer.strategy=ddp", "--trainer.devices=4")
    play_together([*line, *kill, "--trainer.callbacks.batch=1"], tmp_path, code=-9, processes=4)
    first = lines_in_shards(tmp_path)
    assert 4 * 2 <= first <= 4 * 5
    play([*command("run"), *kill, "--trainer.callbacks.batch=2"], tmp_path, code=-9)
    assert lines_in_shards(tmp_path) > first
    play_together(command("run", *DDP), tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)


def test_run_killed_while_merging_shards_resumes(command, uninterrupted, tmp_path):
    line = command("run")
    play([*line, "--trainer.callbacks+=processes.KillInMerge"], tmp_path, code=-9)
    assert lines_in_shards(tmp_path) == QUESTIONS
    assert f"{QUESTIONS} records already exist" in play(line, tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)
    # Once more, when it is complete.
    assert f"{QUESTIONS} records already exist" in play(line, tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)


def test_two_processes_are_killed_and_one_resumes_and_then_two(command, uninterrupted, tmp_path):
    kill = ["--trainer.callbacks+=processes.KillInPredict", "--trainer.callbacks.torn=9"]
    play_together([*command("run", *DDP), *kill, "--trainer.callbacks.batch=2"], tmp_path, code=-9)
    assert lines_in_shards(tmp_path) == 2 * 8
    play([*command("run"), *kill, "--trainer.callbacks.batch=3"], tmp_path, code=-9)
    # Batches keep the questions about an image together, so a batch may be smaller than 3.
    assert 2 * 8 + 8 <= lines_in_shards(tmp_path) <= 2 * 8 + 11
    play_together(command("run", *DDP), tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)


def test_sigterm_ends_the_run_between_batches_and_it_resumes(command, uninterrupted, tmp_path):
    line = command("run")
    played = Played([*line, "--data.batch_size=1"], tmp_path)
    shards = tmp_path / "run" / "shards" / "responses"
    while not lines_in_shards(tmp_path):
        played.process.join(0.05)
        assert played.process.exitcode is None, played.output
    played.process.terminate()
    assert played.end() == 128 + signal.SIGTERM
    assert 0 < lines_in_shards(tmp_path) < QUESTIONS
    assert all(shard.read_bytes().endswith(b"\n") for shard in shards.iterdir())
    assert not json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["measure"]["finished"]
    play(line, tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["measure"]["finished"]


def test_ctrl_c_ends_with_exit_code_130_and_the_run_resumes(command, uninterrupted, tmp_path):
    """A script that runs several commands has to see the interruption: exit code 130, not Lightning's 1."""
    played = Played(command("run", "--data.batch_size=1"), tmp_path)
    while not lines_in_shards(tmp_path):
        played.process.join(0.05)
        assert played.process.exitcode is None, played.output
    os.kill(played.process.pid, signal.SIGINT)
    assert played.end() == 128 + signal.SIGINT
    assert "the same command resumes" in played.output
    play(command("run"), tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)


def test_complete_run_loads_no_weights_and_keeps_its_provenance(command, uninterrupted, tmp_path):
    kill = ["--trainer.callbacks+=processes.KillInPredict", "--trainer.callbacks.batch=1"]
    play([*command("run"), *kill], tmp_path, code=-9)

    def stage():
        return json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["measure"]

    first = stage()
    assert first["continued"] == []
    play(command("run"), tmp_path)
    assert stage()["provenance"] == first["provenance"]  # of the first responses
    assert [set(more) for more in stage()["continued"]] == [{"started", "command"}]
    # Nothing is left to ask, so unreadable weights are not loaded.
    play(command("run", "--trainer.callbacks+=processes.RefuseToLoad"), tmp_path)
    assert responses(tmp_path) == uninterrupted(1.0)
    assert len(stage()["continued"]) == 2
    assert stage()["finished"]


def test_other_settings_are_rejected_and_the_folder_is_left_alone(command, tmp_path):
    kill = ["--trainer.callbacks+=processes.KillInPredict", "--trainer.callbacks.batch=1"]
    play([*command("run"), *kill], tmp_path, code=-9)

    def contents() -> dict[Path, bytes]:
        files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
        return {file: file.read_bytes() for file in files if file.name != LOCK}  # it contains the rank of the process

    before = contents()
    for more, said in (
        ("--model.sampling.temperature=0.5", "model.sampling.temperature: 1.0 there, 0.5 now"),
        ("--data.limit=3", "data.limit: 4 there, 3 now"),
        ("--seed_everything=1", "model.seed: 0 there, 1 now"),
    ):
        printed = play(command("run", more), tmp_path, code=2)
        errors = [
            line for line in printed.splitlines() if line.startswith("safervlm: error: --run: run holds results of ")
        ]
        assert len(errors) == 1
        assert said in errors[0]
    assert contents() == before


BIN = Path(sys.executable).parent


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_responses_do_not_depend_on_the_process_launcher(launcher, command, uninterrupted, tmp_path) -> None:
    """As users run it: Lightning starts the second process by the same command, or torchrun starts both."""
    line = [BIN / "safervlm", *command("run", "--model.sampling.temperature=1.0", *DDP)]
    if launcher == "torchrun":
        line = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", "--no-python", "--", *line]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ended = subprocess.run(
        list(map(str, line)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "responses.jsonl").read_bytes() == uninterrupted(1.0)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stages"]["measure"]["provenance"]["world_size"] == 2
    assert manifest["stages"]["measure"]["provenance"]["command"].startswith("safervlm predict --config")


def test_torchrun_with_a_single_device_trainer_is_rejected(command, tmp_path) -> None:
    """With a trainer for one process, each process of torchrun would assume to be the only one."""
    line = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", "--no-python", "--", BIN / "safervlm"]
    line += command("run")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ended = subprocess.run(list(map(str, line)), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert (
        "--trainer.devices: torchrun has started 2 processes for a trainer of 1; give --trainer.devices 2"
        in ended.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cluster", ["two nodes", "slurm"])
def test_two_nodes_return_the_responses_of_one_process(cluster, command, uninterrupted, tmp_path) -> None:
    """Two nodes of one process each, on one machine, with the environment variables of a cluster or of Slurm."""
    line = command("run", "--model.sampling.temperature=1.0", "--trainer.strategy=ddp", "--trainer.num_nodes=2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = []
    for node in range(2):
        if cluster == "slurm":
            told = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": 2, "SLURM_JOB_ID": 1}
            told |= {"SLURM_PROCID": node, "SLURM_LOCALID": 0, "SLURM_NODEID": node, "SLURM_JOB_NAME": "safervlm"}
            told |= {"SLURM_NODELIST": "localhost", "SLURM_STEP_NODELIST": "localhost"}
        else:
            told = {"NODE_RANK": node, "LOCAL_RANK": 0}
        nodes.append(Played(line, tmp_path, f"node-{node}", **common, **told))
    assert [node.end() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    assert (tmp_path / "run" / "responses.jsonl").read_bytes() == uninterrupted(1.0)
