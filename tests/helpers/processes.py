"""Runs commands in separate processes, which may be killed, and callbacks that kill them at a known moment.

A fork server that has imported the needed modules forks each command, which saves seconds of interpreter start-up.
"""

import ctypes
import io
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning.fabric.plugins.io.torch_io as torch_io
import torch
import yaml
from full_disk import limit
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from safervlm.data.loaders import OrderedLoader, in_batches
from safervlm.data.unsafe_concepts import UnsafeConcepts

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.helpers.warm",
        "callbacks.generation_check",
        "callbacks.checkpoint",
        "callbacks.adapter_export",
        "callbacks.rollout_log",
    ]
)


def run_command(args: Sequence[str], folder: Path, out: Path, err: Path, environment: dict[str, str]) -> None:
    """Runs a command in this process, which was forked for it.

    Args:
        args: the command line.
        folder: its working directory.
        out: a file to which its standard output is appended.
        err: the same for its standard error.
        environment: more environment variables.
    """
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background commands ignore Ctrl-C
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    # The streams of the fork server are configured for files.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for its data workers, as for a command in a shell
    from safervlm.cli.main import main

    if disk := os.environ.get("FULL_DISK"):
        limit(Path(disk), int(os.environ["FULL_DISK_SIZE"]))
    main(args)


def stall_instead(args: Sequence[str], log: Path) -> None:
    """Runs a command whose function only waits; the file ``stalled`` beside the log shows that it waits."""
    import functools

    from safervlm.cli import main

    whole = main.plain_commands

    def waiting(function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def wait(*args: object, **settings: object) -> None:
            (log.parent / "stalled").touch()
            time.sleep(120)

        return wait

    main.plain_commands = lambda: {name: waiting(function) for name, function in whole().items()}
    run_command(args, log.parent, log, log, {"SAFERVLM_GRACE": "1"})


PROMISE = 5.0  # seconds from a signal to the end of a process, on an idle machine
IDLE = 1.5  # ratio of elapsed to CPU time of a process on an idle machine, at most


def slowdown() -> float:
    """Measures how many times longer an empty process takes than on an idle machine.

    On an idle machine it takes as long as its CPU time; the rest is waiting for other processes. A ratio below ``IDLE``
    counts as 1.
    """
    begun = time.monotonic()
    process = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", ""], os.environ)
    usage = os.wait4(process, 0)[2]
    ratio = (time.monotonic() - begun) / max(usage.ru_utime + usage.ru_stime, 1e-3)
    return ratio if ratio > IDLE else 1.0


def must_end(alive: Callable[[], bool], promise: float = PROMISE, slowdown: Callable[[], float] = slowdown) -> None:
    """Waits until processes that received a signal have ended.

    Args:
        alive: returns whether one of them is still running.
        promise: seconds that they may take on an idle machine. On a loaded machine the limit is multiplied by the
            largest slowdown during the wait.
        slowdown: measures the slowdown, see :func:`slowdown`.
    """
    begun, worst = time.monotonic(), 1.0
    while alive():
        taken = time.monotonic() - begun
        worst = max(worst, slowdown())
        assert taken < promise * worst, f"still running after {taken:.1f} s, {promise:g} * {worst:.1f} are allowed"
        time.sleep(0.1)


def build_world(out: Path, wait: float, fail: bool = False) -> None:
    """Builds a pictogram world whose training only waits; the file ``built-PID`` next to it shows that it ran."""
    from safervlm.pictograms import world

    def train(folder: Path, seed: int, perturbation: float) -> list[dict[str, object]]:
        (out.parent / f"built-{os.getpid()}").touch()
        time.sleep(wait)
        if fail:
            raise RuntimeError("no model passed")
        for name in ("vlm", "judges"):
            (folder / name).mkdir()
            (folder / name / "weights.txt").write_text(str(os.getpid()))
        return [{"seed": seed, "figures": {}, "missed": []}]

    world.train_until_gates_pass = train
    world.write_benchmarks = lambda folder, seed: (folder / "benchmarks").mkdir()
    world.IMAGES_PER_CONCEPT = 1
    world.build(out)


class Played:
    """A command that is running, or has ended.

    Args:
        args: the command line.
        folder: its working directory.
        environment: more environment variables.
    """

    def __init__(self, args: Sequence[object], folder: Path, name: str = "log", **environment: object) -> None:
        self.log = folder / f"{name}.txt"
        self.log.unlink(missing_ok=True)
        more = {key: str(value) for key, value in environment.items()}
        self.process: BaseProcess = CONTEXT.Process(
            target=run_command, args=(list(map(str, args)), folder, self.log, self.log, more)
        )
        self.process.start()

    def end(self, timeout: float = 300) -> int | None:
        """Returns the exit code, or minus the number of the signal that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        """The output of the process so far."""
        return self.log.read_text(errors="replace")


def play(args: Sequence[object], folder: Path, code: int = 0, **environment: object) -> str:
    """Runs a command, checks that its exit code is ``code``, and returns its output."""
    played = Played(args, folder, **environment)
    assert played.end() == code, played.output
    return played.output


def start_together(args: Sequence[object], folder: Path, processes: int = 2, **environment: object) -> list[Played]:
    """Starts a command in several processes that find each other as on a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    return [Played(args, folder, f"rank-{rank}", LOCAL_RANK=rank, **place, **environment) for rank in range(processes)]


def play_together(args: Sequence[object], folder: Path, code: int = 0, processes: int = 2) -> str:
    """Runs a command in several processes that find each other as on a cluster; returns the output of the first one.

    If processes fail, one has to end with ``code``; the others may report its loss.
    """
    ranks = start_together(args, folder, processes)
    try:
        codes = [played.end() for played in ranks]
        output = "\n".join(played.output for played in ranks)
        assert code in codes, output
        assert 0 not in codes or not any(codes), output
    finally:
        for played in ranks:
            played.process.kill()
    return ranks[0].output


def write_config(file: Path, config: dict[str, object]) -> Path:
    """Writes a YAML file."""
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


class ShuffledConcepts(UnsafeConcepts):
    """Shuffles the order of the questions."""

    def predict_dataloader(self) -> OrderedLoader:
        loader = super().predict_dataloader()
        rows = [row for batch in loader.batches for row in batch]
        random.Random(3).shuffle(rows)
        loader.batches = in_batches(rows, self.batch_size)
        loader.length = len(loader.batches)
        return loader


class SignalAtBatchEnd(Callback):
    """Sends its own process a signal at the end of a batch.

    Args:
        batch: from 1, over all epochs.
        number: the number of the signal; 9 is SIGKILL.
    """

    def __init__(self, batch: int, number: int = 9) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            os.kill(os.getpid(), self.number)


class KillInBackward(Callback):
    """Kills its own process after the backward pass of a batch, before the optimizer steps.

    Args:
        batch: from 1, over all epochs.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInSave(Callback):
    """Kills its own process when half of a checkpoint has been written.

    Args:
        save: which one, from 1.
    """

    def __init__(self, save: int) -> None:
        self.left, self.whole = save, torch_io._atomic_save
        torch_io._atomic_save = self.write

    def write(self, checkpoint, path):
        self.left -= 1
        if self.left:
            self.whole(checkpoint, path)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


class StallAt(Callback):
    """Waits at a known moment for a signal; the file ``stalled-RANK`` in the working directory shows that it waits.

    Args:
        where: ``setup``, ``save`` (half of a checkpoint is written), or ``CALLBACK.HOOK``: before this hook.
        call: which call of the hook, from 1.
        seconds: how long it waits.
        deaf: whether to wait in C, where Python runs no signal handler.
        rank: waits in this process alone; -1 in all of them.
    """

    def __init__(self, where: str, call: int = 1, seconds: float = 120, deaf: bool = False, rank: int = -1) -> None:
        self.where, self.left, self.seconds, self.deaf, self.rank = where, call, seconds, deaf, rank

    def setup(self, trainer, pl_module, stage):
        if self.rank not in (-1, trainer.global_rank):
            return
        self.marker = Path(f"stalled-{trainer.global_rank}")
        if self.where == "setup":
            self.stall()
        elif self.where == "save":
            torch_io._atomic_save = self.save
        else:
            name, hook = self.where.split(".")
            callback = next(each for each in trainer.callbacks if type(each).__name__ == name)
            whole = getattr(callback, hook)

            def stalled(*args, **kwargs):
                self.left -= 1
                if self.left == 0:
                    self.stall()
                return whole(*args, **kwargs)

            setattr(callback, hook, stalled)

    def save(self, checkpoint, path):
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
        self.stall()

    def stall(self):
        self.marker.touch()
        if self.deaf:
            lock = ctypes.CDLL(None).pthread_mutex_lock
            mutex = ctypes.create_string_buffer(64)
            lock(mutex)
            lock(mutex)  # for ever
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.02)


class SlowSteps(Callback):
    """Makes each training step longer.

    Args:
        seconds: the additional duration.
        rank: waits in this process alone; -1 in all of them.
    """

    def __init__(self, seconds: float, rank: int = -1) -> None:
        self.seconds, self.rank = seconds, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.rank in (-1, trainer.global_rank):
            time.sleep(self.seconds)


class KillAtExport(Callback):
    """Kills its own process when training is over."""

    def on_train_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGKILL)


class KillInPredict(Callback):
    """Kills its own process after a predicted batch, while the last line of it is being written.

    Args:
        batch: from 0, of this process.
        torn: how many bytes of the last line are missing.
    """

    def __init__(self, batch: int, torn: int = 0) -> None:
        self.batch, self.torn = batch, torn

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.batch:
            if self.torn:
                shards = Path(trainer.default_root_dir) / "shards" / "responses"
                shard = max(shards.glob(f"{trainer.global_rank}-*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
                os.truncate(shard, shard.stat().st_size - self.torn)
            os.kill(os.getpid(), signal.SIGKILL)


class RefuseToLoad(Callback):
    """Raises when weights are loaded."""

    def setup(self, trainer, pl_module, stage):
        def load():
            raise AssertionError("the weights are read")

        pl_module.vlm.load = load


class FailOdds(Callback):
    """Makes the odds of the questions about one image fail."""

    def setup(self, trainer, pl_module, stage):
        first_words = pl_module.vlm.first_words
        asked = [example.question for example in trainer.datamodule.parts.predict]
        path = next(question.image_path for question in asked if question.capability == "alignment")

        def fail(batch):
            if any(question.image_path == path for question in batch.questions):
                raise RuntimeError("no odds")
            return first_words(batch)

        pl_module.vlm.first_words = fail


class KillInMerge(Callback):
    """Kills its own process after the responses are merged and before the shards are removed."""

    def setup(self, trainer, pl_module, stage):
        unlink = Path.unlink

        def kill(path, missing_ok=False):
            if path.parent.name == "responses":
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(path, missing_ok)

        Path.unlink = kill


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """DeepSpeed over gloo: Lightning's strategy without the requirement of CUDA."""

    def setup_environment(self):
        import deepspeed.ops

        # Otherwise it compiles an extension for shared memory between processes, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, optimizer, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer
