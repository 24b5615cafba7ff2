"""Judges: RoBERTa classifiers that assign a label to a VLM's response from its text alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers import RobertaConfig, RobertaModel, get_linear_schedule_with_warmup

from safervlm.data.labelled import LabelCollator
from safervlm.errors import ArgumentError, RecordError
from safervlm.finite import NotFiniteRecordError, TrainingGuard, require_optimizer_step
from safervlm.hashing import fingerprint
from safervlm.io.files import write_atomically
from safervlm.io.names import label_names
from safervlm.io.texts import tokenizable
from safervlm.judging.confusion import show_confusion, write_confusion
from safervlm.judging.files import WEIGHTS, checkpoint_file, config_file
from safervlm.protocol import LABELS
from safervlm.ranges import in_range
from safervlm.run_folder import RunFolder
from safervlm.vlm.processors import read_tokenizer
from safervlm.vlm.sizes import bounded_config, sized
from safervlm.vlm.weights import load_model, read_tensors, reading, require_finite_floats, weights_fingerprint

# Keys that a checkpoint may contain although this model does not. Older versions of transformers saved the position
# ids, which are 0, 1, 2, ... for every RoBERTa. The pooler is not used: the classifier uses the first token's state.
UNREAD_KEYS = frozenset({"roberta.embeddings.position_ids", "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"})
BATCH_SIZE = 64  # default number of responses in a forward pass
# Log-probabilities closer than this could change their order by rounding, which changes them by about 1e-7.
NEAR_TIE = 1e-4


class Judge(LightningModule):
    """A classifier of responses: RoBERTa with a linear layer on the first token's last hidden state.

    It classifies only the response's text, without question or image. A text longer than the model's positions (512
    tokens for roberta-base) is truncated, as by the published classifiers. An empty text is classified like any other.

    As a judge of a :class:`safervlm.judging.panel.Panel` or the reward of an objective it is frozen: always in eval
    mode, without gradients, in float32 at any surrounding precision. Only ``fit`` of the judge itself trains it.
    The weights are loaded at first use.

    After ``fit`` the run folder contains ``judge/`` (see :meth:`save_pretrained`) and ``confusion.csv``, the confusion
    matrix on held-out responses: rows are true labels, columns predicted ones.

    Args:
        checkpoint: The weights: a plain state dict in the published classifiers' format (``epoch_10.pt``), local or on
            the Hub as ``owner/name:file`` (``yiting/alignment_classifier:epoch_10.pt``), or a folder exported by
            ``fit``. None fits a new judge, initialised with the weights of ``base``.
        labels: The labels that the judge distinguishes, in the order of its outputs. The default is the alignment
            judge's; perception's is A, B, C, D, N/A.
        base: The underlying RoBERTa, a folder or a name on the Hub: configuration and tokenizer, and also the weights
            if there is no checkpoint. Ignored if ``checkpoint`` is a folder, which contains its own.
        lr: AdamW's peak learning rate in ``fit``.
        weight_decay: AdamW's weight decay in ``fit``.
        warmup: Fraction of all optimizer steps in ``fit`` during which the learning rate rises linearly, before it
            decays linearly to 0.
        label_smoothing: Probability mass of the target that ``fit`` spreads evenly over all labels. It bounds the
            judge's confidence, and with it the reward that PPO receives from the judge.
        max_characters: Longer texts are truncated to this many characters before tokenization, which is slow for
            megabytes of text. The default is 128 characters, the longest token of roberta-base, for each of its 512
            positions, so it changes no token that the model receives.

    Raises:
        ArgumentError: A number is out of range or the labels are not at least two different ones; at first use, the
            checkpoint is missing, unreadable, or does not match this model exactly.
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
        labels = label_names("labels", labels)
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ArgumentError(f"labels: a judge distinguishes at least two labels, got {list(labels)}")
        in_range(least=1, max_characters=max_characters)
        in_range(above=0, lr=lr)
        in_range(least=0, weight_decay=weight_decay)
        in_range(least=0, most=1, warmup=warmup)
        in_range(least=0, below=1, label_smoothing=label_smoothing)
        self.max_characters = max_characters
        self.checkpoint = checkpoint
        self.labels = labels
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

    def require_labels(self, labels: Sequence[str], name: str) -> None:
        """Rejects the judge if its labels are not exactly the given ones.

        Args:
            labels: The required labels, in the required order.
            name: The argument that configures the judge, for the error message.

        Raises:
            ArgumentError: The labels or their order differ.
        """
        if self.labels != tuple(labels):
            raise ArgumentError(f"{name}: its labels are {', '.join(self.labels)}; name a judge of {', '.join(labels)}")

    # Loading and saving

    def configure_callbacks(self) -> list[Callback]:
        """Stops the judge's own ``fit`` if a loss, gradient or weight is not finite."""
        return [TrainingGuard()]

    def setup(self, stage: str) -> None:
        """Makes the judge trainable in its own ``fit``. Lightning calls this only for the module it runs."""
        self._fitting = stage == "fit"

    def teardown(self, stage: str) -> None:
        """Freezes the judge again."""
        self._fitting = False
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Judge":
        """Sets training mode; the judge stays in eval mode unless it is itself being fitted.

        Args:
            mode: True requests training mode, which is ignored outside the judge's own ``fit``.

        Returns:
            The judge.
        """
        return super().train(mode and self._fitting)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Judge":
        # All moves and conversions of a module use this. The judge is moved to another device but stays in float32:
        # rounded weights would make a different judge from the one whose fingerprint its verdicts contain.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def configure_model(self) -> None:
        """Loads the weights on the first call; freezes them unless the judge itself is being fitted."""
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
            config = bounded_config(base, argument="base")
        tokenizer = read_tokenizer(base, "base")
        if not isinstance(config, RobertaConfig):
            raise ArgumentError(f"base: {base!r} is a {config.model_type}; the judge is built on a RoBERTa")
        if weights is not None and weights.name == WEIGHTS:
            saved = tuple(config.id2label[number] for number in sorted(config.id2label))
            if saved != self.labels:
                raise ArgumentError(
                    f"labels: {', '.join(self.labels)}, but those of the judge in {base!r} are {', '.join(saved)}"
                )
        if not isinstance(config.pad_token_id, int) or config.pad_token_id < 0:
            raise ArgumentError(
                f"base: {base!r} has no pad_token_id in its config.json, but {config.pad_token_id!r}; give a RoBERTa's"
            )
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: number for number, label in enumerate(self.labels)}
        if weights is None:
            # The base is a masked language model, whose head is not used.
            roberta: Any = load_model(
                RobertaModel, base, "base", whole=False, add_pooling_layer=False, dtype=torch.float32, weights_only=True
            )
        else:
            # Built without memory first: the sizes in the configuration may be invalid or those of another model.
            with reading(base, "base"), sized(base, [weights], "base"), torch.device("meta"):
                shapes = judge_of(RobertaModel(config, add_pooling_layer=False), config, len(self.labels)).state_dict()
            state = self._checked_state(weights, shapes)
            roberta = RobertaModel(config, add_pooling_layer=False)
        # float32 regardless of the trainer's precision: rounded weights would make a different judge.
        model = judge_of(roberta, config, len(self.labels)).float()
        if weights is not None:
            model.load_state_dict(state)
        self.config, self.tokenizer = config, tokenizer
        positions = config.max_position_embeddings - config.pad_token_id - 1
        self.max_length = min(tokenizer.model_max_length, positions)
        if self.max_length < 3:  # two special tokens and one of the text
            raise ArgumentError(
                f"base: {base!r} takes {self.max_length} tokens of a text (model_max_length); correct it"
            )
        return dict(model.items())

    @property
    def _weights(self) -> Path | None:
        """The file with the checkpoint's weights; None without a checkpoint."""
        return None if self.checkpoint is None else checkpoint_file(self.checkpoint)

    @property
    def _base(self) -> str:
        """Source of configuration and tokenizer: the checkpoint if it is an exported folder, else ``base``."""
        folder = self.checkpoint is not None and Path(self.checkpoint).is_dir()
        return str(self.checkpoint) if folder else self.base

    def _checked_state(self, file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reads the state dict in ``file`` and rejects it unless keys and shapes equal those of ``expected``."""
        tensors = read_tensors(file, "checkpoint")
        state = {key: value for key, value in tensors.items() if key not in UNREAD_KEYS}
        problems = [f"{key} is missing" for key in expected if key not in state]
        problems += [f"{key} is not of this model" for key in state if key not in expected]
        outputs = state.get("classifier.weight")
        if outputs is not None and outputs.shape[:1] != (len(self.labels),):
            problems.insert(0, f"it distinguishes {outputs.shape[0]} labels, labels names {', '.join(self.labels)}")
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
        require_finite_floats(state, f"checkpoint: {str(file)!r}")
        return state

    @property
    def fingerprint(self) -> str:
        """Identifier of this judge: a hash of weights, configuration and labels, 16 hexadecimal digits.

        Raises:
            ArgumentError: There is no checkpoint, or it can't be found.
        """
        if self._fingerprint is None:
            weights = self._weights
            if weights is None:
                raise ArgumentError("checkpoint: a judge without one has to be fitted before it can judge")
            self._fingerprint = fingerprint(weights, config_file(self._base), "\n".join(self.labels))
        return self._fingerprint

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that :class:`Judge` accepts as ``checkpoint``: weights, configuration, labels, tokenizer.

        Args:
            folder: Created if it is missing. The weights are written last, so a folder that contains them is complete.
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
        self._fingerprint = fingerprint(folder / WEIGHTS, config_file(str(folder)), "\n".join(self.labels))

    def describe(self) -> dict[str, Any]:
        """Returns the settings that determine the result of ``fit``.

        If fitting starts from a checkpoint, its fingerprint replaces the base. A judge that is only used for judging is
        described by its :attr:`fingerprint` alone (:meth:`safervlm.judging.panel.Panel.describe`).
        """
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
        """Classifies responses.

        Texts of similar length are batched together to reduce padding. On one machine, the other texts of a batch never
        change a text's most probable label, and change its probabilities by less than 1e-5, as matrices of another
        shape are rounded differently. If the two most probable labels are so close that rounding could decide between
        them (:data:`NEAR_TIE`), the text is classified once more in a batch of one.

        Args:
            texts: The responses.
            batch_size: Number of texts in a forward pass.

        Returns:
            Natural log-probabilities of the labels, float32 of shape (texts, labels), on the judge's device.

        Raises:
            ArgumentError: The weights can't be loaded.
            NotFiniteRecordError: A log-probability is not finite.
        """
        result = torch.empty(len(texts), len(self.labels), device=self.device, dtype=torch.float32)
        if not texts:
            return result
        self.configure_model()
        tokens = self._tokenize(texts)
        with torch.autocast(self.device.type, enabled=False):
            for part in _by_length(tokens, batch_size):
                result[part] = F.log_softmax(self._logits([tokens[index] for index in part]), dim=-1)
            best = result.topk(2, dim=-1).values
            for index in (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero().flatten().tolist():
                result[index] = F.log_softmax(self._logits([tokens[index]]), dim=-1)[0]
        if not bool(torch.isfinite(result).all()):
            place = int((~torch.isfinite(result).all(dim=-1)).nonzero()[0])
            raise NotFiniteRecordError(
                f"judge: {self._base!r} has no finite probabilities for the text {texts[place][:40]!r}; check its "
                "weights, or name another judge"
            )
        return result

    def batches(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> list[list[int]]:
        """Returns the batches that :meth:`judge` makes of responses, as indices of the texts.

        Judged one batch at a time, the responses have the same probabilities as together.

        Args:
            texts: The responses.
            batch_size: Number of texts in a forward pass.
        """
        return _by_length(self._tokenize(texts), batch_size) if texts else []

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Returns the logits of the labels, of shape (texts, labels)."""
        return self._logits(self._tokenize(texts))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [tokenizable(text[: self.max_characters]) for text in texts]
        tokens: list[list[int]] = self.tokenizer(cut, truncation=True, max_length=self.max_length)["input_ids"]
        if (highest := max(map(max, filter(None, tokens)), default=0)) >= self.config.vocab_size:
            raise RecordError(f"judge: a text has the token {highest}, {self._base!r} has {self.config.vocab_size}")
        return tokens

    def _logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        rows = [torch.tensor(row) for row in tokens]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token_id).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        # Mask by length, not by token id: a text may contain the padding token literally.
        mask = torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]
        states = self.roberta(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        return self.classifier(states[:, 0])

    # Fitting

    def training_step(self, batch: tuple[list[str], Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy loss of a batch, with label smoothing."""
        texts, targets = batch
        loss = F.cross_entropy(self(texts), targets, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(texts))
        return loss

    def validation_step(self, batch: tuple[list[str], Tensor], batch_idx: int) -> None:
        """Adds a batch of held-out responses to the confusion matrix and logs the loss, without smoothing."""
        texts, targets = batch
        logits = self(texts)
        self.confusion.update(logits.argmax(dim=-1), targets)
        self.log("validation/loss", F.cross_entropy(logits, targets), sync_dist=True, batch_size=len(texts))

    def on_validation_epoch_start(self) -> None:
        """Resets the confusion matrix, in the same mode as the updates that follow.

        Tensors that a reset creates under Lightning's inference mode can't be updated outside of it.
        """
        self.confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs ``validation/accuracy`` over all held-out responses."""
        counts = self.confusion.compute()
        if not self.trainer.sanity_checking:
            self._held_out = counts
            accuracy = counts.trace() / counts.sum()
            self.log("validation/accuracy", accuracy)
            if self._fitting:
                self.print(f"epoch {self.current_epoch}: held-out accuracy {accuracy:.3f}")

    def on_fit_end(self) -> None:
        """Exports the judge, and writes and prints the confusion matrix of the held-out responses."""
        require_optimizer_step(self.trainer, self)
        if not self.trainer.is_global_zero:
            return
        files = RunFolder(self.trainer.default_root_dir)
        self.save_pretrained(files.judge)
        if self._held_out is not None:
            counts = self._held_out.long().tolist()
            write_confusion(files.confusion, self.labels, counts)
            show_confusion(self.labels, counts)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns AdamW with linear warmup over the fraction ``warmup`` of all steps and linear decay to 0."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def judge_of(roberta: RobertaModel, config: RobertaConfig, labels: int) -> nn.ModuleDict:
    """Returns the model of a judge, with a new classifier.

    Args:
        roberta: Its first part.
        config: The configuration of that part.
        labels: Number of labels.
    """
    return nn.ModuleDict({"roberta": roberta, "classifier": nn.Linear(config.hidden_size, labels)})


def _by_length(tokens: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
