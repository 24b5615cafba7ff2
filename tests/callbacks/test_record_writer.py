"""RecordWriter: shards and their merging."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.record_writer import RecordWriter
from safervlm.errors import RecordError
from safervlm.records import read_jsonl, write_jsonl


class Record:
    def __init__(self, name, text="mine"):
        self.record = {"id": name, "text": text}

    def to_dict(self):
        return self.record


class Scene:
    """A trainer whose data has one question per id, in order."""

    def __init__(self, run, ids, rank=0, keeps_others=False):
        self.default_root_dir, self.global_rank, self.is_global_zero = str(run), rank, rank == 0
        self.received_sigterm = False
        self.skipped: set[str] = set()
        self.barriers: list[str] = []
        self.strategy = SimpleNamespace(barrier=self.barriers.append)
        predict = [SimpleNamespace(question=SimpleNamespace(id=name)) for name in ids]
        parts = SimpleNamespace(predict=predict)
        self.datamodule = SimpleNamespace(
            parts=parts, skip=self.skip, remaining=self.remaining, keeps_others=keeps_others
        )

    def skip(self, ids):
        self.skipped = set(ids)

    def remaining(self):
        return [e for e in self.datamodule.parts.predict if e.question.id not in self.skipped]

    def start(self, file="responses.jsonl"):
        writer = RecordWriter(file)
        writer.setup(self, None, "predict")
        writer.on_predict_start(self, None)
        return writer

    def write(self, writer, *records):
        writer.on_predict_batch_end(self, None, list(records), None, 0)


def shard(run, name, content):
    folder = run / "shards" / "responses"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(content)


def test_shards_of_all_processes_are_merged_in_data_order(tmp_path):
    first, second = Scene(tmp_path, "abcdef"), Scene(tmp_path, "abcdef", rank=1)
    one, two = first.start(), second.start()
    second.write(two, Record("f"), Record("b"))
    first.write(one, Record("e"), Record("a"))
    first.write(one, Record("c"))
    second.write(two, Record("d"))
    two.on_predict_end(second, None)
    assert not (tmp_path / "responses.jsonl").exists()  # only the first process does this
    one.on_predict_end(first, None)
    assert [record["id"] for record in read_jsonl(tmp_path / "responses.jsonl")] == list("abcdef")
    assert not (tmp_path / "shards" / "responses").exists()
    assert first.barriers == second.barriers == ["record-writer-read", "record-writer-merge", "record-writer-merged"]


def test_a_batch_is_on_the_disk_when_it_is_done(tmp_path):
    scene = Scene(tmp_path, "ab")
    writer = scene.start()
    scene.write(writer, Record("a", 'Größe\u2028 "x"\n'))
    (file,) = (tmp_path / "shards" / "responses").iterdir()
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] == [
        {"id": "a", "text": 'Größe\u2028 "x"\n'}
    ]
    scene.write(writer, Record("b"))
    writer.on_predict_end(scene, None)
    assert [record["text"] for record in read_jsonl(tmp_path / "responses.jsonl")] == ['Größe\u2028 "x"\n', "mine"]


def test_existing_records_are_skipped_and_a_truncated_last_line_is_repeated(tmp_path):
    write_jsonl(tmp_path / "responses.jsonl", [{"id": "a", "text": "merged"}])
    shard(tmp_path, "0-1", '{"id": "b", "text": "first run"}\n{"id": "c", "te')
    shard(tmp_path, "1-2", '{"id": "d", "text": "second process"}\n')
    shard(tmp_path, "0-3", '{"id": "e"')
    shard(tmp_path, "0-4", "")
    # Every process sees the same records; reading does not change the files.
    for rank in (1, 0):
        scene = Scene(tmp_path, "abcdef", rank)
        writer = scene.start()
        assert scene.skipped == set("abd")
    scene.write(writer, Record("c"), Record("e"), Record("f"))
    writer.on_predict_end(scene, None)
    texts = ["merged", "first run", "mine", "second process", "mine", "mine"]
    assert [record["text"] for record in read_jsonl(tmp_path / "responses.jsonl")] == texts


def test_foreign_records_are_ignored_and_missing_records_are_an_error(tmp_path):
    shard(tmp_path, "0-1", '{"id": "x", "text": "foreign"}\n{"id": "b", "text": "there"}\n')
    scene = Scene(tmp_path, "abc")
    writer = scene.start()
    with pytest.raises(RecordError, match=r"a: no record was written \(2 are missing\)"):
        writer.on_predict_end(scene, None)
    assert not (tmp_path / "responses.jsonl").exists()
    scene = Scene(tmp_path, "abc")
    writer = scene.start()
    assert "b" in scene.skipped
    scene.write(writer, Record("c"), Record("a"))
    writer.on_predict_end(scene, None)
    assert [record["id"] for record in read_jsonl(tmp_path / "responses.jsonl")] == list("abc")


def test_invalid_line_before_the_last_is_an_error(tmp_path):
    shard(tmp_path, "0-1", '{"id": "a", "te\n{"id": "b", "text": "x"}\n')
    with pytest.raises(RecordError, match=r"0-1.jsonl, line 1: not JSON"):
        Scene(tmp_path, "ab").start()


def test_two_kinds_of_records_have_shards_of_their_own(tmp_path):
    shard(tmp_path, "0-1", '{"id": "a", "text": "a response"}\n')
    scene = Scene(tmp_path, "a")
    writer = scene.start("verdicts.jsonl")
    assert scene.skipped == set()
    scene.write(writer, Record("a", "a verdict"))
    writer.on_predict_end(scene, None)
    assert [record["text"] for record in read_jsonl(tmp_path / "verdicts.jsonl")] == ["a verdict"]
    assert (tmp_path / "shards" / "responses" / "0-1.jsonl").exists()


def test_sigterm_ends_after_the_current_batch_is_written(tmp_path):
    scene = Scene(tmp_path, "ab")
    writer = scene.start()
    scene.received_sigterm = True
    with pytest.raises(SIGTERMException):
        scene.write(writer, Record("a"))
    again = Scene(tmp_path, "ab")
    again.start()
    assert again.skipped == {"a"}


def test_record_writer_does_nothing_in_other_stages(tmp_path):
    scene = Scene(tmp_path, "ab")
    RecordWriter().setup(scene, None, "fit")
    assert scene.barriers == []
    assert not list(tmp_path.iterdir())
