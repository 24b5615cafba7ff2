"""PEFT adapter folders: finds, loads and validates adapters, and exports them with a seal."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel

from safervlm.errors import ArgumentError, UserError
from safervlm.hashing import fingerprint
from safervlm.io.caches import remove_leftovers, set_default_permissions, temporary
from safervlm.io.reading import read_object
from safervlm.io.seals import SEAL, seal_folder, verify_folder
from safervlm.io.tables import say
from safervlm.limits import reject_slow_patterns
from safervlm.vlm.adapter_settings import require_matching_settings
from safervlm.vlm.compat import names_as_given, renamed_by_peft
from safervlm.vlm.lora import active, switched
from safervlm.vlm.weights import read_tensors, reading, require_finite_floats, require_finite_weights_in

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference, as in PEFT


def patterns_of(settings: Mapping[str, Any]) -> set[str]:
    """Returns the regular expressions that PEFT matches with module names, taken from an adapter's configuration.

    Args:
        settings: Content of ``adapter_config.json``.

    Returns:
        The patterns of ``target_modules`` and ``exclude_modules`` unchanged, and those that PEFT matches with a part
        of a name (``rank_pattern`` and others), extended so that they match the whole name.
    """
    whole = [settings.get(name) for name in ("target_modules", "exclude_modules")]
    parts: list[Any] = []
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern", "target_parameters"):
        given = settings.get(name) or ()
        parts += [given] if isinstance(given, str) else [*given] if isinstance(given, list | dict) else []
    texts = [part for part in parts if isinstance(part, str)]
    return {each for each in whole if isinstance(each, str)} | {rf"(.*\.)?({text})(\..*)?" for text in texts}


def adapter_weights(folder: str | Path) -> Path:
    """Returns the path of an adapter's weight file.

    Args:
        folder: PEFT folder of the adapter.

    Raises:
        ArgumentError: The folder contains no weight file.
    """
    found = next((Path(folder) / name for name in WEIGHTS if (Path(folder) / name).is_file()), None)
    if found is None:
        raise ArgumentError(
            f"vlm.adapter: no {' or '.join(WEIGHTS)} in {str(folder)!r}; give the whole PEFT folder of the adapter"
        )
    return found


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """Returns the content of an adapter's ``adapter_config.json``.

    Args:
        folder: PEFT folder of the adapter.

    Raises:
        ArgumentError: The file is missing or damaged, or has no ``peft_type``.
    """
    argument = f"vlm.adapter: {str(folder)!r}"
    try:
        settings = read_object(Path(folder) / CONFIG, "give the whole PEFT folder of the adapter")
    except UserError as error:
        raise ArgumentError(f"{argument} can't be read: {error}") from None
    if "peft_type" not in settings:
        raise ArgumentError(f"{argument}: its {CONFIG} names no peft_type; give a PEFT folder")
    return settings


def adapter_fingerprint(folder: str) -> str:
    """Returns the fingerprint of an adapter's weights and configuration.

    Args:
        folder: PEFT folder of the adapter.

    Raises:
        ArgumentError: The folder contains no weight file.
    """
    return fingerprint(Path(folder) / CONFIG, adapter_weights(folder))


def load_adapter(
    base: PreTrainedModel, folder: str, weights: str | None = None, seconds: float | None = None
) -> PeftModel:
    """Loads the adapter of a PEFT folder into a base model, and verifies that it fits and has an effect.

    Args:
        base: The base model; PEFT adds the adapter layers to it.
        folder: PEFT folder of the adapter, exported by SaferVLM or by another program.
        weights: Fingerprint of the base weights. It is compared with the fingerprint in the adapter's seal, if both
            exist.
        seconds: Limit of the CPU time of each regular expression of the adapter; None for the default.

    Returns:
        The model with the adapter.

    Raises:
        ArgumentError: A file is damaged; the adapter is of a kind that can't be switched on and off; the base weights
            are not those that the adapter was trained on; a key or shape doesn't fit the model (PEFT would load the
            adapter without effect and only warn); a value is not finite; the adapter changes no output.
    """
    argument = f"vlm.adapter: {folder!r}"
    sealed = verify_folder(Path(folder), "vlm.adapter")
    if sealed is not None:
        check_base(sealed["origin"], base, weights, argument)
    settings = adapter_config(folder)
    with reading(folder, "vlm.adapter"):
        config = PeftConfig.from_pretrained(folder)
    kind = str(settings["peft_type"])
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ArgumentError(
            f"{argument} is made by {kind}, which adds tokens or attention rather than changing the model's layers, "
            "and would have no effect here; give an adapter of its layers, such as LoRA"
        )
    names = [name for name, _ in base.named_modules()]
    reject_slow_patterns(sorted(patterns_of(settings)), names, f"{argument}: its {CONFIG}", seconds)
    file = adapter_weights(folder)
    state = read_tensors(file, "vlm.adapter")
    require_finite_floats(state, f"{argument}: {file.name}")
    require_matching_settings(settings, state, f"{argument}: {CONFIG}", file.name)
    named = base.config.name_or_path
    trained_on = settings.get("base_model_name_or_path")
    hint = f" (it was trained on {trained_on!r})" if trained_on and trained_on != named else ""
    doesnt_fit = f"{argument} was not made for {named!r}{hint}"
    try:
        with warnings.catch_warnings(), reading(folder, "vlm.adapter"), with_literal_names(base, settings):
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder)
            expected = get_peft_model_state_dict(model, save_embedding_layers=embeddings_included(model))
    except ArgumentError as error:
        if "size mismatch" in str(error.__cause__) or "target_modules" in str(error.__cause__).lower():
            reason = str(error.__cause__).strip().splitlines()
            shown = next((line.strip() for line in reason if "size mismatch" in line), reason[0])
            raise ArgumentError(f"{doesnt_fit}: {shown[:200]}; give the base model that it was trained on") from error
        raise
    if wrong := set(state) ^ set(expected):
        absent = f"{CONFIG} asks for it, {file.name} lacks it"
        why = (
            absent
            if min(wrong) in expected
            else f"{file.name} contains it, {CONFIG} or the base model has no place for it"
        )
        raise ArgumentError(
            f"{doesnt_fit}: {len(wrong)} weights don't fit, for example {min(wrong)} ({why}); give the base model "
            "that it was trained on, and the two files of one adapter"
        )
    if wrong := {key for key, value in state.items() if value.shape != expected[key].shape}:
        shapes = f"{tuple(state[min(wrong)].shape)} in {file.name}, {tuple(expected[min(wrong)].shape)} needed"
        raise ArgumentError(
            f"{doesnt_fit}: {len(wrong)} weights have another shape, for example {min(wrong)}: {shapes}; give the base "
            "model that it was trained on"
        )
    if not switched(model):
        raise ArgumentError(f"{argument} ({kind}) is on none of the model's layers; give an adapter such as LoRA")
    if not has_effect(model):
        raise ArgumentError(
            f"{argument} changes nothing: each of its layers computes what the base model computes (for LoRA: lora_B "
            "or lora_alpha is 0); train it, or leave it out to measure the base model"
        )
    return model


def embeddings_included(model: PeftModel) -> bool:
    """Returns whether the policy adapter's file contains whole embeddings, which it does if they are adapted.

    By default, PEFT would also compare the vocabulary with that of the base model that ``adapter_config.json`` names.
    It would read any folder, or request any name from the Hub, that another person's adapter contains.

    Args:
        model: Model with the adapter.
    """
    config: Any = model.peft_config["default"]
    if config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None) is not None:
        return False
    return any(
        isinstance(layer, BaseTunerLayer) and name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        for name, layer in model.named_modules()
    )


def with_literal_names(base: PreTrainedModel, settings: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Context manager in which PEFT uses an adapter's names literally, if they are those of modules of the model.

    Otherwise PEFT may rewrite names of an earlier version of transformers.

    Args:
        base: The base model.
        settings: Content of ``adapter_config.json``.
    """
    targets = settings.get("target_modules")
    there = {name for name, _ in base.named_modules()}
    return names_as_given() if isinstance(targets, list) and there.issuperset(targets) else nullcontext()


def check_base(origin: Mapping[str, Any], base: PreTrainedModel, weights: str | None, argument: str) -> None:
    """Rejects a base model whose weights are not those that the adapter was trained on.

    Fingerprints are comparable if both models are folders, or if both are on the Hub. Otherwise nothing is checked.

    Args:
        origin: Provenance of the adapter, from its seal.
        base: The base model.
        weights: Fingerprint of the base weights; None if unknown.
        argument: Name of the argument and the adapter's folder; the beginning of the error message.

    Raises:
        ArgumentError: The fingerprints are comparable and differ.
    """
    trained_on = origin.get("vlm", {})
    there = trained_on.get("weights")
    if there and weights and len(there) == len(weights) and there != weights:
        raise ArgumentError(
            f"{argument} was trained on other base weights than {base.config.name_or_path!r}: {there} "
            f"({trained_on.get('model')}) there, {weights} now; give that base model (to use another one anyway, "
            "remove safervlm.json from the adapter's folder)"
        )


@torch.no_grad()
def has_effect(model: nn.Module) -> bool:
    """Returns whether the policy adapter changes the output of any layer.

    Each layer is applied to random inputs with and without the adapter, until one output differs. For layers whose
    input is not a tensor of the layer's own width, a non-zero value in a LoRA B matrix counts as an effect.

    Args:
        model: A model with adapter layers.
    """
    return any(_changes(layer) for layer in switched(model))


def _changes(layer: nn.Module) -> bool:
    """Returns whether a layer's output with the policy adapter differs from its output without it."""
    if isinstance(layer, AuxiliaryTrainingWrapper) and hasattr(layer, "modules_to_save"):
        original = layer.original_module.state_dict()
        copies = [copy.state_dict() for copy in layer.modules_to_save.values()]
        return any(not torch.equal(value, copy[name]) for copy in copies for name, value in original.items())
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    weight = getattr(base, "weight", None)
    if isinstance(base, nn.Embedding):
        inputs = torch.arange(base.num_embeddings, device=base.weight.device)
    elif isinstance(weight, torch.Tensor) and (weight.ndim == 1 or isinstance(base, nn.Linear)):
        width = weight.shape[-1]  # input width of a linear or normalisation layer
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(4, width, generator=generator).to(weight.device, weight.dtype)
    else:
        return any(bool(parameter.any()) for name, parameter in layer.named_parameters() if ".lora_B." in f".{name}.")
    training = layer.training
    layer.eval()  # no dropout
    try:
        with active(layer, "policy"):
            tuned = layer(inputs)
        with active(layer, "reference"):
            plain = layer(inputs)
    finally:
        layer.train(training)
    return not torch.equal(tuned, plain)


def export_adapter(model: PeftModel, folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes the policy adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    For a few mixtures of experts, PEFT without SaferVLM can't load it; a message says so.

    Args:
        model: Model with the trained adapter.
        folder: Folder to write. An existing adapter in it is replaced.
        origin: Provenance for the seal: the settings that the adapter was trained with.

    Raises:
        ArgumentError: A value of the adapter is not finite, or the adapter changes no output.
    """
    embeddings = embeddings_included(model)
    trained = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=embeddings)
    require_finite_weights_in(trained.items(), "model: the trained adapter")
    if not has_effect(model):
        raise ArgumentError(
            "trainer: the adapter is as it was at the start, so there is nothing to export; train longer (the first "
            "step of a warm-up has a learning rate of 0), or raise model.lr"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    with temporary(folder, directory=True) as aside:
        model.save_pretrained(
            str(aside), selected_adapters=["default"], safe_serialization=True, save_embedding_layers=embeddings
        )
        set_default_permissions(aside, aside.parent)
        seal_folder(aside, origin)
        folder.mkdir(exist_ok=True)
        # The seal is moved last: until then, a folder with an older adapter's seal is rejected, never partly loaded.
        for file in sorted(aside.iterdir(), key=lambda file: file.name == SEAL):
            file.replace(folder / file.name)
    if renamed_by_peft(model.peft_config["default"], model.get_base_model()):
        say(
            f"{folder}: PEFT alone mistakes names in this adapter for those of experts, so only SaferVLM loads it; for "
            "a server, merge it into its base (safervlm merge)"
        )
