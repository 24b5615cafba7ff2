"""Promise 9: concurrent commands are safe, leave no temporary files and never delete a user's file."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluations import safety, write
from full_disk import limit, used
from processes import CONTEXT, build_world, play

from safervlm.cli.main import main
from safervlm.data.export import export_training_files
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.caches import temporary
from safervlm.io.files import write_atomically
from safervlm.pictograms import world
from safervlm.reports.evaluation import evaluation
from safervlm.reports.page import report
from safervlm.run import has_results, lock, read_manifest


def started(out: Path, wait: float, fail: bool = False):
    process = CONTEXT.Process(target=build_world, args=(out, wait, fail))
    process.start()
    return process


def wait_for(folder: Path, count: int) -> None:
    end = time.monotonic() + 200
    while len(list(folder.glob("built-*"))) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("built-")}


def test_second_concurrent_build_reuses_the_world_of_the_first(tmp_path: Path) -> None:
    out = tmp_path / "pictograms"
    first = started(out, 2)
    wait_for(tmp_path, 1)
    second = started(out, 0)
    for process in (first, second):
        process.join(200)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert (out / "vlm" / "weights.txt").read_text() == str(first.pid)
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert names(tmp_path) == {"pictograms"}


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_build_succeeds_after_a_killed_or_failed_build(end: str, tmp_path: Path) -> None:
    out = tmp_path / "pictograms"
    first = started(out, 0 if end == "failed" else 60, fail=end == "failed")
    wait_for(tmp_path, 1)
    if end == "killed":
        first.kill()
    first.join(60)
    assert first.exitcode in (1, -9)
    assert not out.exists()
    second = started(out, 0)
    second.join(200)
    assert second.exitcode == 0
    assert names(tmp_path) == {"pictograms"}
    assert json.loads((out / "manifest.json").read_text())["files"] == world.files_in(out)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build in this process that writes only a few files."""
    monkeypatch.setattr(world, "train_until_gates_pass", lambda folder, seed, perturbation: [{"figures": {}}])
    monkeypatch.setattr(world, "write_benchmarks", lambda folder, seed: None)
    monkeypatch.setattr(world, "write_data_sets", lambda folder, seed: (folder / "unsafe").mkdir())


@pytest.mark.parametrize(
    "file",
    ["notes.txt", "vlm/config.json", "judges/mine/epoch_10.pt", "manifest.json", ".hidden", "unsafe/images/mine.png"],
)
@pytest.mark.parametrize("built", [False, True], ids=["no world", "in an older world"])
def test_folder_containing_a_users_file_is_not_replaced(built: bool, file: str, quick: None, tmp_path: Path) -> None:
    out = tmp_path / "pictograms"
    if built:
        if file == "manifest.json":
            pytest.skip("a world's own")
        world.build(out, seed=1)
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    (out / file).write_text('{"mine": 1}')
    with pytest.raises(ArgumentError, match="which is not part of a pictogram world: name another folder"):
        world.build(out, seed=2)
    assert (out / file).read_text() == '{"mine": 1}'
    assert names(tmp_path) == {"pictograms"}


def test_a_world_that_does_not_list_its_files_is_kept(quick: None, tmp_path: Path) -> None:
    """A world of an older version: a user's file may have the name of one of the world's."""
    out = tmp_path / "pictograms"
    world.build(out, seed=1)
    (out / "unsafe" / "LICENSE.txt").write_text("mine")
    record = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({name: record[name] for name in ("fingerprint", "seed")}))
    (tmp_path / ".pictograms.unfinished").mkdir()
    (tmp_path / ".pictograms.unfinished" / "mine.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"out: .*pictograms is a world of an older version.*name another folder"):
        world.build(out, seed=2)
    assert (out / "unsafe" / "LICENSE.txt").read_text() == "mine"
    assert (tmp_path / ".pictograms.unfinished" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("change", ["changed", "removed", "replaced by a link"])
def test_a_world_that_was_changed_is_kept(change: str, quick: None, monkeypatch, tmp_path: Path) -> None:
    def write_files(folder: Path, seed: int) -> None:
        (folder / "unsafe").mkdir()
        for name in ("a.png", "b.png"):
            (folder / "unsafe" / name).write_text(name)

    monkeypatch.setattr(world, "write_data_sets", write_files)
    out = tmp_path / "pictograms"
    world.build(out, seed=1)
    (tmp_path / "mine.png").write_text("mine")
    file = out / "unsafe" / "b.png"
    if change == "changed":
        file.write_text("mine")
    else:
        file.unlink()
        if "link" in change:
            file.symlink_to(tmp_path / "mine.png")
    with pytest.raises(ArgumentError, match="was changed or removed after the world was built: name another folder"):
        world.build(out, seed=2)
    assert (out / "unsafe" / "a.png").exists()
    assert file.exists() == (change != "removed")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": 3}', "\x00\xff"])
def test_a_damaged_world_is_named_and_kept(text: str, quick: None, tmp_path: Path) -> None:
    out = tmp_path / "pictograms"
    world.build(out, seed=1)
    (out / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(RecordError, match=r"manifest\.json.*delete this world"):
        world.build(out, seed=1)
    assert (out / "unsafe").is_dir()


def test_world_of_another_seed_replaces_the_previous_world(quick: None, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pictograms").symlink_to("elsewhere")
    for seed in (1, 2):
        world.build(tmp_path / "pictograms", seed=seed)
        assert json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())["seed"] == seed
    assert names(tmp_path) == {"pictograms", "elsewhere"}


@pytest.mark.parametrize("command", ["pictograms", "demo"])
@pytest.mark.parametrize("out", ["", "  "])
def test_empty_output_folder_is_rejected(out: str, command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([command, "--out", out])
    assert end.value.code == 2
    assert "out: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def write_report(out: Path, runs: list[Path], sets: Path) -> None:
    report(runs, out / "report.html")


def write_evaluation(out: Path, runs: list[Path], sets: Path) -> None:
    evaluation(runs, out / "evaluation.html")


def write_export(out: Path, runs: list[Path], sets: Path) -> None:
    export_training_files(str(out), str(sets / "unsafe"), str(sets / "safe"), limit=1)


def write_world(out: Path, runs: list[Path], sets: Path) -> None:
    for _ in range(2):  # the second one finds the first one's
        world.build(out / "pictograms", seed=1)


@pytest.mark.parametrize("command", [write_report, write_evaluation, write_export, write_world])
def test_commands_remove_temporary_files_of_killed_commands_in_their_output(
    command: Callable[[Path, list[Path], Path], None], quick: None, tiny_sets: Path, tmp_path: Path
) -> None:
    run = write(tmp_path / "run", safety(np.random.default_rng(0)))
    out = tmp_path / "out"
    command(out, [run], tiny_sets)
    clean = names(out)
    (out / ".tmp-safervlm-1-0123abcd").mkdir()  # as kill -9 leaves it
    (out / ".tmp-safervlm-1-0123abcd" / ".lock").touch()
    (out / ".tmp-safervlm-1-0123abcd" / ".tmp-safervlm-1-0123abcd.csv").write_text("half")
    (out / ".tmp-safervlm-1-0123.csv").write_text("half")  # of an older version
    mine = {".lock", ".pictograms.unfinished", "tmp-safervlm.csv", "report.bak"}
    for name in mine:
        (out / name).write_text("mine")
    with temporary(out / "other.csv") as alive:  # of a command at work
        command(out, [run], tiny_sets)
        assert alive.exists()
    assert names(out) == clean | mine


LEFT = (".tmp-safervlm-1-ab.jsonl", "adapter/.tmp-safervlm-1-cd.json", ".scores.4711.xlsx", ".manifest.1.json")
LEFT += ("shards/responses/.tmp-safervlm-1/.tmp-safervlm-1.failed",)
LEFT += ("checkpoints/.tmp-safervlm-1/last.ckpt", "judge/.tmp-safervlm-1.safetensors")
LEFT += ("checkpoints/.safervlm-00112233445566ff.ckpt/weights",)
LEFT += ("first_implementation/UnsafeConcepts/alignment/.tmp-safervlm-1.json",)
KEPT = (".notes.4711.txt", ".scores.mine.xlsx", "scores.xlsx", ".env", "mine.tmp", "sub/.tmp-safervlm-1.csv")
KEPT += ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "tmp-safervlm-1.csv", "checkpoints/.safervlm-mine.ckpt")
KEPT += ("checkpoints/next.ckpt", "checkpoints/other.ckpt", "checkpoints/link")


def test_locking_a_run_removes_only_leftovers_of_dead_commands(tmp_path: Path) -> None:
    for name in (*LEFT, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    held = lock(tmp_path)
    assert held is not None
    assert [name for name in LEFT if (tmp_path / name).exists()] == []
    assert [name for name in KEPT if not (tmp_path / name).exists()] == []
    held.close()


@pytest.mark.parametrize("to", [".safervlm-0000000000000001.ckpt", "next.ckpt"], ids=["ours", "of an older version"])
def test_checkpoint_folder_that_last_ckpt_points_to_is_kept(to: str, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name in (".safervlm-0000000000000001.ckpt", ".safervlm-0000000000000002.ckpt", "next.ckpt"):
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "last.ckpt").symlink_to(to)
    held = lock(tmp_path)
    assert held is not None
    held.close()
    assert {path.name for path in checkpoints.iterdir()} == {"last.ckpt", "next.ckpt", to}
    assert not has_results(tmp_path / "nothing")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"stages": {}, "stages": {}}',
        '{"stages": []}',
        '{"stages": {"measure": 1}}',
        '{"stages": {"measure": {"settings": 3}}}',
        '{"stages": {"measure": {"settings": {"data": []}}}}',
        '{"stages": {"measure": {"settings": {"data": {"sets": [1]}}}}}',
        '{"stages": {"measure": {"settings": {}, "provenance": "x"}}}',
        '{"stages": {"measure": {"settings": {}, "continued": {"a": 1}}}}',
        '{"stages": {"measure": {"settings": {}, "continued": [1]}}}',
        "\xff\xfe",
        "folder",
    ],
)
def test_a_damaged_manifest_is_named(text: str, tmp_path: Path) -> None:
    if text == "folder":
        (tmp_path / "manifest.json").mkdir()
    else:
        (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(RecordError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "manifest.json"))
    assert "restore it, or name another run folder" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


SIZE = 256 * 1024  # of the small disk, in bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """A folder on a separate, small disk, and the environment of commands; where none can be mounted, a fake.

    With the environment variable FAKE_DISK it is the fake in any case.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
    if os.getuid() or os.environ.get("FAKE_DISK") or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield disk, {"FULL_DISK": disk, "FULL_DISK_SIZE": SIZE}
        return
    yield disk, {}
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_run_on_a_full_disk_resumes_without_loss(
    measuring_line: Callable[[Path, Path], list[str]],
    tiny_sets: Path,
    small_disk: tuple[Path, dict[str, object]],
    tmp_path: Path,
) -> None:
    whole, (disk, environment) = tmp_path / "whole", small_disk
    whole.mkdir()
    line = [*measuring_line(Path("run"), tiny_sets / "unsafe"), "--data.batch_size=5"]
    play(line, whole)
    for left in (6_000, 24_000, 26_000):  # before the first responses, in the shards, in the merged files
        (disk / "fill").unlink(missing_ok=True)
        (disk / "fill").write_bytes(b"x" * (SIZE - left - used(disk)))
        said = play(line, disk, code=2, **environment)
        assert "No space left on device" in said
        assert not list((disk / "run").rglob(".tmp-safervlm-*"))
    (disk / "fill").unlink()
    play(line, disk, **environment)
    for name in ("responses.jsonl", "verdicts.jsonl"):
        assert (disk / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()


def fill_fake(disk: Path) -> None:
    """Fills a simulated disk in this process; raises unless it becomes full and keeps its earlier files."""
    limit(disk, 3 * 4096)
    write_atomically(disk / "a", lambda file: file.write_text("first"))
    for name, size in (("a", 9000), ("b", 9000)):
        with pytest.raises(OSError, match="No space left"):
            write_atomically(disk / name, lambda file, size=size: file.write_bytes(b"x" * size))
    with (disk / "log").open("ab", buffering=0) as log:
        assert log.write(b"x" * 8192) == 8192
        with pytest.raises(OSError, match="No space left"):
            log.write(b"x")
    assert (disk / "a").read_text() == "first"
    assert {path.name for path in disk.iterdir()} == {"a", "log"}


def test_simulated_full_disk_raises_no_space_left(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=fill_fake, args=(tmp_path,))
    process.start()
    process.join(100)
    assert process.exitcode == 0
