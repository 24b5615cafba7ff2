"""Loads a model's own tokenizer, and its processor with the Pillow image backend, without video and audio parts.

transformers' video processors need torchvision, also where only images are used.
"""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import DummyObject
from transformers.utils.hub import cached_file

from safervlm.errors import ArgumentError
from safervlm.io.reading import read_object
from safervlm.vlm.compat import PROCESSOR_MAPPING
from safervlm.vlm.weights import reading

# Files that may name the class of the processor, in the order of AutoProcessor.
NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
UNUSED = ("video_processor", "feature_extractor")  # the parts for videos and for audio


def read_tokenizer(name: str, argument: str = "vlm.model", revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name: Name on the Hugging Face Hub, or folder, of the model.
        argument: Name of the argument, for the error message.
        revision: Branch, tag or commit of a model on the Hub.

    Raises:
        ArgumentError: The tokenizer can't be read, or has no vocabulary.
    """
    with reading(name, argument):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    require_vocabulary(tokenizer, name, argument)
    return tokenizer


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, argument: str = "vlm.model") -> None:
    """Rejects a tokenizer of only special tokens, which transformers makes for a folder without a tokenizer's files.

    Args:
        tokenizer: The tokenizer.
        name: Name on the Hugging Face Hub, or folder, of the model.
        argument: Name of the argument, for the error message.

    Raises:
        ArgumentError: The tokenizer has no other tokens: it could not encode any word.
    """
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ArgumentError(
            f"{argument}: {name!r} comes without its tokenizer (tokenizer.json, vocab.json or tokenizer.model); give a "
            "folder that has it, or a name on the Hugging Face Hub"
        )


class UnusedPart:
    """Stands for the video or audio part of a processor: some processors read its settings without any video."""

    def __getattr__(self, name: str) -> None:
        """Returns None for every setting."""
        if name.startswith("__"):  # pickle and copy request these
            raise AttributeError(name)


def processor_class(name: str, revision: str | None, config: PreTrainedConfig) -> type[ProcessorMixin]:
    """Returns the class of a model's processor: the one that its files name, or else that of its type of model.

    One type of model may have several processors: Pixtral is a LLaVA with another one.

    Args:
        name: Name on the Hugging Face Hub, or folder, of the model.
        revision: Branch, tag or commit of a model on the Hub.
        config: The model's configuration.

    Raises:
        ArgumentError: transformers has no processor for this type of model.
    """
    for file in NAMED_IN:
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        named = read_object(Path(path), finite=False).get("processor_class") if path else None
        found = getattr(transformers, named, None) if isinstance(named, str) else None
        if isinstance(found, DummyObject) or (isinstance(found, type) and issubclass(found, ProcessorMixin)):
            return found  # a DummyObject raises an ImportError that names the package it needs
    mapped: type[ProcessorMixin] | None = PROCESSOR_MAPPING.get(type(config), None)
    if mapped is None:
        raise ArgumentError(
            f"vlm.model: {name!r} is a {config.model_type}, for which transformers has no processor; use a model that "
            "has one"
        )
    return mapped


def read_processor(name: str, revision: str | None, config: PreTrainedConfig) -> ProcessorMixin:
    """Loads a model's processor with the Pillow image backend, without its video and audio parts.

    Args:
        name: Name on the Hugging Face Hub, or folder, of the model.
        revision: Branch, tag or commit of a model on the Hub.
        config: The model's configuration.

    Raises:
        ArgumentError: transformers has no processor for this type of model.
    """
    whole: Any = processor_class(name, revision, config)
    parts = whole.get_attributes()

    class WithoutUnused(ProcessorMixin):
        """The last constructor of the chain, which checks the parts: it receives only the used parts."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = dict(zip(parts, args, strict=False)) | kwargs
            super().__init__(**{part: value for part, value in given.items() if part not in UNUSED})

    class ImagesAlone(whole, WithoutUnused):
        video_processor = feature_extractor = UnusedPart()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in parts if part not in UNUSED]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            used = iter(super()._get_arguments_from_pretrained(*args, **kwargs))
            return [None if part in UNUSED else next(used) for part in parts]  # the constructor's order

    ImagesAlone.__name__ = whole.__name__  # from_pretrained compares it with the class name in the folder
    processor: ProcessorMixin = ImagesAlone.from_pretrained(
        name, revision=revision, backend="pil", trust_remote_code=False
    )
    if isinstance(tokenizer := getattr(processor, "tokenizer", None), PreTrainedTokenizerBase):
        require_vocabulary(tokenizer, name)
    processor.__class__ = whole  # a local class can't be pickled
    for part in UNUSED:
        if part in parts:
            setattr(processor, part, UnusedPart())
    return processor
