"""``safervlm merge``: writes the base model of a training with the adapter merged into its weights."""

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from safervlm.cli.lightning import silence_third_party
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.caches import temporary
from safervlm.io.outputs import require_empty_folder
from safervlm.io.tables import say
from safervlm.io.trust import check_trust, named_in, read_config
from safervlm.protocol import ALIGNMENT_QUESTIONS, SAFE, UNSAFE, aligned_response
from safervlm.records import Example, Question
from safervlm.reports.model_card import model_card
from safervlm.run import locked
from safervlm.run_folder import RunFolder
from safervlm.vlm.local import LocalVLM
from safervlm.vlm.merging import merge_adapter, write_merged
from safervlm.vlm.remote.base import Remote

MAX_DIFFERENCE = 1e-2  # nats; rounding in float32 changes a log-probability by less
QUESTIONS = f"{2 * len(ALIGNMENT_QUESTIONS)} questions about two images of noise with two responses each"


def merge(
    run: Path,
    out: Path,
    dtype: Literal["float32", "bfloat16"] | None = None,
    shard_size: str = "5GB",
    trust_config: bool = False,
) -> Path:
    """Writes the base model of a training with the adapter merged into its weights, for servers and other programs.

    The folder contains weights (safetensors), the processor's files and a model card with data, objective, scores with
    their intervals and judges, and the base model's licence. The change of log-probabilities by rounding is measured
    and reported.

    Args:
        run: The folder of a finished training.
        out: The folder to write; it must not exist, or be empty.
        dtype: Precision of the weights; by default that of the run.
        shard_size: Largest size of a weight file.
        trust_config: Allow classes that the run's configuration names and that are not SaferVLM's.

    Returns:
        The folder.

    Raises:
        RecordError: The run has no adapter, no configuration, or another command is running in it.
        ArgumentError: The output folder is not empty, the model runs its own code, the adapter can't be merged, or
            merging changes what the model computes.
    """
    run, out = Path(run), Path(out)
    config, adapter = RunFolder(run).fit_config, RunFolder(run).adapter
    for needed in (config, adapter / "adapter_config.json"):
        if not needed.is_file():
            raise RecordError(f"run: no {needed}; name the folder of a finished training (safervlm train --help)")
    require_empty_folder("out", out)
    silence_third_party()
    settings = read_config(config)
    check_trust(config, named_in(settings.get("model"), run), "run", trust_config)
    with locked(run):
        vlm = _loaded(config, settings, adapter, dtype)
        with tempfile.TemporaryDirectory(prefix="safervlm-") as folder:
            before = _logprobs(vlm, Path(folder))
            merge_adapter(vlm)
            moved = (_logprobs(vlm, Path(folder)) - before).abs()
        if vlm.dtype == torch.float32 and moved.max() > MAX_DIFFERENCE:
            raise ArgumentError(
                f"run: with the adapter in the weights of {vlm.name!r}, log-probabilities differ by as much as "
                f"{moved.max():.2g} nats, more than rounding in float32 explains; serve the base model with its adapter"
            )
        rounding = f"at most {moved.max():.2g}, on average {moved.mean():.2g} nats per token"
        differs = f"Log-probabilities differ from those of base plus adapter by {rounding}, on {QUESTIONS}."
        card = model_card(run, vlm.name, vlm.revision, str(vlm.dtype).removeprefix("torch."), differs)
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary(out, directory=True) as aside:
            write_merged(vlm, aside, shard_size)
            (aside / "README.md").write_text(card, encoding="utf-8", newline="\n")
            if out.is_dir():
                out.rmdir()  # it is empty
            aside.rename(out)
    say(f"merged: {out}; log-probabilities differ from base plus adapter by {rounding}")
    return out


def _loaded(config: Path, settings: dict[str, Any], adapter: Path, dtype: str | None) -> LocalVLM:
    try:
        named = settings["model"]["init_args"]["vlm"]
        init_args = {**named["init_args"], "adapter": str(adapter)} | ({"dtype": dtype} if dtype else {})
        named = {**named, "init_args": init_args}
    except (KeyError, TypeError):
        raise RecordError(f"run: {config} names no VLM; give the run folder of a training") from None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LocalVLM, "vlm")
    vlm: LocalVLM = parser.instantiate(parser.parse_object({"vlm": named})).vlm
    if isinstance(vlm, Remote):
        raise ArgumentError(
            f"run: {vlm.name!r} runs code of its own, which a merged model can't contain; serve it with its adapter"
        )
    vlm.collator  # noqa: B018 (a model in another format is converted, and named, on first access)
    vlm.load()
    return vlm


@torch.no_grad()
def _logprobs(vlm: LocalVLM, folder: Path) -> torch.Tensor:
    """Returns the log-probabilities of two responses to each alignment question about two images of noise."""
    found = []
    for image in range(2):
        path = folder / f"{image}.png"
        Image.fromarray(np.random.default_rng(image).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
        for number, prompt in enumerate(ALIGNMENT_QUESTIONS):
            question = Question(f"{image}/{number}", "", path.name, str(path), "alignment", number, prompt, "", "", "")
            answers = tuple(aligned_response(label, number, "a knife") for label in (SAFE, UNSAFE))
            scores = vlm.score(vlm.collator([Example(question, answers)]))
            found.append(scores.logprobs[scores.mask].double())
    return torch.cat(found)
