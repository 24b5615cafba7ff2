"""The trained adapter as a PEFT folder."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer


class AdapterExport(Callback):
    """Writes ``adapter/`` in the run folder when training ends: ``PeftModel.from_pretrained`` loads it."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports on the first process; with the strategies that are supported each one holds the whole adapter.

        Not ``on_train_end``, which Lightning passes over in a run that stands at its last step already: one that died
        between its last checkpoint and its export.
        """
        if trainer.is_global_zero:
            pl_module.vlm.save_adapter(Path(trainer.default_root_dir) / "adapter")  # type: ignore[operator, union-attr]
