"""Differences between transformers releases, and private names of libraries that the VLMs need.

Each entry states the condition under which it can be removed ("Remove when"). No other module of the package checks a
version or imports a private name of transformers or torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any
from unittest.mock import patch

from peft import PeftConfig
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # Remove when torch.utils.pytree is public in the oldest release.
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype  # Remove when CogVLM and XComposer2 are no longer supported.
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING  # Remove when AutoProcessor exposes it.
from transformers.models.auto.tokenization_auto import get_tokenizer_config  # Remove together with vlm/remote/.
from transformers.utils import ModelOutput

__all__ = [
    "CACHE",
    "PROCESSOR_MAPPING",
    "accepts_attention_mask",
    "accepts_dynamic_cache",
    "checkpoint_activations",
    "get_tokenizer_config",
    "grown_inputs",
    "local_torch_dtype",
    "names_as_given",
    "position_ids",
    "renamed_by_peft",
    "tree_leaves",
    "tree_map",
]

# The name of the KV cache among a model's arguments and outputs. Remove when transformers>=5.24 is required.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"
# What PEFT adapts, among the settings of an adapter.
TARGETS = ("target_modules", "target_parameters")


def checkpoint_activations(model: nn.Module, settings: dict[str, Any]) -> None:
    """Turns on activation checkpointing, formerly called gradient checkpointing.

    Remove when transformers>=5.23 is required.

    Args:
        model: A Hugging Face model.
        settings: Keyword arguments of :func:`torch.utils.checkpoint.checkpoint`.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": settings})


@contextmanager
def names_as_given() -> Iterator[None]:
    """Context manager in which PEFT adapts the modules that its configuration names, and no others.

    For some mixture-of-experts families PEFT reads a name such as ``down_proj`` as that of transformers 4, and adapts
    the experts instead, even where it is the full name of a module.

    Remove when PEFT keeps full names that exist in the model.
    """
    with patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers", lambda *_, **__: None):
        yield


def renamed_by_peft(config: PeftConfig, model: nn.Module) -> bool:
    """Returns whether PEFT, outside :func:`names_as_given`, would adapt other modules than a configuration names.

    Remove together with :func:`names_as_given`.

    Args:
        config: Configuration of an adapter.
        model: The base model.
    """
    copied = deepcopy(config)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(copied, model, None)
    except ValueError:  # some of the names that PEFT fuses are missing
        return True
    return any(set(getattr(copied, name) or ()) != set(getattr(config, name) or ()) for name in TARGETS)


def accepts_dynamic_cache(model: PreTrainedModel) -> bool:
    """Returns whether a model keeps its state in a ``DynamicCache`` and can skip the logits of prompt tokens.

    Remove when the two properties are public.

    Args:
        model: A generative model.
    """
    return bool(model._supports_default_dynamic_cache() and model._supports_logits_to_keep())


def accepts_attention_mask(model: PreTrainedModel) -> bool:
    """Returns whether the attention of a language model adds a mask per pair of tokens to its scores.

    Remove when the implementation of the attention is public.

    Args:
        model: A generative model.
    """
    return model.config.get_text_config()._attn_implementation in ("sdpa", "eager")


def position_ids(model: GenerationMixin, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Returns the position ids that ``generate`` would compute for a batch.

    Remove when ``generate`` accepts a cache of several prompts that share a prefix.

    Args:
        model: A generative model.
        input_ids: (rows, tokens) token ids.
        inputs: The model's other inputs, such as the sizes of the images.

    Returns:
        (rows, tokens), with a leading dimension for models whose positions have several coordinates.
    """
    positions: Tensor = model._prepare_position_ids_for_generation(input_ids, inputs)
    return positions


def grown_inputs(model: GenerationMixin, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a model after one generated token: masks and token types are one token longer.

    Remove when ``generate`` has a public function for this.

    Args:
        model: A generative model.
        inputs: Inputs of the prompt.
    """
    grown: dict[str, Any] = model._update_model_kwargs_for_generation(ModelOutput(), inputs, is_encoder_decoder=False)
    return grown
