"""The judges: what a VLM's answer says, read by a RoBERTa classifier from the answer's text alone."""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from lightning import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers import AutoConfig, AutoTokenizer, RobertaConfig, RobertaModel, get_linear_schedule_with_warmup
from transformers.utils import cached_file

from safervlm.data.labelled import LabelCollator
from safervlm.errors import ArgumentError, RecordError, first_line
from safervlm.finite import TrainingGuard, must_be_trained
from safervlm.hashing import fingerprint
from safervlm.io.escape import for_csv
from safervlm.io.files import write_atomically
from safervlm.io.tables import TextTable, show_table
from safervlm.io.texts import tokenizable
from safervlm.protocol import LABELS
from safervlm.ranges import in_range
from safervlm.vlm.weights import load_model, must_be_finite, read_tensors, reading, weights_fingerprint

WEIGHTS = "model.safetensors"
# Keys that a checkpoint may hold and this model does not: older versions of transformers saved the positions, which
# are 0, 1, 2, ... for every RoBERTa; the pooler stands behind a classifier that reads the first token itself.
UNREAD_KEYS = frozenset({"roberta.embeddings.position_ids", "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"})
BATCH_SIZE = 64  # answers read at once, where nothing else is said
# Log-probabilities this close could change places by rounding, which moves them by about 1e-7.
NEAR_TIE = 1e-4


class Judge(LightningModule):
    """A classifier of answers: RoBERTa and a linear layer on the first token's last hidden state.

    It reads the answer's text alone, neither question nor image. A text longer than the model's positions (512 tokens
    for roberta-base) is cut there, as the published classifiers cut it. An empty text is judged like any other: the
    verdict is what the model says.

    As a judge of a :class:`Panel` or the reward of an objective it is frozen: always in eval mode, without gradients,
    in float32 whatever the precision around it. Only ``fit`` of the judge itself trains it. The weights are loaded at
    first use.

    After ``fit`` the run folder holds ``judge/`` (see :meth:`save_pretrained`) and ``confusion.csv``, the held-out
    answers' confusion matrix: a row a true label, a column a read one.

    Args:
        checkpoint: The weights: a plain state dict in the published classifiers' form (``epoch_10.pt``), here or on
            the Hub as ``owner/name:file`` (``yiting/alignment_classifier:epoch_10.pt``), or a folder that ``fit``
            exported. Nothing to fit a new judge on the weights of ``base``.
        labels: What the judge tells apart, in the order of its outputs. The default is the alignment judge's;
            perception's is A, B, C, D, N/A.
        base: The RoBERTa underneath, a folder or a name on the Hub: configuration and tokenizer, and the weights too
            where there is no checkpoint. A folder as checkpoint brings its own.
        lr: ``fit``: AdamW's highest learning rate.
        weight_decay: ``fit``: AdamW's weight decay.
        warmup: ``fit``: the part of all steps in which the learning rate rises, before it falls to 0, both linearly.
        label_smoothing: ``fit``: how much of the target goes to all labels alike; it bounds the judge's confidence,
            and with it the reward that PPO gets from it.
        max_characters: A longer text is cut there before it is tokenized, which takes time for each megabyte. The
            default is 128 characters, the longest token of roberta-base, for each of its 512 positions, so that it
            changes no token that the model sees.

    Raises:
        ArgumentError: a number is out of its range; at first use, for a checkpoint that is missing, unreadable, or not
            exactly this model's.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        labels: Sequence[str] = LABELS["alignment"],
        base: str = "roberta-base",
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
        max_characters: int = 65_536,
    ) -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ArgumentError(f"labels: a judge tells at least two different labels apart, got {list(labels)}")
        in_range(least=1, max_characters=max_characters)
        in_range(above=0, lr=lr)
        in_range(least=0, weight_decay=weight_decay)
        in_range(least=0, most=1, warmup=warmup)
        in_range(least=0, below=1, label_smoothing=label_smoothing)
        self.max_characters = max_characters
        self.checkpoint = checkpoint
        self.labels = tuple(labels)
        self.base = base
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.label_smoothing = label_smoothing
        self.collator = LabelCollator(self.labels)
        self.confusion = MulticlassConfusionMatrix(len(labels))
        self._fitting = False
        self._fingerprint: str | None = None
        self._held_out: Tensor | None = None
        self.train(False)

    def must_tell(self, labels: Sequence[str], name: str) -> None:
        """Refuses to stand for a judge of other labels.

        Args:
            labels: what it has to tell apart, in this order.
            name: the argument that names the judge, for the error.
        """
        if self.labels != tuple(labels):
            raise ArgumentError(f"{name}: it tells {', '.join(self.labels)}; name a judge of {', '.join(labels)}")

    # Loading and saving

    def configure_callbacks(self) -> list[Callback]:
        """Stops the judge's own ``fit`` where a number is not finite."""
        return [TrainingGuard()]

    def setup(self, stage: str) -> None:
        """Thaws the judge for its own ``fit``: Lightning calls this for the module it runs, not for modules within."""
        self._fitting = stage == "fit"

    def teardown(self, stage: str) -> None:
        """Freezes it again."""
        self._fitting = False
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Judge":
        """Stays in eval mode unless the judge itself is being fitted."""
        return super().train(mode and self._fitting)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Judge":
        # Everything that moves or converts a module ends here. The judge follows to another device and stays in
        # float32: rounded weights would be another judge than the one whose fingerprint its verdicts carry.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def configure_model(self) -> None:
        """Loads the weights, once; freezes them unless the judge itself is being fitted."""
        if not hasattr(self, "classifier"):
            parts = self._load()
            self.roberta, self.classifier = parts["roberta"], parts["classifier"]
            self.to(self.device)
        self.requires_grad_(self._fitting)
        self.train(self._fitting)

    def _load(self) -> dict[str, Any]:
        base = self._base
        weights = self._weights
        with reading(base, "base"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        if not isinstance(config, RobertaConfig):
            raise ArgumentError(f"base: {base!r} is a {config.model_type}; the judge is built on a RoBERTa")
        if weights is not None and weights.name == WEIGHTS:
            saved = tuple(config.id2label[number] for number in sorted(config.id2label))
            if saved != self.labels:
                raise ArgumentError(
                    f"labels: {', '.join(self.labels)}, but the judge in {base!r} tells {', '.join(saved)} apart"
                )
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: number for number, label in enumerate(self.labels)}
        if weights is None:
            # A masked language model's head isn't read.
            roberta: Any = load_model(
                RobertaModel,
                base,
                "base",
                whole=False,
                add_pooling_layer=False,
                dtype=torch.float32,
                weights_only=True,
            )
        else:
            roberta = RobertaModel(config, add_pooling_layer=False)
        # float32 whatever the trainer's precision: rounded weights would be another judge.
        model = nn.ModuleDict({"roberta": roberta, "classifier": nn.Linear(config.hidden_size, len(self.labels))})
        model = model.float()
        if weights is not None:
            model.load_state_dict(self._checked_state(weights, model.state_dict()))
        self.config, self.tokenizer = config, tokenizer
        positions = config.max_position_embeddings - config.pad_token_id - 1
        self.max_length = min(tokenizer.model_max_length, positions)
        return dict(model.items())

    @property
    def _weights(self) -> Path | None:
        """The file of the checkpoint's weights."""
        return None if self.checkpoint is None else _checkpoint_file(self.checkpoint)

    @property
    def _base(self) -> str:
        """Where configuration and tokenizer are: a folder that was exported brings its own."""
        folder = self.checkpoint is not None and Path(self.checkpoint).is_dir()
        return str(self.checkpoint) if folder else self.base

    def _checked_state(self, file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict in ``file``, which must be ``expected``'s to the key and the shape."""
        tensors = read_tensors(file, "checkpoint")
        state = {key: value for key, value in tensors.items() if key not in UNREAD_KEYS}
        problems = [f"{key} is missing" for key in expected if key not in state]
        problems += [f"{key} is not of this model" for key in state if key not in expected]
        outputs = state.get("classifier.weight")
        if outputs is not None and outputs.shape[:1] != (len(self.labels),):
            problems.insert(0, f"it tells {outputs.shape[0]} labels apart, labels names {', '.join(self.labels)}")
        problems += [
            f"{key} has shape {tuple(value.shape)}, {tuple(expected[key].shape)} is needed"
            for key, value in state.items()
            if key in expected and value.shape != expected[key].shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ArgumentError(
                f"checkpoint: {str(file)!r} doesn't fit a judge on base {self._base!r}: "
                + "; ".join(problems[:5])
                + more
            )
        must_be_finite(state.items(), f"checkpoint: {str(file)!r}")
        return state

    @property
    def fingerprint(self) -> str:
        """What tells this judge from another: a hash of weights, configuration and labels, 16 hexadecimal digits."""
        if self._fingerprint is None:
            weights = self._weights
            if weights is None:
                raise ArgumentError("checkpoint: a judge without one has to be fitted before it can judge")
            self._fingerprint = fingerprint(weights, _config_file(self._base), "\n".join(self.labels))
        return self._fingerprint

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that :class:`Judge` takes as ``checkpoint``: weights, configuration, labels, tokenizer.

        Args:
            folder: is made if it is missing. The weights are written last: a folder that holds them is whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        state = {
            key: value.detach().cpu().contiguous()
            for key, value in self.state_dict().items()
            if key.startswith(("roberta.", "classifier."))
        }
        write_atomically(folder / WEIGHTS, lambda file: save_file(state, file, metadata={"format": "pt"}))
        self._fingerprint = fingerprint(folder / WEIGHTS, _config_file(str(folder)), "\n".join(self.labels))

    def describe(self) -> dict[str, Any]:
        """What decides the result of ``fit``; of a judge in use that is its :attr:`fingerprint` alone."""
        return {
            "judge": None if self.checkpoint is None else self.fingerprint,
            "base": self._base if self.checkpoint is None else None,
            "base_weights": weights_fingerprint(self._base, None) if self.checkpoint is None else None,
            "labels": list(self.labels),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "warmup": self.warmup,
            "label_smoothing": self.label_smoothing,
        }

    # Judging

    @torch.no_grad()
    def judge(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Tensor:
        """Classifies answers.

        Texts of similar length are computed together, so that little is computed for padding. On one machine the
        neighbours of a text never change its most probable label, and its probabilities by less than 1e-5: matrices
        of another shape are rounded differently. Where the two most probable labels are closer than rounding could
        decide (:data:`NEAR_TIE`), the text is computed once more by itself.

        Args:
            texts: the answers.
            batch_size: how many are computed at once.

        Returns:
            Natural log-probabilities of the labels, float32 of shape (texts, labels), on the judge's device.
        """
        result = torch.empty(len(texts), len(self.labels), device=self.device, dtype=torch.float32)
        if not texts:
            return result
        self.configure_model()
        tokens = self._tokenize(texts)
        order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                result[part] = F.log_softmax(self._logits([tokens[index] for index in part]), dim=-1)
            best = result.topk(2, dim=-1).values
            for index in (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero().flatten().tolist():
                result[index] = F.log_softmax(self._logits([tokens[index]]), dim=-1)[0]
        if not bool(torch.isfinite(result).all()):
            place = int((~torch.isfinite(result).all(dim=-1)).nonzero()[0])
            raise RecordError(
                f"judge: {self._base!r} has no finite probabilities for the text {texts[place][:40]!r}; look at its "
                "weights, or name another judge"
            )
        return result

    def forward(self, texts: Sequence[str]) -> Tensor:
        """The labels' logits, of shape (texts, labels)."""
        return self._logits(self._tokenize(texts))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [tokenizable(text[: self.max_characters]) for text in texts]
        return self.tokenizer(cut, truncation=True, max_length=self.max_length)["input_ids"]

    def _logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        rows = [torch.tensor(row) for row in tokens]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token_id).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        # By length, not by id: a text may spell the padding token out.
        mask = torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]
        states = self.roberta(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        return self.classifier(states[:, 0])

    # Fitting

    def training_step(self, batch: tuple[list[str], Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, with label smoothing."""
        texts, targets = batch
        loss = F.cross_entropy(self(texts), targets, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(texts))
        return loss

    def validation_step(self, batch: tuple[list[str], Tensor], batch_idx: int) -> None:
        """Counts the held-out answers."""
        texts, targets = batch
        logits = self(texts)
        self.confusion.update(logits.argmax(dim=-1), targets)
        self.log("validation/loss", F.cross_entropy(logits, targets), sync_dist=True, batch_size=len(texts))

    def on_validation_epoch_start(self) -> None:
        """Starts counting; here, for what Lightning's inference mode resets can't be counted on outside of it."""
        self.confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs ``validation/accuracy``, of all held-out answers."""
        counts = self.confusion.compute()
        if not self.trainer.sanity_checking:
            self._held_out = counts
            accuracy = counts.trace() / counts.sum()
            self.log("validation/accuracy", accuracy)
            if self._fitting:
                self.print(f"epoch {self.current_epoch}: held-out accuracy {accuracy:.3f}")

    def on_fit_end(self) -> None:
        """Exports the judge, and reports the held-out answers' confusion matrix."""
        must_be_trained(self.trainer, self)
        if not self.trainer.is_global_zero:
            return
        run = Path(self.trainer.default_root_dir)
        self.save_pretrained(run / "judge")
        if self._held_out is not None:
            counts = self._held_out.long().tolist()
            write_atomically(run / "confusion.csv", lambda file: self._write_confusion(file, counts))
            self._print_confusion(counts)

    def _write_confusion(self, file: Path, counts: list[list[int]]) -> None:
        with file.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.writer(lines)
            writer.writerow(["label", *map(for_csv, self.labels)])
            writer.writerows([for_csv(label), *row] for label, row in zip(self.labels, counts, strict=True))

    def _print_confusion(self, counts: list[list[int]]) -> None:
        right, total = sum(row[index] for index, row in enumerate(counts)), sum(map(sum, counts))
        table = TextTable(title=f"Held-out answers: {right} of {total} right ({right / total:.3f})")
        table.add_column("label")
        for label in self.labels:
            table.add_column(f"read as {label}", justify="right")
        for label, row in zip(self.labels, counts, strict=True):
            table.add_row(label, *map(str, row))
        show_table(table)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the learning rate rises over the first ``warmup`` of the steps and falls to 0, linearly."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _config_file(base: str) -> Path:
    return Path(cached_file(base, "config.json"))


def _checkpoint_file(checkpoint: str) -> Path:
    """The local file of a checkpoint's weights, fetched from the Hub where it is named there."""
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise ArgumentError(
                f"checkpoint: no {WEIGHTS} in the folder {checkpoint!r}; a state dict such as epoch_10.pt is named "
                "itself, with the folder of its configuration and tokenizer as base"
            )
        return path / WEIGHTS
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+):(.+)", checkpoint)
    if on_hub is None:
        raise ArgumentError(
            f"checkpoint: {checkpoint!r} doesn't exist; give a state dict (epoch_10.pt), a folder that fit exported, "
            "or owner/name:file on the Hub"
        )
    try:
        return Path(hf_hub_download(on_hub[1], on_hub[2]))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"checkpoint: {checkpoint!r} is no file here and can't be had from the Hub ({first_line(error)}); "
            "try again, give a file or an exported folder, or train one: safervlm fit --config configs/judge.yaml"
        ) from error
