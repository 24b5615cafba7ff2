"""Writes the records of a predict loop after each batch, so that a process that dies loses at most one batch."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from safervlm.errors import RecordError, first_line
from safervlm.io.names import normal_name
from safervlm.io.tables import say
from safervlm.records import Failure, Question, Response, read_jsonl, read_torn_jsonl, to_line, write_jsonl
from safervlm.run_folder import RunFolder


class RecordWriter(Callback):
    """Writes the records of ``predict_step`` to ``file`` in the run folder.

    Each process appends to its own shard under ``shards/``, one line per record, flushed after every batch. At the
    start all existing shards are read (of any number of processes, with or without a torn last line), and the data
    module skips their questions. At the end the shards are merged in the order of the data and removed. If the module
    has a method ``valid(record, example)``, existing records for which it returns False are computed again.

    Questions without a response are listed in a separate file (``responses-failed.jsonl``), and the same command asks
    them again. If the data module is a suite of datasets, records of datasets that are not part of this run are kept. A
    run that is asked to end (SIGTERM) ends after its current batch.

    If the module has ``further_files`` (:class:`safervlm.measure.FurtherFile`), their records are written in the same
    way, each to its own file. A question is skipped once each file has its record; the module's method ``skip(done)``
    gets the ids of the records that exist, by file.

    Args:
        file: The name of the merged file in the run folder.
    """

    def __init__(self, file: str = RunFolder("").responses.name) -> None:
        self.file = file
        self._files: list[RecordFile] = []
        self._existing: dict[str, tuple[int, int]] = {}  # file -> number of existing and of remaining records

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the existing records and makes the data module skip them, identically on every process.

        Raises:
            RecordError: An existing file is damaged.
        """
        if stage != "predict":
            return
        main, *further = files = self._of(trainer, pl_module)
        done = {file.name: file.read() for file in files}
        if (valid := getattr(pl_module, "valid", None)) is not None:
            examples = {each.question.id: each for each in trainer.datamodule.parts.predict}  # type: ignore[attr-defined]
            done[main.name] = {
                name: each
                for name, each in done[main.name].items()
                if name not in examples or valid(each, examples[name])
            }
        trainer.strategy.barrier("record-writer-read")  # no process writes while another process is still reading
        left = {file.name: file.asked(trainer) - done[file.name].keys() for file in files}
        unfinished = set().union(*(left[file.name] for file in further))
        trainer.datamodule.skip(done[main.name].keys() - unfinished)  # type: ignore[attr-defined]
        if further:
            pl_module.skip({name: frozenset(records) for name, records in done.items()})  # type: ignore[operator]
        self._existing = {name: (len(records), len(left[name])) for name, records in done.items() if records}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints how many records exist, and opens this process's shards; the manifest has been checked by then."""
        for name, (there, left) in self._existing.items() if trainer.is_global_zero else ():
            rest = f"continuing with the remaining {left}" if left else "nothing is left to do"
            say(f"{name}: {there} records already exist, {rest}")
        self._files = self._of(trainer, pl_module)
        for file in self._files:
            file.open(trainer.global_rank)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Appends the records of a batch.

        Raises:
            SIGTERMException: The process was asked to end.
        """
        main, *further = self._files
        own = [next((file for file in further if isinstance(record, file.kinds)), main) for record in outputs]
        for file in self._files:
            file.append(record for record, its in zip(outputs, own, strict=True) if its is file)
        if trainer.received_sigterm:  # Lightning checks this in training only
            raise SIGTERMException

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merges the shards, on the first process.

        Raises:
            RecordError: A question has neither a record nor a reason for its failure.
        """
        for file in self._files:
            file.close(trainer.global_rank)
        trainer.strategy.barrier("record-writer-merge")
        if trainer.is_global_zero:
            for file in self._files:
                file.merge(trainer)
        trainer.strategy.barrier("record-writer-merged")

    def _of(self, trainer: Trainer, module: LightningModule) -> list["RecordFile"]:
        """Returns the module's files; the first is that of its main records."""
        run = Path(trainer.default_root_dir)
        further = getattr(module, "further_files", ())
        return [RecordFile(run, self.file), *(RecordFile(run, each.file, each.kinds, each.applies) for each in further)]


class RecordFile:
    """A file of records: the merged file, its shards, and the failures.

    Args:
        run: The run folder.
        name: The name of the merged file.
        kinds: The classes of its records and failures; empty for the main file, which receives all other classes.
        applies: Whether a question has a record in it.

    Attributes:
        failed: The failures of this process.
    """

    def __init__(
        self,
        run: Path,
        name: str,
        kinds: tuple[type, ...] = (),
        applies: Callable[[Question], bool] = lambda question: True,
    ) -> None:
        self.run, self.name, self.kinds, self.applies = run, name, kinds, applies
        self.shards = RunFolder(run).shards / Path(name).stem
        self._shard: BinaryIO | None = None
        self.failed: list[Failure] = []

    def asked(self, trainer: Trainer) -> dict[str, None]:
        """Returns the ids of the questions that have a record here, in the order of the data.

        Args:
            trainer: The trainer with the data.
        """
        examples = trainer.datamodule.parts.predict  # type: ignore[attr-defined]
        return dict.fromkeys(each.question.id for each in examples if self.applies(each.question))

    def read(self) -> dict[str, dict[str, Any]]:
        """Returns the existing records by id; records of a shard replace those of the merged file.

        Raises:
            RecordError: A file is damaged.
        """
        merged = self.run / self.name
        records: dict[str, dict[str, Any]] = {}
        fresh: set[str] = set()
        for file in [merged, *sorted(self.shards.glob("*.jsonl"))]:
            there = read_torn_jsonl(file) if file != merged else read_jsonl(file) if file.is_file() else ()
            for number, record in enumerate(there, 1):
                if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                    raise RecordError(
                        f"{file}, record {number}: it has no id; remove the record, and its question is asked again"
                    )
                name = normal_name(record["id"])
                if file == merged or name not in fresh:
                    records[name] = record
                    fresh |= {name} if file != merged else set()
        return records

    def open(self, rank: int) -> None:
        """Opens the shard of a process.

        Args:
            rank: The rank of the process.
        """
        self.shards.mkdir(parents=True, exist_ok=True)
        # A new file: the last line of an old shard may be incomplete, and in a container process ids are reused.
        self._shard = (self.shards / f"{rank}-{time.time_ns()}.jsonl").open("xb")

    def append(self, records: Iterable[Any]) -> None:
        """Appends records to the shard, and collects failures.

        Args:
            records: The records and failures of a batch.
        """
        assert self._shard is not None  # noqa: S101 (open was called; for the type checker)
        lines = []
        for record in records:
            if isinstance(record, Failure):
                self.failed.append(record)
                continue
            try:
                lines.append(to_line(record.to_dict()).encode())
            except (TypeError, ValueError, RecursionError) as error:
                if not isinstance(record, Response):
                    raise
                reason = f"{record.id}: its response can't be written as JSON ({first_line(error)})"
                self.failed.append(Failure(record.question, reason))
        self._shard.write(b"".join(lines))
        self._shard.flush()

    def close(self, rank: int) -> None:
        """Closes the shard and writes the failures of a process.

        Args:
            rank: The rank of the process.
        """
        assert self._shard is not None  # noqa: S101
        self._shard.close()
        write_jsonl(self.shards / f"{rank}.failed", (each.to_dict() for each in self.failed))

    def merge(self, trainer: Trainer) -> None:
        """Merges the shards of all processes in the order of the data, and removes them.

        Args:
            trainer: The trainer with the data.

        Raises:
            RecordError: A question has neither a record nor a reason for its failure.
        """
        records, asked = self.read(), self.asked(trainer)
        keeps = trainer.datamodule.keeps_others  # type: ignore[attr-defined]
        found = {normal_name(each["id"]): each for file in self.shards.glob("*.failed") for each in read_jsonl(file)}
        failed = [found[name] for name in asked if name in found and name not in records]
        missing = [name for name in asked if name not in records and name not in found]
        if missing:
            raise RecordError(f"{missing[0]}: no record was written ({len(missing)} are missing); run it again")
        others = records.keys() - asked.keys() if keeps else set()
        names = [*(name for name in asked if name in records), *(name for name in records if name in others)]
        write_jsonl(self.run / self.name, (records[name] for name in names))
        file = self.run / f"{Path(self.name).stem}-failed.jsonl"
        if file.is_file() and keeps:
            there = asked.keys() | records.keys()
            failed += [each for each in read_jsonl(file) if normal_name(each["id"]) not in there]
        if failed:
            write_jsonl(file, failed)
        else:
            file.unlink(missing_ok=True)
        for shard in self.shards.iterdir():
            shard.unlink()
        self.shards.rmdir()
        with suppress(OSError):  # there are shards of another kind of record
            self.shards.parent.rmdir()
