"""Learning-rate schedules of trainings that resume or are extended."""

from lightning import Trainer
from torch.optim.lr_scheduler import LambdaLR


def follow_schedules(trainer: Trainer) -> None:
    """Sets the learning rates to those of the schedules at the current step.

    A checkpoint restores the learning rates of the training that wrote it. If the training is extended, its schedule is
    longer than before; otherwise this changes nothing.

    Args:
        trainer: Trainer of the fit, whose state is restored.
    """
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, LambdaLR):
            groups = schedule.optimizer.param_groups
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = base * factor(schedule.last_epoch)
