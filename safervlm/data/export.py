"""Exports training examples in the file formats of the first implementation."""

import os
from pathlib import Path
from typing import Any

from safervlm.data.alignment import DPOData, SFTData
from safervlm.data.image_folders import spread
from safervlm.data.image_sets import HUB_REPO, SAFE_HUB_REPO
from safervlm.io.files import write_text_atomically
from safervlm.io.names import path_text
from safervlm.io.outputs import require_replaceable_texts
from safervlm.io.reading import json_text
from safervlm.io.tables import say


def export_training_files(
    out: str,
    folder: str | None = None,
    safe_folder: str | None = None,
    repo: str = HUB_REPO,
    safe_repo: str | None = SAFE_HUB_REPO,
    cache_dir: str = "~/.cache/safervlm",
    seed: int = 0,
    limit: int | None = None,
) -> None:
    """Writes the training data in the first implementation's formats.

    The files are sft_train.json, dpo_train.json, ppo_train.json and test_data.json. Their image names are relative to
    the folder that contains both datasets, the first implementation's image folder.

    Args:
        out: Folder to write the files to.
        folder: Local folder of the unsafe dataset. None downloads it from the Hub.
        safe_folder: Local folder of the safe dataset. None downloads it from the Hub.
        repo: Hub repository of the unsafe dataset, ``owner/name`` or ``owner/name@revision``.
        safe_repo: Hub repository of the safe dataset. None exports no safe images unless ``safe_folder`` is set.
        cache_dir: Folder in which datasets downloaded from the Hub are kept.
        seed: Seed of the sampled questions.
        limit: Maximum number of images per dataset and split, spread over categories and concepts. None exports all.

    Raises:
        ArgumentError: One of the files exists with other content.
        RecordError: A dataset is unavailable or can't be read.
    """
    path_text("--out", out)
    sft, dpo = (
        data(folder, safe_folder, repo, safe_repo, cache_dir=cache_dir, seed=seed, limit=limit)
        for data in (SFTData, DPOData)
    )
    sft.prepare_data()
    # Uses the metadata files: with a single dataset, the image folder is then the parent of the dataset's folder.
    metadata = [part / "metadata.jsonl" for part in (sft.folder, sft.safe_folder) if part is not None]
    root = os.path.commonpath([file.resolve().parent.parent for file in metadata])

    def name(path: str | None) -> str:
        return Path(str(path)).resolve().relative_to(root).as_posix()

    files: dict[str, list[dict[str, Any]]] = {"sft": [], "dpo": [], "ppo": []}
    for example, pair in zip(sft.parts.train, dpo.parts.train, strict=True):
        question = example.question
        image, prompt = name(question.image_path), f"<image>\n{question.prompt}"
        (response,) = example.completions
        chosen, rejected = pair.completions
        files["sft"].append(
            {
                "image": image,
                "conversations": [{"from": "user", "value": prompt}, {"from": "assistant", "value": response}],
            }
        )
        files["dpo"].append({"image": image, "prompt": prompt, "chosen": chosen, "rejected": rejected})
        files["ppo"].append(
            {
                "image": image,
                "label": question.answer,
                "concept": question.concept.lower(),
                "type": "YORN",
                "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": ""}],
            }
        )
    test = [image for images in sft.images("test") for image in spread(images, limit)]
    written = {f"{objective}_train.json": records for objective, records in files.items()}
    written["test_data.json"] = [
        {"image_fname": name(image.path), "concept": image.concept, "label": image.label} for image in test
    ]
    texts = {Path(out) / file: json_text(records, indent=2, name=file) for file, records in written.items()}
    require_replaceable_texts("--out", texts)
    for file, text in texts.items():
        write_text_atomically(file, text)
    say(f"{out} contains {', '.join(written)}")
