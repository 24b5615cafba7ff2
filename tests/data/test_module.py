"""Data loaders: order, position, sharding, and their use by a Lightning trainer."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from safervlm.data.loaders import (
    OrderedLoader,
    TrainingLoader,
    in_batches,
    prediction_batches,
    training_batches,
    validation_batches,
)
from safervlm.data.module import Parts, SaferData, text_field
from safervlm.errors import RecordError
from safervlm.hashing import seed_for
from safervlm.records import Example, Question


def example(number: int) -> Example:
    question = Question(
        f"Set/{number}", "Set", str(number), None, "alignment", 0, "Is it safe?", "Hate", "thing", "Unsafe"
    )
    return Example(question)


def examples(count: int) -> list[Example]:
    return [example(number) for number in range(count)]


def ids(batch: Sequence[Example]) -> list[int]:
    return [int(example.question.image) for example in batch]


def failing(batch: Sequence[Example]) -> list[int]:
    raise RecordError("Set/3: the image is damaged: replace the file")


class Numbers(SaferData):
    def __init__(self, train=0, validation=0, predict=0, place=(0, 1), collator=ids, **settings):
        super().__init__(collator, **settings)
        self.counts = train, validation, predict
        self.place = place

    def load(self):
        return Parts(*map(examples, self.counts))

    def _place(self):
        return self.place


class Listener(LightningModule):
    """Records its batches; each step uses a random number, like dropout."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.drawn = []
        self.hooks = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch))
        self.drawn.append(torch.rand(1).item())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.hooks.append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen.append(batch)

    def on_predict_start(self):
        self.hooks.append("start")

    def on_predict_end(self):
        self.hooks.append("end")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Kill(Callback):
    """Saves after a number of batches, then ends like a killed process, without running the loops' hooks."""

    class Killed(BaseException):
        pass

    def __init__(self, after: int, file: Path):
        self.after, self.file = after, file

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(module.seen) == self.after:
            trainer.save_checkpoint(self.file)
            raise self.Killed


def trainer(*callbacks: Callback, **settings) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


# Orders and shards


def singles(count: int) -> list[list[int]]:
    return [[row] for row in range(count)]


def test_epoch_contains_every_example_once_in_an_order_of_seed_and_epoch():
    orders = {
        (seed, epoch): list(itertools.chain(*training_batches(singles(23), 4, seed, epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(23)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert training_batches(singles(23), 4, 0, 1) == training_batches(singles(23), 4, 0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 12, 23, 24, 25])
def test_processes_share_the_global_batches_of_a_single_process(count: int, world_size: int):
    ranks = [training_batches(singles(count), 4, 0, 0, rank, world_size) for rank in range(world_size)]
    together = [list(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]
    whole = training_batches(singles(count), 4 * world_size, 0, 0)
    dropped = count % (4 * world_size) if count % (4 * world_size) < world_size else 0
    assert together == (whole[:-1] if dropped else whole)
    for batches in zip(*ranks, strict=True):
        sizes = list(map(len, batches))
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
    loader = TrainingLoader(examples(count), ids, 4, rank=world_size - 1, world_size=world_size)
    assert list(loader) == ranks[-1]
    assert len(loader) == len(ranks[-1])


GROUPS = [[0, 1, 2], [3], [4, 5, 6, 7, 8], [9, 10], [11], [12, 13, 14, 15]]


def about_images(batch_size: int = 4, **settings: Any) -> TrainingLoader:
    """Sixteen questions about six images."""
    return TrainingLoader(examples(16), ids, batch_size, groups=GROUPS, **settings)


def test_questions_about_an_image_stay_together_in_random_order():
    orders = []
    for epoch in range(3):
        order = list(itertools.chain(*training_batches(GROUPS, 4, 0, epoch)))
        assert sorted(order) == list(range(16))
        for group in GROUPS:
            places = sorted(map(order.index, group))
            assert places[-1] - places[0] == len(group) - 1
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 3
    assert any(sorted(order) != order for order in ([row for row in order if row in GROUPS[2]] for order in orders))
    # Batches and shares of the processes are those of any order.
    assert [len(batch) for batch in training_batches(GROUPS, 5, 0, 0)] == [5, 5, 5, 1]
    halves = [training_batches(GROUPS, 2, 0, 0, rank, 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == training_batches(GROUPS, 4, 0, 0)


def test_position_is_rejected_if_question_grouping_changed():
    state = about_images().state_dict()
    for loader, there in (
        (TrainingLoader(examples(16), ids, 4), state),
        (about_images(), TrainingLoader(examples(16), ids, 4).state_dict()),
    ):
        with pytest.raises(ValueError, match=r"with questions_together (True, now it is False|False, now it is True)"):
            loader.load_state_dict(there)
    iterator = iter(about_images(num_workers=2))
    first = [next(iterator), next(iterator)]
    resumed = about_images()
    resumed.load_state_dict(state | {"batches": 2})
    assert first + list(resumed) == list(about_images())


def test_order_with_one_question_per_image_is_the_seeded_shuffle():
    assert TrainingLoader(examples(9), ids, 4).state_dict()["order"].keys() == {
        "examples",
        "seed",
        "batch_size over all processes",
    }
    order = list(range(9))
    random.Random(seed_for(0, "order", 1)).shuffle(order)
    assert list(itertools.chain(*training_batches(singles(9), 4, 0, 1))) == order


def test_fewer_examples_than_processes_are_rejected():
    with pytest.raises(RecordError, match="1 training examples for 2 processes"):
        TrainingLoader(examples(1), ids, 4, world_size=2)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_contains_every_example_once_in_equally_many_batches(world_size: int, batch_size: int):
    batches = [validation_batches(10, batch_size, rank, world_size) for rank in range(world_size)]
    assert batches[0][0][0] == 0
    assert sorted(itertools.chain(*itertools.chain(*batches))) == list(range(10))
    assert len(set(map(len, batches))) == 1
    with pytest.raises(RecordError, match="1 validation examples for 2 processes"):
        validation_batches(1, batch_size, 0, 2)


def about(images: Sequence[str | None], prompts: Sequence[str]) -> list[Example]:
    numbered = enumerate(zip(images, prompts, strict=True))
    return [Example(replace(example(n).question, image_path=i, prompt=p)) for n, (i, p) in numbered]


def test_predictions_keep_the_questions_about_an_image_together_the_longest_first():
    made = about(["a", "b", "a", "c", "b", "a", None], ["??", "?", "?", "????", "??????", "?", "?"])
    assert prediction_batches(made, 3) == [[[1, 4, 3], [0, 2, 5], [6]]]
    assert prediction_batches(made, 4) == [[[1, 4, 3], [0, 2, 5, 6]]]
    assert prediction_batches(made, 2) == [[[1, 4], [3], [0, 2], [5, 6]]]  # more questions than the batch size


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_predictions_contain_every_example_once_over_all_processes(world_size: int, batch_size: int):
    made = about([str(n // 3) for n in range(10)], ["?"] * 10)
    batches = prediction_batches(made, batch_size, world_size)
    assert len(batches) == world_size
    assert sorted(itertools.chain(*itertools.chain(*batches))) == list(range(10))
    assert max(len(batch) for of_rank in batches for batch in of_rank) <= batch_size


# Positions


def test_position_counts_delivered_batches_and_not_prefetched_ones():
    loader = TrainingLoader(examples(20), ids, 2, num_workers=2, seed=3)
    iterator = iter(loader)
    first = [next(iterator) for _ in range(3)]
    state = loader.state_dict()
    assert (state["epoch"], state["batches"]) == (0, 3)
    other = TrainingLoader(examples(20), ids, 2, seed=3)
    other.load_state_dict(state)
    assert first + list(other) == list(TrainingLoader(examples(20), ids, 2, seed=3))
    assert len(list(other)) == 10, "the place is used once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 4}, "batch_size over all processes 2, now it is 4"),
        ({"batch_size": 2, "world_size": 2}, "batch_size over all processes 2, now it is 4"),
        ({"batch_size": 2, "seed": 1}, "seed 0, now it is 1"),
        ({"batch_size": 2, "count": 19}, "examples .* now it is"),
    ],
)
def test_position_in_another_order_is_rejected(settings: dict, message: str):
    state = TrainingLoader(examples(20), ids, 2).state_dict()
    with pytest.raises(ValueError, match=message):
        TrainingLoader(examples(settings.pop("count", 20)), ids, **settings).load_state_dict(state)


def test_position_is_valid_for_other_process_counts_with_equal_global_batch():
    loader = TrainingLoader(examples(20), ids, 4)
    iterator = iter(loader)
    next(iterator)
    halves = [TrainingLoader(examples(20), ids, 2, rank=rank, world_size=2) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict(loader.state_dict())
    assert [a + b for a, b in zip(*halves, strict=True)] == list(iterator)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_samples_nothing_from_the_global_generator(num_workers: int):
    before = torch.get_rng_state()
    list(TrainingLoader(examples(5), ids, 2, num_workers))
    list(OrderedLoader(examples(5), in_batches(range(5), 2), 3, ids, num_workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_invalid_record_is_reported_in_one_line_with_or_without_workers(num_workers: int):
    with pytest.raises(RecordError) as error:
        list(OrderedLoader(examples(5), in_batches(range(5), 2), 3, failing, num_workers))
    assert str(error.value) == "Set/3: the image is damaged: replace the file"


# Through the trainer


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("killed_after", "limit"),
    [
        (1, {"max_epochs": 2}),
        (3, {"max_epochs": 2}),
        (5, {"max_epochs": 3}),
        (7, {"max_epochs": 3}),
        (10, {"max_epochs": 3}),
        (5, {"max_steps": 13}),
        (7, {"max_steps": 13}),
        (6, {"max_epochs": 3, "limit_train_batches": 4}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_continued_run_sees_what_an_uninterrupted_one_sees(
    tmp_path: Path, num_workers: int, killed_after: int, limit: dict[str, int]
):
    settings = {"train": 19, "batch_size": 4, "num_workers": num_workers}  # five batches, the last one smaller
    whole, before, after = Listener(), Listener(), Listener()
    trainer(**limit).fit(whole, datamodule=Numbers(**settings))
    epochs = [training_batches(singles(19), 4, 0, epoch)[: limit.get("limit_train_batches")] for epoch in range(3)]
    assert [batch for _, _, batch in whole.seen] == list(itertools.chain(*epochs))[: len(whole.seen)]
    with pytest.raises(Kill.Killed):
        trainer(Kill(killed_after, tmp_path / "place.ckpt"), **limit).fit(before, datamodule=Numbers(**settings))
    trainer(**limit).fit(after, datamodule=Numbers(**settings), ckpt_path=tmp_path / "place.ckpt")
    assert before.seen + after.seen == whole.seen


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("first", "all_of_it"), [({"max_steps": 5}, {"max_steps": 13}), ({"max_epochs": 2}, {"max_epochs": 3})], ids=str
)
def test_run_resumed_at_the_end_of_an_epoch_sees_the_same_data(
    tmp_path: Path, num_workers: int, first: dict, all_of_it: dict
):
    settings = {"train": 19, "batch_size": 4, "num_workers": num_workers}
    whole, before, after = Listener(), Listener(), Listener()
    trainer(**all_of_it).fit(whole, datamodule=Numbers(**settings))
    save = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    trainer(save, **first).fit(before, datamodule=Numbers(**settings))
    trainer(**all_of_it).fit(after, datamodule=Numbers(**settings), ckpt_path=tmp_path / "end.ckpt")
    assert before.seen + after.seen == whole.seen


@pytest.mark.filterwarnings("ignore")
def test_epochs_cut_short_continue_with_the_next_order(tmp_path: Path):
    module = Listener()
    trainer(max_epochs=3, limit_train_batches=2).fit(module, datamodule=Numbers(train=19, batch_size=4))
    assert [batch for _, _, batch in module.seen] == [
        batch for epoch in range(3) for batch in training_batches(singles(19), 4, 0, epoch)[:2]
    ]


@pytest.mark.filterwarnings("ignore")
def test_number_of_workers_does_not_change_what_is_sampled():
    drawn = []
    for num_workers in (0, 1):
        torch.manual_seed(0)
        module = Listener()
        trainer(max_epochs=2).fit(module, datamodule=Numbers(train=6, batch_size=2, num_workers=num_workers))
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]


@pytest.mark.filterwarnings("ignore")
def test_validation_is_in_order_and_may_be_empty():
    module = Listener()
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0}
    trainer(**settings).fit(module, datamodule=Numbers(train=4, validation=5, batch_size=2))
    assert module.hooks == [[0, 1], [2, 3], [4]]
    module = Listener()
    nothing = Numbers(train=4, batch_size=2)
    trainer(**settings).fit(module, datamodule=nothing)
    assert len(module.seen) == 2
    assert nothing.val_dataloader() == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("skipped", "place", "seen"),
    [
        ((), (0, 1), [[0, 1], [2, 3], [4]]),
        ((0, 3), (0, 1), [[1, 2], [4]]),
        ((0, 3), (1, 2), [[4]]),
        ((0, 1, 2, 3), (1, 2), []),  # nothing left for this process, but for the other one
        (range(5), (0, 1), []),
    ],
)
def test_predict_skips_finished_questions_and_always_runs_its_hooks(skipped, place, seen):
    module = Listener()
    data = Numbers(predict=5, batch_size=2, place=place)
    data.skip({f"Set/{number}" for number in skipped})
    trainer().predict(module, datamodule=data, return_predictions=False)
    assert module.seen == seen
    assert module.hooks == ["start", "end"]


class Sharer(Listener):
    """Records the batches of each process, and waits for the other processes where RecordWriter does."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        (self.folder / f"train-{self.global_rank}").write_text(str([batch for _, _, batch in self.seen]))

    def on_predict_end(self):
        self.trainer.strategy.barrier()
        (self.folder / f"predict-{self.global_rank}").write_text(str(self.seen))


class Shared(Numbers):
    _place = SaferData._place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_the_work(tmp_path: Path):
    settings = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp_spawn",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": True,  # has no effect: Lightning does not replace these loaders
    }
    data = Shared(train=13, validation=3, predict=5, batch_size=3)
    Trainer(max_epochs=2, **settings).fit(Sharer(tmp_path), datamodule=data)
    for rank in (0, 1):
        expected = [batch for epoch in (0, 1) for batch in training_batches(singles(13), 3, 0, epoch, rank, 2)]
        assert (tmp_path / f"train-{rank}").read_text() == str(expected)
    data.skip({"Set/0", "Set/1", "Set/2", "Set/4"})
    Trainer(**settings).predict(Sharer(tmp_path), datamodule=data, return_predictions=False)
    assert [(tmp_path / f"predict-{rank}").read_text() for rank in (0, 1)] == ["[[3]]", "[]"]


# Settings and errors


def test_missing_training_or_prediction_data_is_an_error():
    with pytest.raises(RecordError, match="nothing to train on"):
        Numbers(predict=1).train_dataloader()
    with pytest.raises(RecordError, match="nothing to predict"):
        Numbers(train=1).predict_dataloader()


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1)])
def test_invalid_settings_are_rejected(name: str, value: int):
    with pytest.raises(ValueError, match=rf"data\.{name}: .*got {value}"):
        Numbers(**{name: value})


def test_a_collator_is_needed():
    with pytest.raises(ValueError, match=r"data\.collator: none is set"):
        Numbers(predict=1, collator=None).predict_dataloader()


def test_two_records_with_one_id_are_rejected():
    class Twice(Numbers):
        def load(self):
            return Parts(predict=[example(1), example(2), example(1)])

    with pytest.raises(RecordError, match="Set/1: two records have this id"):
        Twice().setup("predict")


def test_description_covers_ids_and_contents_but_not_batching():
    first = Numbers(predict=5, train=2).describe()
    assert first["predict"]["examples"] == 5
    assert first["train"]["examples"] == 2
    assert "validation" not in first
    assert first == Numbers(predict=5, train=2, batch_size=3, num_workers=1).describe()
    assert first["predict"]["ids"] != Numbers(predict=4, train=2).describe()["predict"]["ids"]

    class Reworded(Numbers):
        def load(self):
            question = example(0).question
            return Parts(predict=[Example(question, (text,)) for text in [self.text]])

    one, two = Reworded(), Reworded()
    one.text, two.text = "Yes", "No"
    assert one.describe()["predict"]["ids"] == two.describe()["predict"]["ids"]
    assert one.describe()["predict"]["content"] != two.describe()["predict"]["content"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"b": "x"}, "'a' or 'c' is missing; it has \\['b'\\]"),
        ({"a": 3}, "'a' must be a text"),
        ({"c": ""}, "'c' must be a text"),
    ],
)
def test_text_field_returns_the_first_name_and_rejects_invalid_values(record: dict, message: str):
    assert text_field({"c": "yes"}, ("a", "c"), "here") == "yes"
    with pytest.raises(RecordError, match=f"here: the field {message}"):
        text_field(record, ("a", "c"), "here")
