"""The trained adapter as a PEFT folder."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from safervlm.finite import must_be_trained
from safervlm.io.seals import origin_of


class AdapterExport(Callback):
    """Writes ``adapter/`` in the run folder when training ends: ``PeftModel.from_pretrained`` loads it."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports on the first process; with the strategies that are supported each one holds the whole adapter.

        Not ``on_train_end``, which Lightning passes over in a run that stands at its last step already: one that died
        between its last checkpoint and its export. Nothing is exported that was not trained, or is not finite.
        """
        must_be_trained(trainer, pl_module)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "adapter"
            pl_module.vlm.save_adapter(folder, origin_of(pl_module))  # type: ignore[operator, union-attr]
