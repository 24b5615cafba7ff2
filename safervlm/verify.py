"""Whether a measurement holds: a sample of its questions asked again, one by one or in another precision."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from scipy.stats import binomtest
from torch.utils.data import DataLoader

from safervlm.data.responses import RESPONSES, read_responses
from safervlm.errors import ArgumentError, RecordError
from safervlm.lightning_cli import IdleCLI, as_command_line, hush
from safervlm.measure import Measure
from safervlm.records import Example, Failure, Response, Verdict, read_records, seed_for, write_jsonl
from safervlm.run import locked
from safervlm.tables import JUDGE_NOTE, TextTable, say, show_table
from safervlm.trust import check, find_beside_the_shell, named_in, read_config

FLIPS = "verify.jsonl"


class Kept(L.Callback):
    """Keeps the answers; Lightning's own way of returning them takes frozen records apart."""

    def __init__(self) -> None:
        self.records: list[Response | Failure] = []

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *place: Any) -> None:
        """Takes a batch's records."""
        self.records += outputs


def verify(
    run: Path,
    sample: int = 100,
    batch_size: int = 1,
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
    addresses: list[str] | None = None,
    api_key_variable: str | None = None,
    trust_config: bool = False,
) -> None:
    """Asks a sample of a run's questions again and counts the answers and the verdicts that flip.

    The answers' noise is drawn from the record's id, so what differs is arithmetic: another batch, another precision.
    The flips are written to verify.jsonl in the run folder. The questions and their images are those of the data that
    the run's predict.yaml names. The folder may be somebody else's: addresses, an environment variable and classes that
    are not SaferVLM's are used only where you repeat or allow them.

    Args:
        run: The folder of a finished measurement.
        sample: How many questions to ask again, drawn at random.
        batch_size: Of the second time; 1 asks them one by one.
        dtype: Precision of the weights the second time; by default that of the run.
        seed: Of the sample.
        addresses: All addresses that the run's configuration names, repeated, to allow asking them.
        api_key_variable: The environment variable that the run's configuration names for a server's key, repeated, to
            allow sending its value there.
        trust_config: Allow classes and model code that the run's configuration names and that are not SaferVLM's.

    Raises:
        RecordError: the run has no answers or no configuration, or its answers are not about its data.
        ArgumentError: something in the configuration is not allowed, or an argument is out of its range.
    """
    if not str(run).strip("."):
        raise ArgumentError(f"run: the folder of a measurement, got {str(run)!r}")
    for name, value in (("sample", sample), ("batch_size", batch_size)):
        if value < 1:
            raise ArgumentError(f"{name}: at least 1, got {value}")
    run = Path(run)
    config = run / "predict.yaml"
    if not config.is_file():
        inside = run / "evaluation"
        example = f", for example {inside}" if (inside / "predict.yaml").is_file() else " (predict --run)"
        raise RecordError(f"run: {run} holds no predict.yaml; name the folder of a measurement{example}")
    settings = read_config(config)
    if lacking := [name for name in ("model", "data") if not isinstance(settings.get(name), dict)]:
        raise RecordError(f"run: {config} says nothing of the {lacking[0]}; restore it, or name another measurement")
    # Of the trainer only what an answer or a verdict depends on: loggers and plugins of a stranger's are left out.
    trainer_settings = settings.get("trainer")
    kept_settings = trainer_settings if isinstance(trainer_settings, dict) else {}
    callbacks = kept_settings.get("callbacks")
    settings["trainer"] = {key: kept_settings[key] for key in ("accelerator", "precision") if key in kept_settings} | {
        "callbacks": [
            each
            for each in (callbacks if isinstance(callbacks, list) else [])
            if isinstance(each, dict) and each.get("class_path") == "callbacks.judge_responses.JudgeResponses"
        ]
    }
    check(config, named_in(settings, run), "run", trust_config, addresses, api_key_variable)
    find_beside_the_shell()
    with locked(run):
        _ask_again(run, settings, sample, batch_size, dtype, seed)


def _ask_again(run: Path, settings: dict[str, Any], sample: int, batch_size: int, dtype: str | None, seed: int) -> None:
    """Asks, judges, writes and prints, in a folder that is locked."""
    # As text, not as the file: what was checked is what is used.
    line = ["predict", "--config", yaml.safe_dump(settings), "--run", str(run), "--data.num_workers", "0"]
    line += ["--model.vlm.dtype", dtype] if dtype else []
    hush()
    with as_command_line(line):
        cli = IdleCLI(line, build=True)
    if not isinstance(cli.model, Measure):
        raise RecordError(f"run: {run} holds no measurement but a {type(cli.model).__name__}; name a measurement")

    before = {response.id: response for response in read_responses(run)}
    cli.datamodule.prepare_data()
    questions = {example.question.id: example.question for example in cli.datamodule.parts.predict}
    for name, response in before.items():
        if name in questions and response.question.prompt != questions[name].prompt:
            raise RecordError(
                f"{run / RESPONSES}: {name} answers another question than the run's data asks; restore the file"
            )
    chosen = sorted(before.keys() & questions.keys())
    if not chosen:
        raise RecordError(f"{run / RESPONSES}: none of its answers is about the data that {run / 'predict.yaml'} names")
    if others := len(before) - len(chosen):
        say(f"{others} answers are about other data than {run / 'predict.yaml'} names, and are left out")
    random.Random(seed_for(seed, "verify")).shuffle(chosen)
    # Questions and images of the data: what responses.jsonl names as an image may be any file.
    asked = [Example(questions[name]) for name in chosen[:sample]]
    loader: DataLoader[Example] = DataLoader(asked, batch_size, collate_fn=cli.model.collator)  # type: ignore[arg-type]
    kept = Kept()
    trainer = L.Trainer(
        devices=1,
        precision=cli.trainer.precision,
        callbacks=[kept],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.predict(cli.model, loader, return_predictions=False)
    after = {record.id: record for record in kept.records if isinstance(record, Response)}

    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    panel = next((callback.panel for callback in callbacks if hasattr(callback, "panel")), None)
    verdicts: dict[str, tuple[str, str]] = {}
    if panel is not None and (run / "verdicts.jsonl").is_file():
        old = {verdict.id: verdict.label for verdict in read_records(run / "verdicts.jsonl", Verdict)}
        judged = [response for response in after.values() if response.id in old]
        new = {verdict.id: verdict.label for verdict in panel.judge(judged)}
        verdicts = {name: (old[name], label) for name, label in new.items()}

    write_jsonl(
        run / FLIPS,
        (
            {
                "id": name,
                "response": before[name].response,
                "again": response.response,
                "label": verdicts.get(name, (None, None))[0],
                "label_again": verdicts.get(name, (None, None))[1],
            }
            for name, response in after.items()
            if response.response != before[name].response
        ),
    )
    answer = {example.question.id: example.question.answer for example in asked}
    show(
        f"{run}: asked again, {batch_size} at a time" + (f", in {dtype}" if dtype else ""),
        [before[name].response != response.response for name, response in after.items()],
        [old != new for old, new in verdicts.values()],
        [((old == answer[name]), (new == answer[name])) for name, (old, new) in verdicts.items()],
    )
    if len(after) < len(asked):
        say(f"{len(asked) - len(after)} questions have no answer this time")
    say(f"what flipped: {run / FLIPS}")


def show(title: str, answers: Sequence[bool], verdicts: Sequence[bool], right: Sequence[tuple[bool, bool]]) -> None:
    """Prints how many flipped, and how far the table could move.

    Args:
        title: of the table.
        answers: of each question, whether its answer differs.
        verdicts: of each judged answer, whether its verdict differs.
        right: of each judged answer, whether it was right before, and the second time.
    """
    caption = f"95 % intervals: Clopper-Pearson; the sample is random, so they are for the run\n{JUDGE_NOTE}"
    table = TextTable(title=title, caption=caption)
    for heading in ("", "of", "flipped", "% [95 %]"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, flips in (("answers", answers), ("verdicts", verdicts)):
        if flips:
            low, high = binomtest(sum(flips), len(flips)).proportion_ci()
            share = f"{100 * sum(flips) / len(flips):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            table.add_row(name, str(len(flips)), str(sum(flips)), share)
    show_table(table)
    if right:
        once, again = (100 * sum(column) / len(right) for column in zip(*right, strict=True))
        most = 100 * binomtest(sum(verdicts), len(verdicts)).proportion_ci().high
        say(
            f"accuracy on the sample: {once:.1f} %, then {again:.1f} %; that of the whole run moves by at most "
            f"{most:.1f} points (upper end of the verdicts' interval)"
        )
