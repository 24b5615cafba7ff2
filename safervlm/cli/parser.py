"""Argument parser whose errors are one line, and the file of a run's configuration."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from safervlm.addresses import public
from safervlm.cli.messages import one_line
from safervlm.cli.trainer import has_folder
from safervlm.io.boundary import fail
from safervlm.io.files import write_text_atomically
from safervlm.io.settings import flat, from_yaml


class OneLineParser(LightningArgumentParser):
    """Argument parser whose errors are one line: argument, value and remedy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Otherwise --trainer.max_step would be accepted as an abbreviation of --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def option_names(self) -> list[str]:
        """Returns the names of the options, with dashes."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        """Adds the arguments of a class; the ``save_dir`` of a logger becomes optional.

        Args:
            class_type: Class whose arguments are added.
            *args: Further positional arguments of jsonargparse.
            **kwargs: Keyword arguments of jsonargparse.
        """
        if not has_folder(class_type):
            return super().add_class_arguments(class_type, *args, **kwargs)
        added = super().add_class_arguments(
            class_type, *args, **kwargs | {"skip": {*kwargs.get("skip", ()), "save_dir"}}
        )
        self.add_argument("--save_dir", type=str | None, default=None, help="Folder of the logs; None: the run folder.")
        return [*added, "save_dir"]

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parses arguments; jsonargparse also calls it with one argument of a class inside another one.

        It writes the value of such an argument as a text, in which null is None: an argument that may be null or a text
        would be the text "None".

        Args:
            args: Words of the command line, or one argument of a nested class.
            *rest: Further positional arguments of jsonargparse.
            **kwargs: Keyword arguments of jsonargparse.

        Returns:
            The parsed settings.
        """
        if args is not None and len(args) == 1 and args[0].endswith("=None"):
            args = [f"{args[0].removesuffix('None')}null"]
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error in one line and exits with code 2.

        Args:
            message: Error message of jsonargparse.
            ex: Exception that caused the error; unused.

        Raises:
            SystemExit: Always.
        """
        known = [action.dest for action in self._actions]
        fail(one_line(message, sys.argv[1:], known))


class ConfigInRunFolder(SaveConfigCallback):
    """Callback that saves the configuration in the run folder; Lightning would use the logger's folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes ``fit.yaml``, ``validate.yaml`` or ``predict.yaml``, with addresses in their public form.

        Args:
            trainer: Trainer, which has the path of the run folder.
            pl_module: Unused.
            stage: Unused.
        """
        # Includes null values: if omitted, they would become defaults when the file is used again.
        text = self.parser.dump(self.config, skip_unset=False)
        for _, value in flat(from_yaml(text), lists=True):
            if isinstance(value, str):
                text = text.replace(value, public(value)) if public(value) != value else text
        path = Path(trainer.default_root_dir) / self.config_filename
        write_text_atomically(path, text)
