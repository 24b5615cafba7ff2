"""A vision-language model whose weights are here: loading, LoRA adapters, log-probabilities of completions.

Shapes: C completions, T tokens of the longest completion, N response tokens in all, V words of the vocabulary, H hidden
units.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safervlm.errors import ArgumentError, explained
from safervlm.finite import NotFiniteError
from safervlm.hashing import seed_for
from safervlm.limits import must_match_soon
from safervlm.vlm.adapters import adapter_fingerprint, adapter_weights, export_adapter, load_adapter
from safervlm.vlm.base import NOT_FINITE, VLM, Generation, Scores
from safervlm.vlm.lora import Adapter, LoRA, checkpoint_gradients
from safervlm.vlm.sampling import Sampling, Suppress
from safervlm.vlm.weights import weights_fingerprint


@dataclass
class Targets:
    """The response tokens of C completions.

    Attributes:
        target: (C, T) the tokens, 0 where there is none.
        mask: (C, T) True at response tokens.
    """

    target: Tensor
    mask: Tensor


class LocalVLM(VLM):
    """A vision-language model with LoRA adapters; a family fills in how it is loaded and how it sees an image.

    Building one costs nothing: the weights are read by :meth:`load`, the processor by the first use of ``collator``.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model and its processor.
        revision: branch, tag or commit of a model on the Hub; a commit makes a run repeatable.
        adapter: PEFT folder of the adapter to measure with, for example ``runs/ppo/adapter``; none for the base model.
        lora: the adapter that training makes.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        adapter: str | None = None,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
            inside = Path(adapter) / "adapter"
            hint = f"did you mean {inside}?" if inside.is_dir() else "give the PEFT folder that fit exported"
            raise ArgumentError(f"vlm.adapter: no adapter_config.json in {adapter!r}; {hint}")
        if adapter is not None:
            adapter_weights(adapter)
        if model.startswith((".", "/")) and not Path(model).is_dir():
            raise ArgumentError(
                f"vlm.model: no folder {model!r}; paths begin where the command is typed ({Path.cwd()}), and the "
                "pictograms are written by safervlm pictograms"
            )
        self.name, self.revision, self.adapter, self.lora = model, revision, adapter, lora
        self.dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self.gradient_checkpointing = gradient_checkpointing
        self.model: PreTrainedModel | PeftModel | None = None

    @abstractmethod
    def load_base(self) -> PreTrainedModel:
        """Reads the base weights."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""

    @property
    @abstractmethod
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer."""

    @abstractmethod
    def response_states(self, batch: Any, adapter: Adapter) -> tuple[Targets, Tensor]:
        """The N response tokens of a batch with completions, and the (N, H) hidden states that predict them."""

    @property
    @abstractmethod
    def image_token_ids(self) -> set[int]:
        """The placeholders that stand for images."""

    @cached_property
    def suppressed(self) -> Tensor:
        """Tokens that an answer never contains: special ones but for the end, and those without a text."""
        special = set(self.tokenizer.all_special_ids) | self.image_token_ids
        words = self.words
        never = (special | set(range(len(self.tokenizer), words))) - set(self.eos_token_ids)
        # A tokenizer may have more words than the head, after fine-tuning for example: what it can't say needs no ban.
        return torch.tensor(sorted(token for token in never if token < words), dtype=torch.long)

    @property
    def words(self) -> int:
        """V, the number of rows of the head."""
        return int(self.base.get_output_embeddings().out_features)

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "model": str(Path(self.name)),  # ./folder and folder are one
            "revision": self.revision,
            "weights": weights_fingerprint(self.name, self.revision),
            "adapter": self.adapter and {"folder": self.adapter, "sha256": adapter_fingerprint(self.adapter)},
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def load(self, train: Sequence[Adapter] = (), seed: int = 0) -> None:
        """Reads the weights and adds the adapters; a second call does nothing.

        Args:
            train: the adapters to train, new ones; none to measure with the ``adapter`` of the settings.
            seed: the new adapters' first weights are drawn from it.
        """
        if self.model is not None:
            return
        base = self.load_base().requires_grad_(False)
        if not train:
            self.model = base
            if self.adapter is not None:
                self.model = load_adapter(base, self.adapter, self.describe()["weights"])
            self.eval()
            return
        if self.adapter is not None:
            raise ArgumentError(
                f"vlm.adapter: {self.adapter!r} is given, but training starts from the base model, which is also the "
                "reference; leave it out (to go on with a run, or to validate it, name its folder as --run)"
            )
        # Drawn on the CPU, wherever the base is: a seed gives one adapter on every device.
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(seed_for(seed, "lora"))
            policy, *others = train
            if policy != "policy":
                raise ArgumentError(f"train: the first adapter is the policy, got {policy!r}")
            what = f"lora.target_modules: {self.lora.target_modules!r} can't be used"
            remedy = "give a regular expression that matches linear layers of the language model"
            must_match_soon(
                [self.lora.target_modules], [name for name, _ in base.named_modules()], "lora.target_modules"
            )
            with explained(what, remedy, ValueError, TypeError, error=ArgumentError):
                model = get_peft_model(base, self.lora.to_peft())
            for other in others:
                model.add_adapter(other, self.lora.to_peft())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        self.model = model
        self.train()  # the base comes in eval mode, and Lightning leaves modes as they are
        if self.gradient_checkpointing:
            checkpoint_gradients(base)

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, with whatever adapters stand in its layers."""
        if self.model is None:
            raise RuntimeError("the weights are not loaded: call load() first")
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return int(self.base.get_output_embeddings().in_features)

    def save_adapter(self, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
        """Writes the policy as a PEFT folder that ``PeftModel.from_pretrained`` loads.

        Args:
            folder: to write; an adapter that is there is replaced.
            origin: the settings that made the adapter; by default those of the VLM alone.

        Raises:
            ArgumentError: the adapter holds NaN or infinities, or is as it was at the start.
        """
        if not isinstance(self.model, PeftModel):
            raise TypeError("there is no adapter to save: the VLM was loaded without one")
        export_adapter(self.model, folder, origin or {"vlm": self.describe(), "lora": vars(self.lora)})

    def score(
        self,
        batch: Any,
        adapter: Adapter = "policy",
        sampling: Sampling | None = None,
        entropy: bool = False,
        hidden: bool = False,
    ) -> Scores:
        """How likely the completions of a batch are.

        Args:
            batch: with completions.
            adapter: which weights answer; ``reference`` is the base model.
            sampling: None for the model's own distribution; with it, the one that :meth:`generate` draws from (the
                temperature, and what it suppresses; top_p has to be 1, a cut-off has no gradient).
            entropy: also give the entropies.
            hidden: also give the hidden states.
        """
        if sampling is not None and sampling.top_p < 1:
            raise ArgumentError(f"sampling.top_p: scoring needs 1, got {sampling.top_p}")
        targets, states = self.response_states(batch, adapter)
        logits = self.base.get_output_embeddings()(states).float()
        if sampling is not None:
            logits = Suppress(self.suppressed)(None, logits) / sampling.temperature
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, targets.target[targets.mask][:, None])[:, 0]
        # With a gradient it is the loss that is looked at, by all processes together.
        if not torch.is_grad_enabled() and not bool(torch.isfinite(chosen).all()):
            raise NotFiniteError(f"vlm: {NOT_FINITE}, the first of them {batch.questions[0].id}")
        scores = Scores(_unflatten(chosen, targets.mask), targets.mask)
        if entropy:
            # 0 log 0 is 0, also for suppressed tokens.
            flat = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
            scores.entropy = _unflatten(flat, targets.mask)
        if hidden:
            scores.hidden = _unflatten(states, targets.mask)
        return scores

    def hidden(self, batch: Any, adapter: Adapter) -> Tensor:
        """(C, T, H) the hidden states that predict the response tokens, 0 where there is none; no head is run."""
        targets, states = self.response_states(batch, adapter)
        return _unflatten(states, targets.mask)

    def generation(self, tokens: list[int]) -> Generation:
        """Generated tokens, cut behind the first one that ends an answer."""
        end = next((place for place, token in enumerate(tokens) if token in self.eos_token_ids), None)
        if end is not None:
            tokens = tokens[: end + 1]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Generation(tokens, text, "length" if end is None else "stop")


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """(N, ...) values at the N true places of a (C, T) mask -> (C, T, ...), 0 elsewhere."""
    index = mask.nonzero(as_tuple=True)
    return flat.new_zeros(*mask.shape, *flat.shape[1:]).index_put(index, flat)
