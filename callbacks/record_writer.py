"""Writes the records of a predict loop after each batch, so that a process that dies loses at most one batch."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from safervlm.errors import RecordError, first_line
from safervlm.io.names import normal_name
from safervlm.io.tables import say
from safervlm.records import Failure, Response, read_jsonl, read_torn_jsonl, to_line, write_jsonl
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

    Args:
        file: The name of the merged file in the run folder.
    """

    def __init__(self, file: str = "responses.jsonl") -> None:
        self.file = file
        self._shard: BinaryIO | None = None
        self._failed: list[Failure] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the existing records and makes the data module skip them, identically on every process.

        Raises:
            RecordError: an existing file is damaged.
        """
        if stage != "predict":
            return
        done = self._read(trainer)
        if (valid := getattr(pl_module, "valid", None)) is not None:
            examples = {each.question.id: each for each in trainer.datamodule.parts.predict}  # type: ignore[attr-defined]
            done = {name: each for name, each in done.items() if name not in examples or valid(each, examples[name])}
        trainer.strategy.barrier("record-writer-read")  # no process writes while another one still reads
        trainer.datamodule.skip(done.keys())  # type: ignore[attr-defined]
        if done and trainer.is_global_zero:
            left = len(trainer.datamodule.remaining())  # type: ignore[attr-defined]
            rest = f"continuing with the other {left}" if left else "nothing is left to do"
            say(f"{self.file}: {len(done)} records are there already, {rest}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens this process's shard; the manifest has been checked by then."""
        shards = self._shards(trainer)
        shards.mkdir(parents=True, exist_ok=True)
        self._failed = []
        # A new file: the last line of an old shard may be torn, and in a container process ids are reused.
        self._shard = (shards / f"{trainer.global_rank}-{time.time_ns()}.jsonl").open("xb")

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
            SIGTERMException: the process was asked to end.
        """
        assert self._shard is not None  # noqa: S101 (on_predict_start opened it; for the type checker)
        lines = []
        for record in outputs:
            if isinstance(record, Failure):
                self._failed.append(record)
                continue
            try:
                lines.append(to_line(record.to_dict()).encode())
            except (TypeError, ValueError, RecursionError) as error:
                if not isinstance(record, Response):
                    raise
                reason = f"{record.id}: its response can't be written as JSON ({first_line(error)})"
                self._failed.append(Failure(record.question, reason))
        self._shard.write(b"".join(lines))
        self._shard.flush()
        if trainer.received_sigterm:  # Lightning checks this in training only
            raise SIGTERMException

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merges the shards, on the first process.

        Raises:
            RecordError: a question has neither a record nor a reason for its failure.
        """
        assert self._shard is not None  # noqa: S101
        self._shard.close()
        write_jsonl(self._shards(trainer) / f"{trainer.global_rank}.failed", (each.to_dict() for each in self._failed))
        trainer.strategy.barrier("record-writer-merge")
        if trainer.is_global_zero:
            records = self._read(trainer)
            asked = [example.question.id for example in trainer.datamodule.parts.predict]  # type: ignore[attr-defined]
            found = {
                normal_name(each["id"]): each
                for file in self._shards(trainer).glob("*.failed")
                for each in read_jsonl(file)
            }
            failed = [found[name] for name in asked if name in found and name not in records]
            missing = [name for name in asked if name not in records and name not in found]
            if missing:
                raise RecordError(f"{missing[0]}: no record was written ({len(missing)} are missing); run it again")
            run = Path(trainer.default_root_dir)
            others = records.keys() - set(asked) if trainer.datamodule.keeps_others else ()  # type: ignore[attr-defined]
            names = [*(name for name in asked if name in records), *(name for name in records if name in others)]
            write_jsonl(run / self.file, (records[name] for name in names))
            file = run / f"{Path(self.file).stem}-failed.jsonl"
            if file.is_file() and trainer.datamodule.keeps_others:  # type: ignore[attr-defined]
                there = {*asked, *records}
                failed += [each for each in read_jsonl(file) if normal_name(each["id"]) not in there]
            if failed:
                write_jsonl(file, failed)
            else:
                file.unlink(missing_ok=True)
            for shard in self._shards(trainer).iterdir():
                shard.unlink()
            self._shards(trainer).rmdir()
            with suppress(OSError):  # shards of another kind of record are there
                self._shards(trainer).parent.rmdir()
        trainer.strategy.barrier("record-writer-merged")

    def _shards(self, trainer: Trainer) -> Path:
        return RunFolder(trainer.default_root_dir).shards / Path(self.file).stem

    def _read(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Returns the existing records by id; records of a shard replace those of the merged file."""
        merged = Path(trainer.default_root_dir) / self.file
        shards = sorted(self._shards(trainer).glob("*.jsonl"))
        records: dict[str, dict[str, Any]] = {}
        fresh: set[str] = set()
        for file in [merged, *shards]:
            there = read_torn_jsonl(file) if file != merged else read_jsonl(file) if file.is_file() else ()
            for number, record in enumerate(there, 1):
                if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                    raise RecordError(f"{file}, record {number}: no id; remove the record, and it is asked again")
                name = normal_name(record["id"])
                if file == merged or name not in fresh:
                    records[name] = record
                    fresh |= {name} if file != merged else set()
        return records
