"""Public Python interface besides data frames of runs: a judge, a VLM to query, and a plot.

Mistakes in arguments raise :class:`safervlm.errors.ArgumentError`, files that can't be used
:class:`safervlm.errors.RecordError`; both have one line that names the remedy.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import matplotlib as mpl
import pandas as pd
import torch
from jsonargparse import ArgumentError as ParserError
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from PIL import Image

from safervlm.cli.classes import import_classes
from safervlm.cli.messages import one_line
from safervlm.errors import ArgumentError, RecordError, UserError
from safervlm.io.boundary import causes
from safervlm.io.reading import read_object
from safervlm.io.tables import say
from safervlm.judging.classifier import BATCH_SIZE, Judge
from safervlm.judging.files import WEIGHTS
from safervlm.protocol import LABELS, NOT_APPLICABLE
from safervlm.ranges import in_range
from safervlm.recipes import local_or_shipped
from safervlm.records import Example, Question
from safervlm.reports.figures import STYLE, plot_gap
from safervlm.reports.runs import Run, run_names
from safervlm.results.runs import load_run
from safervlm.vlm.base import VLM, Generation, require_responses
from safervlm.vlm.family import family_of
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.thinking import many_unfinished

AnyImage = str | Path | Image.Image | None
AnyRun = str | Path | pd.DataFrame
Each = TypeVar("Each")


def _texts(texts: str | Iterable[str], name: str) -> list[str]:
    found: list[Any] = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]
    if wrong := [text for text in found if not isinstance(text, str)]:
        raise ArgumentError(f"{name}: a text, or several; got {wrong[0]!r:.80}, a {type(wrong[0]).__name__}")
    return found


def _device(device: str | torch.device | None) -> torch.device:
    gpu = torch.cuda.is_available()
    try:
        found = torch.device(device or ("cuda" if gpu else "cpu"))
    except RuntimeError:
        raise ArgumentError(f"device: 'cpu', 'cuda' or 'cuda:1', got {device!r}") from None
    if found.type == "cuda" and not gpu:
        raise ArgumentError(f"device: {str(found)!r}, but there is no GPU that torch can use; leave it out")
    return found


class ResponseJudge:
    """Judge of responses: ``safervlm.Judge.from_pretrained(...).judge(texts)``.

    Args:
        judge: Classifier to use; its weights are loaded by the constructor.
        device: Device of its weights; None for a GPU if there is one.
    """

    def __init__(self, judge: Judge, device: str | torch.device | None = None) -> None:
        judge.configure_model()
        self.classifier = judge.to(_device(device))

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        labels: str | Sequence[str] | None = None,
        base: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Loads a judge.

        Args:
            checkpoint: Folder that ``fit`` exported (``runs/judge/judge``), or a state dict in the published format,
                local or on the Hub: ``yiting/alignment_classifier:epoch_10.pt``.
            labels: Labels in the order of its outputs, or the capability whose labels they are: ``alignment`` or
                ``perception``. By default those stated in an exported folder, else those of alignment.
            base: RoBERTa with the configuration and tokenizer. By default the folder of the checkpoint if it has them,
                else ``roberta-base``.
            device: Device of its weights; None for a GPU if there is one.

        Raises:
            ArgumentError: The checkpoint is missing, unreadable or does not fit ``labels`` and ``base``.
        """
        path = Path(checkpoint)
        if labels is None:
            exported = (path / WEIGHTS).is_file() and (path / "config.json").is_file()
            named = read_object(path / "config.json", "export the judge again").get("id2label") if exported else None
            labels = "alignment" if not isinstance(named, dict) else [named[key] for key in sorted(named, key=int)]
        if isinstance(labels, str):
            known: dict[str, Sequence[str]] = {each: LABELS[each] for each in ("alignment", "perception")}
            if labels not in known:
                raise ArgumentError(f"labels: 'alignment', 'perception', or a list of labels; got {labels!r}")
            labels = known[labels]
        if base is None:
            beside = path.is_file() and (path.parent / "config.json").is_file()
            base = path.parent if beside else "roberta-base"
        return cls(Judge(str(checkpoint), labels, str(base)), device)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that the judge distinguishes."""
        return self.classifier.labels

    def judge(self, texts: str | Iterable[str], batch_size: int = BATCH_SIZE) -> pd.DataFrame:
        """Classifies responses in the same way as a measurement: a blank text is N/A.

        Args:
            texts: A response, or several.
            batch_size: Number of responses in a forward pass.

        Returns:
            One row per response, in the given order: ``text``, ``label`` (the most probable one), ``probability`` (its
            probability), and the probability of each label in a column of its name.

        Raises:
            ArgumentError: Something is not a text, or ``batch_size`` is less than 1.
            RecordError: A probability is not finite.
        """
        in_range(least=1, batch_size=batch_size)
        found = _texts(texts, "texts")
        blank = NOT_APPLICABLE in self.labels
        worded = [number for number, text in enumerate(found) if text.strip() or not blank]
        rows = [[float(label == NOT_APPLICABLE) for label in self.labels] for _ in found]
        read = self.classifier.judge([found[number] for number in worded], batch_size).exp().tolist()
        for number, row in zip(worded, read, strict=True):
            rows[number] = row
        best = [max(range(len(row)), key=row.__getitem__) for row in rows]
        table = pd.DataFrame({"text": pd.Series(found, dtype=object)})
        table["label"] = pd.Series([self.labels[number] for number in best], dtype=object)
        table["probability"] = [row[number] for row, number in zip(rows, best, strict=True)]
        for number, label in enumerate(self.labels):
            table[label] = [row[number] for row in rows]
        return table


class LoadedVLM:
    """Vision-language model that generates and scores responses; returned by :func:`load_vlm`.

    Args:
        vlm: Model; its weights are loaded by the constructor.
        device: Device of its weights; None for a GPU if there is one.
    """

    def __init__(self, vlm: VLM, device: str | torch.device | None = None) -> None:
        self.device = _device(device)
        vlm.load()
        self.vlm = vlm.to(self.device)

    @overload
    def ask(
        self, image: AnyImage, question: str, sampling: Sampling = ..., seed: int = ..., batch_size: int = ...
    ) -> str: ...

    @overload
    def ask(
        self,
        image: AnyImage | Sequence[AnyImage],
        question: str | Sequence[str],
        sampling: Sampling = ...,
        seed: int = ...,
        batch_size: int = ...,
    ) -> str | list[str]: ...

    def ask(
        self,
        image: AnyImage | Sequence[AnyImage],
        question: str | Sequence[str],
        sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008 (frozen)
        seed: int = 0,
        batch_size: int = 8,
    ) -> str | list[str]:
        """Asks a question about an image, or several.

        Args:
            image: Path, or image of PIL; None for a question without an image. A list gives each question its own
                image, or asks one question about each.
            question: Text, without the model's conversation template. A list asks several questions about the image.
            sampling: Decoding settings; the default selects the most probable token.
            seed: Seed of the sampling. A response depends on it and on its place in the list, not on ``batch_size``.
            batch_size: Number of questions that are answered at once.

        Returns:
            The response without reasoning, empty if the thinking is unfinished; a list of responses if ``image`` or
            ``question`` is a list.

        Raises:
            ArgumentError: Lists of different lengths, or something that is not an image or a text.
            RecordError: An image can't be read, or the model has no response to a question.
        """
        in_range(least=1, batch_size=batch_size)
        images = _images(image)
        questions = _texts(question, "question")
        one = not isinstance(image, list | tuple) and isinstance(question, str)
        if len(images) != len(questions) and 1 not in (len(images), len(questions)):
            raise ArgumentError(
                f"question: {len(questions)} for {len(images)} images; give as many, or a single question or image"
            )
        count = 0 if 0 in (len(images), len(questions)) else max(len(images), len(questions))
        images, questions = (_repeated(images, count), _repeated(questions, count))
        answers: list[Generation] = []
        with ExitStack() as files:
            examples = [Example(each) for each in _questions(images, questions, files)]
            for start in range(0, count, batch_size):
                batch = self.vlm.collator(examples[start : start + batch_size]).to(self.device)
                answers += require_responses(self.vlm.generate(batch, sampling, seed))
        unfinished = sum(not each.answered for each in answers)
        if line := many_unfinished("answer", unfinished, len(answers)):
            say(line)
        texts = [each.text for each in answers]
        return texts[0] if one else texts

    def score(self, image: AnyImage, question: str, completions: str | Iterable[str]) -> pd.DataFrame:
        """Computes the log-probabilities of responses to a question; the model prefers the most probable response.

        Args:
            image: Path, or image of PIL; None for a question without an image.
            question: Text, without the model's conversation template.
            completions: A response, or several.

        Returns:
            One row per response, in the given order: ``completion``, ``log_probability`` (in nats, of the whole
            response with its end token), ``tokens`` (their number, with the end token) and ``per_token``
            (log-probability divided by tokens).

        Raises:
            ArgumentError: No response is given, something is not an image or a text, or the model is behind a server.
            RecordError: The image can't be read, or a text is too long.
        """
        texts = _texts(completions, "completions")
        if not texts:
            raise ArgumentError("completions: none is given; give a text, or several")
        if not isinstance(self.vlm, LocalVLM):
            raise ArgumentError(
                f"vlm: {type(self.vlm).__name__} returns no log-probabilities; load the weights of a model instead"
            )
        with ExitStack() as files, torch.no_grad():
            (asked,) = _questions(_images([image]), _texts([question], "question"), files)
            batch = self.vlm.collator([Example(asked, tuple(texts))]).to(self.device)
            scored = self.vlm.score(batch)
        table = pd.DataFrame({"completion": pd.Series(texts, dtype=object)})
        table["log_probability"] = scored.logprobs.double().sum(dim=1).tolist()
        table["tokens"] = scored.mask.sum(dim=1).tolist()
        table["per_token"] = table["log_probability"] / table["tokens"]
        return table


def _images(image: AnyImage | Sequence[AnyImage]) -> list[AnyImage]:
    found = list(image) if isinstance(image, list | tuple) else [image]
    if wrong := [each for each in found if not isinstance(each, str | Path | Image.Image | None)]:
        raise ArgumentError(f"image: a path, an image of PIL or None, got a {type(wrong[0]).__name__}")
    return found  # type: ignore[return-value]


def _repeated(items: list[Each], count: int) -> list[Each]:
    return items * count if len(items) == 1 else items[:count]


def _questions(images: Sequence[AnyImage], questions: Sequence[str], files: ExitStack) -> list[Question]:
    """Returns the questions; images of PIL are written to files that exist until ``files`` is closed."""
    written: dict[int, Path] = {}
    made = []
    for number, (image, question) in enumerate(zip(images, questions, strict=True)):
        path = None if image is None else str(image)
        name = f"question {number}" if path is None else f"{Path(path).name}, question {number}"
        if isinstance(image, Image.Image):
            if id(image) not in written:
                folder = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="safervlm-")))
                written[id(image)] = folder / "image.png"
                as_png = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
                as_png.save(written[id(image)])
            path, name = str(written[id(image)]), f"question {number}"
        made.append(Question(name, "", name, path, "alignment", 0, question, "", "", ""))
    return made


def load_vlm(name: str | Path, device: str | torch.device | None = None, **settings: Any) -> LoadedVLM:
    """Loads a vision-language model.

    Args:
        name: Name on the Hugging Face Hub or folder of a model, whose class is chosen by its ``config.json``; or a
            recipe of a VLM: a YAML file, or the name of one in ``configs/vlm`` (``llava-1.5-7b``).
        device: Device of its weights; None for a GPU if there is one.
        **settings: Arguments of the model's class, such as ``adapter="runs/ppo/adapter"``. ``dtype`` is by default
            ``float32`` without a GPU.

    Returns:
        The model; its weights are loaded.

    Raises:
        ArgumentError: There is no such model, or it has no such setting.
    """
    import_classes()
    given = str(name)
    target = _device(device)
    shipped = Path(local_or_shipped(f"configs/vlm/{given}.yaml"))
    file = Path(local_or_shipped(given)) if given.endswith((".yaml", ".yml")) else shipped
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VLM, "vlm")
    try:
        if file.is_file() and not Path(given).is_dir():
            parsed = parser.parse_args(["--vlm", str(file)])
        else:
            family = family_of(given, settings.get("revision"))
            start = {"class_path": f"{family.__module__}.{family.__qualname__}", "init_args": {"model": given}}
            parsed = parser.parse_object({"vlm": start})
            if target.type == "cpu":
                settings = {"dtype": "float32", **settings}
        if settings:
            both = {**parsed.vlm.init_args.as_dict(), **settings}
            parsed = parser.parse_object({"vlm": {"class_path": parsed.vlm.class_path, "init_args": both}})
        vlm = parser.instantiate(parsed).vlm
    except (ParserError, TypeError, ValueError) as error:
        if said := next((each for each in causes(error) if isinstance(each, UserError)), None):
            raise said from None
        raise ArgumentError(f"vlm: {given!r}: {one_line(str(error))}") from error
    return LoadedVLM(vlm, target)


def gap_figure(runs: AnyRun | Sequence[AnyRun] | Mapping[str, AnyRun]) -> Figure:
    """Plots the modality gap of every concept: accuracy on its name minus accuracy on its images.

    Args:
        runs: A run folder or a data frame of ``load_run``, a list of them, or a mapping of names to them.

    Returns:
        Figure of Matplotlib, with a line of dots per run, and the mean over concepts with its 95 % interval.

    Raises:
        ArgumentError: There is no run, or a folder is named twice.
        RecordError: A run can't be read, or no run has concepts that were asked both by name and by image.
    """
    if isinstance(runs, Mapping):
        named: dict[str, AnyRun] = dict(runs)
    else:
        several: list[Any] = list(runs) if isinstance(runs, list | tuple) else [runs]
        folders = [Path(run) for run in several if isinstance(run, str | Path)]
        names = iter(run_names(folders))
        named = {
            next(names) if isinstance(run, str | Path) else f"run {number}": run
            for number, run in enumerate(several, 1)
        }
    if not named:
        raise ArgumentError("runs: none is given; give a run folder, or a data frame of load_run")
    found = []
    for name, run in named.items():
        if not isinstance(run, str | Path | pd.DataFrame):
            raise ArgumentError(f"runs: a run folder or a data frame of load_run, got a {type(run).__name__}")
        frame = run if isinstance(run, pd.DataFrame) else load_run(run)
        found.append(Run(name, Path(name), frame, pd.DataFrame(), {}))
    with mpl.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure = plot_gap(found)
    if figure is None:
        raise RecordError(
            f"{', '.join(named)}: no concept was asked both by name and by image; measure alignment and "
            "alignment_text_only"
        )
    return figure
