"""What ``safervlm doctor`` checks of a recipe: its VLM, adapter, data, judges and servers."""

import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
from huggingface_hub import HfApi, auth_check, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from jsonargparse import Namespace
from transformers import AutoModelForImageTextToText

from safervlm.cli.machine import Finding, size_text
from safervlm.data.sources import on_the_hub
from safervlm.errors import RecordError
from safervlm.io.reading import read_object
from safervlm.io.settings import flat
from safervlm.records import read_jsonl
from safervlm.vlm.lora import LoRA, adapted_layers
from safervlm.vlm.sizes import bounded_config, sized
from safervlm.vlm.stored import weight_files


def recipe(settings: Namespace, online: bool) -> Iterator[Finding]:
    """Checks what a recipe refers to: the VLM, its adapter, the data and the judges.

    Args:
        settings: Parsed settings of the command.
        online: Whether to ask the Hub.
    """
    named = dict(flat(settings.as_dict(), lists=True))
    trains = settings.model.class_path.startswith("safervlm.objectives.")
    for key, value in named.items():
        name = key.rsplit(".", 1)[-1]
        if name == "trust_remote_code":
            stem = key.removesuffix(name)
            yield from remote_code(str(named[f"{stem}model"]), named.get(f"{stem}revision"), bool(value))
        if value is None or not isinstance(value, str):
            continue
        argument = key.replace(".init_args", "")
        if name == "model" and key.endswith("vlm.init_args.model"):
            yield from model(value, named.get(key.removesuffix("model") + "revision"), online)
            if trains and Path(value).is_dir():
                stem = key.removesuffix("model") + "lora."
                adapters = 2 if named.get("model.init_args.value_on") == "adapter" else 1
                lora = LoRA(
                    dropout=0.0, **{name: named[f"{stem}{name}"] for name in ("r", "target_modules", "experts")}
                )
                yield training(Path(value), lora, adapters)
        elif name == "adapter":
            there = (Path(value) / "adapter_config.json").is_file()
            found = value if there else f"no adapter_config.json in {value!r}; give the folder that fit exported"
            yield Finding("ok" if there else "error", "adapter", found)
        elif name in ("folder", "safe_folder"):
            yield image_folder(argument, value)
        elif name in ("repo", "safe_repo") and not named.get(key.replace("repo", "folder")):
            yield from repository(argument, value, "dataset", online)
        elif name == "checkpoint":
            yield from judge(value, online)
        elif name == "source":
            yield from source(argument, value, online)
        elif name == "contexts":
            there = Path(value).is_file()
            found = value if there else f"no file {value!r}: the published questions, or yours; see docs/data.md"
            yield Finding("ok" if there else "error", argument, found)
        elif name == "api_key_variable":
            stem = key.removesuffix(name) + "addresses."
            yield from server(value, [address for other, address in named.items() if other.startswith(stem)])


def model(name: str, revision: str | None, online: bool) -> Iterator[Finding]:
    """Checks whether a model exists, is pinned to a revision, and fits into memory.

    Args:
        name: Folder, or repository of the Hub.
        revision: Revision of the repository; None if not pinned.
        online: Whether to ask the Hub.
    """
    if Path(name).is_dir():
        weights = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
        if not weights:
            yield Finding("error", "VLM", f"no *.safetensors in {name}; save_pretrained writes them")
            return
        yield Finding("ok", "VLM", f"{name}, {size_text(weights)} of weights")
        yield from memory(weights)
        return
    if name.startswith((".", "/")):
        yield Finding(
            "error", "VLM", f"no folder {name!r} here ({Path.cwd()}); for the pictograms: safervlm pictograms"
        )
        return
    yield from repository("VLM", name, "model", online, revision)
    yield from size(name, revision, online)
    if revision is None:
        yield Finding("warning", "VLM's revision", "not pinned: name a commit (--model.vlm.revision) to repeat the run")


def size(name: str, revision: str | None, online: bool) -> Iterator[Finding]:
    """Checks the size of a Hub model's weights, by its cached index or, if ``online``, by the Hub.

    Args:
        name: Repository of the Hub.
        revision: Revision of the repository; None for the default.
        online: Whether to ask the Hub if no index is cached.
    """
    index = try_to_load_from_cache(name, "model.safetensors.index.json", revision=revision)
    weights = 0
    if isinstance(index, str):
        try:
            weights = int(read_object(Path(index), "remove it, and it is fetched again")["metadata"]["total_size"])
        except RecordError as error:
            yield Finding("error", "VLM's weights", str(error))
            return
        except (KeyError, TypeError, ValueError):
            yield Finding("warning", "VLM's weights", f"{index} lacks their size")
            return
    elif online:
        try:
            files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
        except Exception as error:
            yield Finding("warning", "VLM's weights", f"the Hub doesn't report their size ({type(error).__name__})")
            return
        weights = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    if weights:
        yield Finding("ok", "VLM's weights", size_text(weights))
        yield from memory(weights)


def memory(weights: int) -> Iterator[Finding]:
    """Checks whether weights fit into the memory of the first GPU, if there is one; generation takes additional memory.

    Args:
        weights: Size of the weights in bytes.
    """
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info(0)[1]
        state: Literal["ok", "error"] = "ok" if weights < total else "error"
        yield Finding(state, "memory", f"weights of {size_text(weights)}, a GPU of {size_text(total)}")


def remote_code(name: str, revision: str | None, trusted: bool) -> Iterator[Finding]:
    """Checks whether running a model's own code is allowed, and pinned to a commit.

    Args:
        name: Folder, or repository of the Hub.
        revision: Revision of the repository; None if not pinned.
        trusted: Value of ``trust_remote_code``.
    """
    if not trusted:
        yield Finding("error", "VLM's code", f"{name} runs its own code: read it, then trust_remote_code: true")
    elif Path(name).is_dir():
        yield Finding("ok", "VLM's code", f"the .py files in {name}")
    elif not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        found = f"from the Hub, revision {revision!r}: give all 40 digits of the commit that you have read"
        yield Finding("error", "VLM's code", found)
    else:
        yield Finding("ok", "VLM's code", f"pinned to {revision}")


def training(folder: Path, lora: LoRA, adapters: int) -> Finding:
    """Estimates the memory of training besides the base weights; activations are extra, and depend on the batch.

    Args:
        folder: Folder of the model.
        lora: Settings of the adapters.
        adapters: Number of adapters.

    Returns:
        A warning if the memory can't be determined for this model.
    """
    try:
        needed = training_memory(folder, lora, adapters)
    except (ValueError, KeyError, OSError) as error:
        return Finding("warning", "training memory", f"unknown for this model ({str(error).splitlines()[0]})")
    text = f"{size_text(needed)} of adapters and optimizer, activations on top (docs/scaling.md)"
    return Finding("ok", "training memory", text)


def training_memory(folder: Path, lora: LoRA, adapters: int = 1) -> int:
    """Computes the bytes of the adapters, their gradients and AdamW's two moment estimates, all in float32.

    Args:
        folder: Folder of the model.
        lora: Settings of the adapters.
        adapters: Number of adapters.

    Raises:
        ArgumentError: The settings match nothing in this model, matching takes too long, or the model is larger than
            its weights.
        ValueError: Transformers does not know the model.
    """
    with torch.device("meta"), sized(str(folder), weight_files(folder), "vlm.model"):  # allocates no memory for weights
        model = AutoModelForImageTextToText.from_config(bounded_config(str(folder)), trust_remote_code=False)
    layers = adapted_layers(model, lora)
    linear = [model.get_submodule(name) for name in layers.modules]
    sizes = [module.in_features + module.out_features for module in linear if isinstance(module, torch.nn.Linear)]
    stacks = [model.get_parameter(name).shape for name in layers.parameters]
    return 4 * 4 * lora.r * adapters * (sum(sizes) + sum(count * sum(rest) for count, *rest in stacks))


def server(key_variable: str, addresses: Sequence[str]) -> Iterator[Finding]:
    """Checks the requirements of a server: the package openai, and a key for OpenAI's own address.

    Args:
        key_variable: Environment variable of the key.
        addresses: URLs of the servers; they are not contacted.
    """
    if find_spec("openai") is None:
        yield Finding("error", "server", "the package openai is missing; pip install 'safervlm[api]'")
    for address in addresses:
        if urlsplit(address).hostname == "api.openai.com" and not os.environ.get(key_variable):
            yield Finding("error", "server", f"{address} needs a key: export {key_variable}=...")
        else:
            yield Finding("ok", "server", f"{address}, not contacted; a key is read from {key_variable}")


def image_folder(argument: str, folder: str) -> Finding:
    """Checks a dataset's folder: its metadata, and whether the images that it names exist.

    Args:
        argument: Argument that names the folder.
        folder: Path of the folder.
    """
    metadata = Path(folder) / "metadata.jsonl"
    if not metadata.is_file():
        return Finding("error", argument, f"no {metadata}; see docs/data.md, or safervlm pictograms")
    images = [record.get("image_filename", record.get("file_name")) for record in read_jsonl(metadata)]
    missing = [image for image in images if not (Path(folder) / str(image)).is_file()]
    if missing:
        found = f"{len(missing)} of {len(images)} images are missing in {folder}, for example {missing[0]}"
        return Finding("error", argument, found)
    return Finding("ok", argument, f"{folder}, {len(images)} images")


def source(argument: str, name: str, online: bool) -> Iterator[Finding]:
    """Checks a benchmark's table or folder: a local path, a URL, or a repository of the Hub.

    Args:
        argument: Argument that names the source.
        name: Path, URL or repository.
        online: Whether to ask the Hub.
    """
    if Path(name).expanduser().exists():
        yield Finding("ok", argument, name)
    elif name.startswith("http"):
        yield Finding("warning", argument, f"{name} is fetched when it is first asked")
    elif not on_the_hub(name):
        yield Finding("error", argument, f"no {name!r} here ({Path.cwd()}); see docs/data.md")
    else:
        yield from repository(argument, name, "dataset", online)


def judge(checkpoint: str, online: bool) -> Iterator[Finding]:
    """Checks a judge's weights: a file, a folder, or REPOSITORY:FILE on the Hub.

    Args:
        checkpoint: Path, or REPOSITORY:FILE.
        online: Whether to ask the Hub.
    """
    if Path(checkpoint).exists():
        yield Finding("ok", "judge", checkpoint)
    elif ":" in checkpoint:
        yield from repository("judge", checkpoint.split(":")[0], "model", online)
    else:
        yield Finding("error", "judge", f"no {checkpoint!r} here; for the pictograms: safervlm pictograms")


def repository(
    what: str, name: str, kind: Literal["model", "dataset"], online: bool, revision: str | None = None
) -> Iterator[Finding]:
    """Checks whether a repository of the Hub is cached or accessible.

    Args:
        what: What the repository is used for, shown in the table.
        name: Repository, optionally with ``@REVISION``.
        kind: Kind of the repository.
        online: Whether to ask the Hub.
        revision: Revision, unless ``name`` has one.
    """
    repo, _, pinned = name.partition("@")
    revision = pinned or revision
    if kind == "model" and isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
        yield Finding("ok", what, f"{repo} is in the Hub's cache")
        return
    if not online:
        yield Finding("warning", what, f"{repo} comes from the Hub; --online true asks whether it is accessible")
        return
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        auth_check(repo, repo_type=kind)
    except GatedRepoError:
        yield Finding("error", what, f"{repo} is gated: accept its terms on {page}, then hf auth login")
    except RepositoryNotFoundError:
        yield Finding("error", what, f"{repo} does not exist, or is private: {page}")
    except Exception as error:
        yield Finding("error", what, f"{repo}: the Hub can't be reached ({type(error).__name__})")
    else:
        yield Finding("ok", what, f"{repo} is accessible")
