"""Exports the trained adapter as a PEFT folder."""

from lightning import Callback, LightningModule, Trainer

from safervlm.finite import require_optimizer_step
from safervlm.io.seals import origin_of
from safervlm.run_folder import RunFolder


class AdapterExport(Callback):
    """Writes ``adapter/`` into the run folder when training ends; ``PeftModel.from_pretrained`` loads it."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports on the first process; with all supported strategies each process has the whole adapter.

        The hook is not ``on_train_end``: Lightning skips that one in a run that is resumed at its last step, such as a
        run that was killed between its last checkpoint and its export.

        Raises:
            ArgumentError: No optimizer step was made.
            NotFiniteError: A trained weight is NaN or infinite.
        """
        require_optimizer_step(trainer, pl_module)
        if trainer.is_global_zero:
            folder = RunFolder(trainer.default_root_dir).adapter
            pl_module.vlm.save_adapter(folder, origin_of(pl_module))  # type: ignore[operator, union-attr]
