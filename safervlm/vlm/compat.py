"""What differs between transformers releases, and the library's private names that the VLMs need.

Everything here has a condition under which it can go ("Remove when"). No other module of the package asks for a version
or imports a private name of transformers or torch.
"""

from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # Remove when torch.utils.pytree is public in the oldest release.
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype  # Remove when CogVLM and XComposer2 are no longer supported.
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING  # Remove when AutoProcessor says its class.
from transformers.models.auto.tokenization_auto import get_tokenizer_config  # Remove together with vlm/remote.py.
from transformers.utils import ModelOutput

__all__ = [
    "CACHE",
    "PROCESSOR_MAPPING",
    "checkpoint_activations",
    "get_tokenizer_config",
    "grown_inputs",
    "local_torch_dtype",
    "position_ids",
    "takes_a_plain_cache",
    "tree_leaves",
    "tree_map",
]

# The name of the KV cache among a model's arguments and outputs. Remove when transformers>=5.24 is required.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


def checkpoint_activations(model: nn.Module, settings: dict[str, Any]) -> None:
    """Turns on activation checkpointing, which was called gradient checkpointing.

    Remove when transformers>=5.23 is required.

    Args:
        model: a Hugging Face model.
        settings: arguments of :func:`torch.utils.checkpoint.checkpoint`.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": settings})


def takes_a_plain_cache(model: PreTrainedModel) -> bool:
    """Whether a model keeps its state in a ``DynamicCache`` and can leave out the logits of a prompt.

    Remove when the two properties are public.

    Args:
        model: that generates.
    """
    return bool(model._supports_default_dynamic_cache() and model._supports_logits_to_keep())


def position_ids(model: GenerationMixin, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The position ids that ``generate`` would compute for a batch.

    Remove when ``generate`` accepts a cache of several prompts that share a prefix.

    Args:
        model: that generates.
        input_ids: (rows, tokens).
        inputs: the model's other inputs, such as the sizes of the images.

    Returns:
        (rows, tokens), with a leading dimension for models whose positions have several coordinates.
    """
    positions: Tensor = model._prepare_position_ids_for_generation(input_ids, inputs)
    return positions


def grown_inputs(model: GenerationMixin, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model after one generated token: masks and token types are one longer.

    Remove when a public function of ``generate`` does this.

    Args:
        model: that generates.
        inputs: of the prompt.
    """
    grown: dict[str, Any] = model._update_model_kwargs_for_generation(ModelOutput(), inputs, is_encoder_decoder=False)
    return grown
