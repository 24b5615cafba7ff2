"""Local copies of Hub datasets: one per commit, and which copy is used if the Hub does not answer."""

import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from safervlm.data import copies
from safervlm.data.benchmark import Benchmark
from safervlm.data.copies import copy_of, update_copy
from safervlm.errors import RecordError

FIRST, SECOND = "a" * 40, "b" * 40


class Hub:
    """A simulated Hub whose branch moves; with ``commit`` None it does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commit: str | None = FIRST
        self.asked: list[str | None] = []
        self.loaded: list[str | None] = []
        self.recorded = True  # whether the library records the commit of what it loads
        monkeypatch.setattr(copies, "HfApi", lambda: SimpleNamespace(dataset_info=self.info))
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def info(self, name: str, revision: str | None, timeout: float) -> SimpleNamespace:
        self.asked.append(revision)
        if self.commit is None:
            raise ConnectionError("no net")
        return SimpleNamespace(sha=self.commit)

    def load(self, name: str, split: str, revision: str | None) -> datasets.Dataset:
        self.loaded.append(revision)
        commit = revision if revision in (FIRST, SECOND) else self.commit
        rows = datasets.Dataset.from_dict({"image": ["0.png"], "label": [str(commit)[:1]]})
        if self.recorded:
            rows.info.download_checksums = {f"hf://datasets/{name}@{commit}/data/train.parquet": {"num_bytes": 1}}
        return rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def label(cache: Path, source: str = "owner/name") -> str:
    data = Benchmark("Set", source, unsafe=["a"], safe=["b"], cache_dir=str(cache))
    data.prepare_data()
    return data.rows[0]["label"]


@pytest.mark.parametrize("source", ["owner/name", "owner/name@main", "owner/name@refs/pr/1"])
def test_a_branch_that_moved_is_another_copy(source: str, hub: Hub, tmp_path: Path) -> None:
    assert [label(tmp_path, source) for _ in range(2)] == ["a", "a"]
    hub.commit = SECOND
    assert label(tmp_path, source) == "b"
    hub.commit = FIRST
    assert label(tmp_path, source) == "a"
    assert hub.loaded == [FIRST, SECOND]  # each once, by its commit
    assert all(any(commit in file.name for file in tmp_path.iterdir()) for commit in hub.loaded)


def test_pinned_commit_is_not_looked_up_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.commit = None
    assert [label(tmp_path, f"owner/name@{commit}") for commit in (SECOND, FIRST, SECOND)] == ["b", "a", "b"]
    assert (hub.asked, hub.loaded) == ([], [SECOND, FIRST])


def test_last_copy_is_used_and_reported_if_the_hub_does_not_answer(hub: Hub, tmp_path: Path, capsys) -> None:
    for commit in (FIRST, SECOND):
        hub.commit = commit
        label(tmp_path)
    capsys.readouterr()
    hub.commit = None
    assert label(tmp_path) == "b"
    assert "owner/name: the Hub does not report its commit now" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("recorded", [True, False])
def test_copies_from_the_library_cache_are_named_by_commit_or_content(recorded: bool, hub: Hub, tmp_path: Path) -> None:
    hub.recorded, hub.info = recorded, None  # type: ignore[method-assign, assignment]
    names = set()
    for hub.commit in (FIRST, SECOND):
        assert label(tmp_path / hub.commit) == hub.commit[:1]
        names |= {file.name for file in (tmp_path / hub.commit).glob("*.jsonl")}
    assert len(names) == 2
    assert not recorded or names == {f"owner--name-{commit}.jsonl" for commit in (FIRST, SECOND)}


def test_failed_copy_does_not_replace_the_last_copy(hub: Hub, tmp_path: Path) -> None:
    label(tmp_path)
    before = copy_of("owner/name", tmp_path, ".jsonl")

    def fails(rows: datasets.Dataset, path: Path) -> None:
        raise RecordError("row 1: it has no image")

    hub.commit = SECOND
    with pytest.raises(RecordError, match="no image"):
        update_copy("owner/name", tmp_path, "", fails, ".jsonl")
    assert copy_of("owner/name", tmp_path, ".jsonl") == before


@pytest.mark.parametrize("content", ["", "../../x", "\xff", "ab cd"])
def test_a_damaged_record_of_the_commit_names_no_file(content: str, hub: Hub, tmp_path: Path) -> None:
    label(tmp_path)
    (tmp_path / "owner--name.commit").write_text(content, encoding="latin-1")
    assert copy_of("owner/name", tmp_path) == tmp_path / "owner--name"
    assert label(tmp_path) == "a"


def test_changed_local_folder_in_hub_format_is_another_copy(hub: Hub, tmp_path: Path) -> None:
    source, cache = tmp_path / "mine" / "set", tmp_path / "cache"
    source.mkdir(parents=True)
    (source / "train.csv").write_text("a")
    first = copy_of(str(source), cache)
    assert copy_of(str(source), cache) == first
    (source / "train.csv").write_text("ab")
    assert copy_of(str(source), cache) != first
    other = tmp_path / "other" / "mine" / "set"  # of the same last two names
    other.mkdir(parents=True)
    (other / "train.csv").write_text("a")
    assert copy_of(str(other), cache) != first


def test_a_local_folder_whose_files_keep_size_and_time_is_another_copy(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    file = folder / "train.csv"
    file.write_text("image,label\n0.png,a\n")
    before = file.stat()
    first = copy_of(str(folder), tmp_path / "cache")
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of the file system is coarse
        file.write_text("image,label\n0.png,b\n")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert copy_of(str(folder), tmp_path / "cache") != first
