"""The learning rate as a pure function of time."""

import math

from deitfast.config.recipe import ScheduleSpec


def learning_rate(
    schedule: ScheduleSpec, peak: float, epochs: int, steps_per_epoch: int, epoch: int, step: int
) -> float:
    """Return the learning rate of one step: linear warm-up, then half a cosine over all epochs or the peak.

    With t in epochs and w epochs of warm-up: t < w: warmup_lr + (peak - warmup_lr) t / w;
    else: min_lr + (peak - min_lr) (1 + cos(pi t / epochs)) / 2, or with `shape = "constant"` the peak.

    t is epoch + step / steps_per_epoch, or with `per = "epoch"` what the DeiT reference uses: it steps timm 0.3.2's
    `CosineLRScheduler` after each epoch with that epoch's number, so t is one epoch late and epochs 0 and 1 are both 0.

    Args:
        peak: the learning rate that warm-up leads to, already scaled by the batch.
        epochs: epochs of the whole run.
        steps_per_epoch: updates in one epoch.
        epoch: from 0.
        step: update in the epoch, from 0.
    """
    time = max(0, epoch - 1) if schedule.per == "epoch" else epoch + step / steps_per_epoch
    if time < schedule.warmup_epochs:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * time / schedule.warmup_epochs
    if schedule.shape == "constant":
        return peak
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1 + math.cos(math.pi * time / epochs))
