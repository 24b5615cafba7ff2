"""Writes responses in the file format of the first implementation, for scripts that read it."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from safervlm.data.responses import read_responses
from safervlm.errors import RecordError
from safervlm.io.files import write_text_atomically
from safervlm.io.reading import json_text
from safervlm.run_folder import RunFolder


class FirstImplementationFiles(Callback):
    """After ``predict``, writes ``first_implementation/SET/CAPABILITY/response_prompt_N.json`` into the run folder.

    Each file contains a list of records with the keys prompt, image_fname and output. The format has no field for the
    dataset of an image, so each dataset has its own folder, which the first implementation treats as the folder of a
    VLM. The callback must come after the RecordWriter, which writes the ``responses.jsonl`` that it reads.

    Args:
        blank: The image_fname of a question about a concept's name.
    """

    def __init__(self, blank: str = "blank_image.png") -> None:
        self.blank = blank

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the files, on the first process.

        Raises:
            RecordError: The name of a dataset cannot name a folder, or ``responses.jsonl`` is damaged.
        """
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        files: dict[Path, list[dict[str, Any]]] = defaultdict(list)
        for response in read_responses(run, may_be_empty=True):
            question = response.question
            if question.dataset in ("", ".", "..") or "/" in question.dataset:
                raise RecordError(
                    f"{question.id}: the dataset {question.dataset!r} can't be a folder's name; rename it"
                )
            folder = RunFolder(run).first_implementation / question.dataset / question.capability
            file = folder / f"response_prompt_{question.prompt_number}.json"
            image = question.image if question.image_path is not None else self.blank
            files[file].append({"prompt": question.prompt, "image_fname": image, "output": response.response})
        for file, records in files.items():
            text = json_text(records, indent=2)
            write_text_atomically(file, text)
