"""Chooses the class of a VLM by the ``config.json`` of its checkpoint.

Each subclass of :class:`safervlm.vlm.local.LocalVLM` defines which checkpoints it loads (``loads``). Any other
model is loaded by :class:`safervlm.vlm.auto.Transformers`; a class that runs a repository's code is never chosen.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from safervlm.vlm.auto import Transformers
from safervlm.vlm.llava import Llava
from safervlm.vlm.llava_original import LlavaOriginal
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.weights import reading

BUILT_IN = (Llava, LlavaOriginal)  # imported here, so that they are among the subclasses


def family_of(model: str, revision: str | None = None) -> type[LocalVLM]:
    """Returns the class that loads a model.

    Args:
        model: Name on the Hugging Face Hub, or folder.
        revision: Branch, tag or commit of a model on the Hub.

    Raises:
        ArgumentError: The model's ``config.json`` can't be read.
    """
    with reading(model):
        config = PreTrainedConfig.get_config_dict(model, revision=revision)[0]
        return next((family for family in subclasses(LocalVLM) if family.loads(config)), Transformers)


def subclasses(base: type[Any]) -> Iterator[type[LocalVLM]]:
    """Iterates over the subclasses of a class, each before its own subclasses; includes imported classes of the user.

    Args:
        base: Class whose subclasses are listed.
    """
    for family in base.__subclasses__():
        yield family
        yield from subclasses(family)
