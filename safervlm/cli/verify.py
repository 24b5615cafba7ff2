"""``safervlm verify``: repeats a sample of a measurement's questions, one by one or in another precision."""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from scipy.stats import binomtest
from torch.utils.data import DataLoader

from safervlm.cli.lightning import IdleCLI, as_command_line, silence_third_party
from safervlm.data.benchmark import Benchmark
from safervlm.data.loaders import limited
from safervlm.data.responses import read_responses
from safervlm.data.suite import Suite
from safervlm.errors import ArgumentError, RecordError
from safervlm.hashing import fingerprint, seed_for
from safervlm.io.boundary import warn
from safervlm.io.tables import JUDGE_NOTE, TextTable, say, show_table
from safervlm.io.trust import Named, allow_imports_from_current_folder, check_trust, named_in, read_config
from safervlm.judging.panel import Panel
from safervlm.manifest import stage_name
from safervlm.measure import Measure
from safervlm.progress_lines import progress_lines
from safervlm.ranges import in_range
from safervlm.records import Example, Failure, Response, Verdict, read_records, write_jsonl
from safervlm.run import locked, read_manifest, require_same_noise, require_same_weights
from safervlm.run_folder import RunFolder
from safervlm.unfinished import UnfinishedFile
from safervlm.vlm.server.client import Server
from safervlm.vlm.thinking import thinking_unfinished


class ResponseStore(L.Callback):
    """Callback that stores the responses of each batch; Lightning's ``return_predictions`` would split them up.

    Args:
        file: File to append to.
    """

    def __init__(self, file: UnfinishedFile[Response]) -> None:
        self.file = file

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *place: Any) -> None:
        """Stores the records of a batch."""
        self.file.append(outputs)


def verify(
    run: Path,
    sample: int = 100,
    batch_size: int = 1,
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
    addresses: list[str] | None = None,
    api_key_variable: str | None = None,
    trust_config: bool = False,
    limit: int | None = None,
) -> None:
    """Repeats a sample of a run's questions and counts the responses and the verdicts that flip.

    The sampling noise of a response is derived from the record's id, so differences come from arithmetic: another batch
    size or precision. A verdict is compared only if it is by the same judge and about the run's current response. Flips
    are written to verify.jsonl in the run folder, as are questions without a response this time and responses that
    can't be classified, with the reason; the exit code is then 3. The questions and images are those of the data that
    the run's predict.yaml names. The folder may be from others: addresses, an environment variable and classes that
    are not SaferVLM's are used only if you repeat or allow them.

    Args:
        run: The folder of a finished measurement.
        sample: Number of questions to repeat, sampled at random.
        batch_size: Batch size of the repetition; 1 asks the questions one by one.
        dtype: Precision of the weights in the repetition; by default that of the run.
        seed: Seed of the sample.
        addresses: All addresses that the run's configuration names, repeated to allow contacting them.
        api_key_variable: The environment variable that the run's configuration names for a server's key, repeated to
            allow sending its value there.
        trust_config: Allow classes and model code that the run's configuration names and that are not SaferVLM's.
        limit: Sample only from the first so many questions of each dataset and capability; None samples from all.

    Raises:
        RecordError: The run has no responses or no configuration, or its responses are not about its data.
        ArgumentError: Something in the configuration is not allowed, or an argument is out of its range.
        SystemExit: With exit code 3 at the end, if a question has no response or a response no verdict.
    """
    if not str(run).strip("."):
        raise ArgumentError(f"run: the folder of a measurement, got {str(run)!r}")
    in_range(least=1, sample=sample, batch_size=batch_size, limit=limit)
    run = Path(run)
    files = RunFolder(run)
    config = files.predict_config
    if not config.is_file():
        inside = files.evaluation
        example = f", for example {inside}" if RunFolder(inside).predict_config.is_file() else " (predict --run)"
        raise RecordError(f"run: {run} contains no predict.yaml; name the folder of a measurement{example}")
    settings = read_config(config)
    if lacking := [name for name in ("model", "data") if not isinstance(settings.get(name), dict)]:
        raise RecordError(f"run: {config} lacks the {lacking[0]}; restore it, or name another measurement")
    # Of the trainer only the settings that affect responses and verdicts: untrusted loggers and plugins are excluded.
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
    check_trust(config, named_in(settings, run), "run", trust_config, addresses, api_key_variable)
    allow_imports_from_current_folder()
    with locked(run):
        cli = _built(run, settings, dtype)
        check_trust(config, _used_by(cli), "run", trust_config, addresses, api_key_variable)
        describe = cli.model.describe()
        settings_before = read_manifest(run)["stages"].get(stage_name(cli.model), {}).get("settings", {})
        if "model" in settings_before:
            require_same_noise(run, "measure", settings_before["model"].get("noise"), describe.get("noise"), "run")
            require_same_weights(run, settings_before["model"], describe)
        before = {response.id: response for response in read_responses(run)}
        asked = _sample(run, cli, before, sample, limit, seed)
        key = fingerprint(files.responses, json.dumps([settings, describe, batch_size, dtype]))
        again = _ask_again(run, cli, asked, batch_size, key)
        compared = _compare(run, cli, before, again)
        title = f"{run}: repeated, {batch_size} at a time" + (f", in {dtype}" if dtype else "")
        _write(run, title, asked, before, compared)


def _built(run: Path, settings: dict[str, Any], dtype: str | None) -> IdleCLI:
    """Creates model, data and trainer of the run."""
    # Passed as text, not as the file, so that exactly the checked settings are used.
    line = ["predict", "--config", yaml.safe_dump(settings), "--run", str(run), "--data.num_workers", "0"]
    line += ["--model.vlm.dtype", dtype] if dtype else []
    silence_third_party()
    with as_command_line(line):
        cli = IdleCLI(line, build=True)
    if not isinstance(cli.model, Measure):
        raise RecordError(
            f"run: {run} is not a measurement but a run of {type(cli.model).__name__}; name a measurement"
        )
    return cli


def _used_by(cli: IdleCLI) -> Named:
    """Returns the addresses and environment variables that model and data actually use.

    They depend not only on the text of the configuration, but also on the defaults and the code of a class.
    """
    used = Named()
    for server in cli.model.modules():
        if isinstance(server, Server):
            used.addresses |= {host.address for host in server.hosts}
            used.variables.add(server.api_key_variable)
    sets = cli.datamodule.sets.values() if isinstance(cli.datamodule, Suite) else [cli.datamodule]
    for data in sets:
        if isinstance(data, Benchmark) and data.remote == "web":
            used.addresses.add(data.source.rstrip("/"))
    return used


def _sample(
    run: Path, cli: IdleCLI, before: Mapping[str, Response], sample: int, limit: int | None, seed: int
) -> list[Example]:
    """Samples the questions to repeat from the run's data: the responses' records could name any file as an image."""
    files = RunFolder(run)
    cli.datamodule.prepare_data()
    questions = {example.question.id: example.question for example in cli.datamodule.parts.predict}
    for name, response in before.items():
        if name in questions and response.question.prompt != questions[name].prompt:
            raise RecordError(
                f"{files.responses}: {name} is the response to another question than that of the run's data; "
                "restore the file"
            )
    there = [question for name, question in questions.items() if name in before]
    if not there:
        raise RecordError(
            f"{files.responses}: none of its responses is about the data that {files.predict_config} names"
        )
    if others := len(before) - len(there):
        say(f"{others} responses are about other data than {files.predict_config} names, and are excluded")
    first = limited(there, limit, lambda question: (question.dataset, question.capability))
    chosen = sorted(first, key=lambda question: question.id)
    random.Random(seed_for(seed, "verify")).shuffle(chosen)
    return [Example(question) for question in chosen[:sample]]


def _ask_again(
    run: Path, cli: IdleCLI, asked: Sequence[Example], batch_size: int, key: str
) -> list[Response | Failure]:
    """Returns the responses, or failures, of the repetition; an interrupted one with this key is resumed."""
    key = fingerprint(key, *(example.question.id for example in asked))
    with UnfinishedFile(RunFolder(run).repeated_responses, key, Response) as file:
        left = asked[len(file.chunks) * batch_size :]
        if file.chunks and left:
            say(f"{len(asked) - len(left)} questions were repeated before, continuing with the remaining {len(left)}")
        if left:
            loader: DataLoader[Example] = DataLoader(left, batch_size, collate_fn=cli.model.collator)  # type: ignore[arg-type]
            trainer = L.Trainer(
                accelerator=cli.trainer.accelerator,
                devices=1,
                precision=cli.trainer.precision,
                callbacks=[ResponseStore(file), *progress_lines()],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
            )
            trainer.predict(cli.model, loader, return_predictions=False)
    return [record for batch in file.chunks for record in batch]


@dataclass
class Compared:
    """Results of the repetition.

    Attributes:
        answers: Question's id -> response of the repetition.
        verdicts: Question's id -> label before, and label of the repetition.
        failed: Questions without a response, and responses without a verdict.
    """

    answers: dict[str, Response]
    verdicts: dict[str, tuple[str, str]]
    failed: list[Failure]


def _compare(run: Path, cli: IdleCLI, before: Mapping[str, Response], again: Sequence[Response | Failure]) -> Compared:
    """Judges the repeated responses whose first response was judged by the same judge."""
    files = RunFolder(run)
    answers = {record.id: record for record in again if isinstance(record, Response)}
    compared = Compared(answers, {}, [record for record in again if isinstance(record, Failure)])
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    panel: Panel | None = next((callback.panel for callback in callbacks if hasattr(callback, "panel")), None)
    if panel is None or not files.verdicts.is_file():
        return compared
    old: dict[str, str] = {}
    others = 0
    for verdict in read_records(files.verdicts, Verdict):
        if verdict.id not in answers:
            continue
        first = before[verdict.id]
        if verdict.judge == panel.judge_id(first.question.capability) and verdict.is_of(first.response):
            old[verdict.id] = verdict.label
        else:
            others += 1
    if others:
        say(
            f"{others} verdicts in {files.verdicts} are another judge's, or about other texts (or of version 0.1), and "
            "are not compared"
        )
    judged = [(answers[name].question, answers[name].response) for name in old]
    for record in panel.judged_in_batches(judged, RunFolder(run).repeated_verdicts):
        if isinstance(record, Failure):
            compared.failed.append(record)
        else:
            compared.verdicts[record.id] = old[record.id], record.label
    return compared


def _write(run: Path, title: str, asked: Sequence[Example], before: Mapping[str, Response], compared: Compared) -> None:
    """Writes and prints the flips and failures; exits with code 3 if there are failures."""
    files = RunFolder(run)
    answers, verdicts, failed = compared.answers, compared.verdicts, compared.failed
    flips = []
    for name, response in answers.items():
        labels = verdicts.get(name, (None, None))
        if response.response != before[name].response or labels[0] != labels[1]:
            both = {"response": before[name].response, "again": response.response}
            flips.append({"id": name, **both, "label": labels[0], "label_again": labels[1]})
    write_jsonl(files.flips, [*flips, *({"id": failure.id, "reason": failure.reason} for failure in failed)])
    right = {example.question.id: example.question.answer for example in asked}
    inside = {name for name in verdicts if thinking_unfinished(before[name]) or thinking_unfinished(answers[name])}
    finished = {name: labels for name, labels in verdicts.items() if name not in inside}
    for unfinished in (files.repeated_responses, files.repeated_verdicts):
        unfinished.unlink(missing_ok=True)
    show(
        title,
        [before[name].response != response.response for name, response in answers.items()],
        [old != new for old, new in verdicts.values()],
        [(old == right[name], new == right[name]) for name, (old, new) in finished.items()],
        len(inside),
    )
    say(f"flips: {files.flips}")
    if failed:
        warn(
            f"{len(failed)} of {len(asked)} questions have no response or no verdict this time, for example: "
            f"{failed[0].reason}; {files.flips} lists them, the same command asks them again"
        )
        sys.exit(3)


def show(
    title: str, answers: Sequence[bool], verdicts: Sequence[bool], right: Sequence[tuple[bool, bool]], inside: int = 0
) -> None:
    """Prints the flip rates with 95 % Clopper-Pearson intervals, and a bound on the change of the run's accuracy.

    Args:
        title: Title of the table.
        answers: For each question, whether its response differs.
        verdicts: For each judged response, whether its verdict differs.
        right: For each judged response with finished thinking, whether it was correct before, and in the repetition.
        inside: Number of judged responses whose thinking was unfinished before or in the repetition. The accuracy
            excludes them, as the tables of a run do.
    """
    caption = f"95 % intervals: Clopper-Pearson; the sample is random, so they are for the run\n{JUDGE_NOTE}"
    table = TextTable(title=title, caption=caption)
    for heading in ("", "of", "flipped", "% [95 %]"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, flips in (("responses", answers), ("verdicts", verdicts)):
        if flips:
            low, high = binomtest(sum(flips), len(flips)).proportion_ci()
            share = f"{100 * sum(flips) / len(flips):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            table.add_row(name, str(len(flips)), str(sum(flips)), share)
    show_table(table)
    if not right:
        return
    once, again = (100 * sum(column) / len(right) for column in zip(*right, strict=True))
    said = f"accuracy on the sample: {once:.1f} %, then {again:.1f} %"
    if inside:
        # Then the number of responses that count differs, too, so the share of flips does not bound the change.
        say(f"{said}, without {inside} responses with unfinished thinking")
    else:
        most = 100 * binomtest(sum(verdicts), len(verdicts)).proportion_ci().high
        say(f"{said}; that of the whole run changes by at most {most:.1f} points (upper end of the verdicts' interval)")
