"""The first implementation's response files, for whoever has scripts that read them."""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from safervlm.data.responses import read_responses
from safervlm.errors import RecordError
from safervlm.io.files import write_atomically


class FirstImplementationFiles(Callback):
    """After ``predict``, writes ``first_implementation/SET/CAPABILITY/response_prompt_N.json`` into the run folder.

    Each holds a list of prompt, image_fname and output. A data set has a folder of its own, which that implementation
    takes for a VLM's: its files don't say which set an image is of. It stands behind the RecordWriter, which writes the
    ``responses.jsonl`` that it reads.

    Args:
        blank: what a question about a name carries as its image.
    """

    def __init__(self, blank: str = "blank_image.png") -> None:
        self.blank = blank

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes, on one process."""
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        files: dict[Path, list[dict[str, Any]]] = defaultdict(list)
        for response in read_responses(run, may_be_empty=True):
            question = response.question
            if question.dataset in ("", ".", "..") or "/" in question.dataset:
                raise RecordError(f"{question.id}: the data set {question.dataset!r} can't name a folder; rename it")
            folder = run / "first_implementation" / question.dataset / question.capability
            file = folder / f"response_prompt_{question.prompt_number}.json"
            image = question.image if question.image_path is not None else self.blank
            files[file].append({"prompt": question.prompt, "image_fname": image, "output": response.response})
        for file, records in files.items():
            text = json.dumps(records, indent=2, ensure_ascii=False)
            write_atomically(file, partial(Path.write_text, data=text, encoding="utf-8"))
