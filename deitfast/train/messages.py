"""A run in words: an epoch's figures, and what more epochs do to the learning rate."""

from typing import Any

from deitfast.config.recipe import Recipe
from deitfast.eval.evaluate import final_head
from deitfast.progress import duration
from deitfast.train.optim import learning_rate, peak_lr
from deitfast.train.state import TrainState
from pipelines.errors import pluralize


def describe_lengthening(recipe: Recipe, before: int, state: TrainState, steps: int) -> str:
    """Return what more epochs do to a run's learning rate, which follows from the number of all of them, in a line."""
    schedule, peak, epochs = recipe.schedule, peak_lr(recipe.optim, recipe.train.batch), recipe.train.epochs
    last = min(state.epoch * steps + state.steps, before * steps - 1)
    old = learning_rate(schedule, peak, before, steps, *divmod(last, steps))
    new = learning_rate(schedule, peak, epochs, steps, state.epoch, state.steps)
    said = f"{before} epochs are now {epochs}"
    if schedule.shape == "cosine":
        return (
            f"{said}: the rate follows the cosine of {pluralize(epochs, 'epoch')} from here, and goes from {old:.3g} "
            f"to {new:.3g}; a run of that length would have had that cosine from the start"
        )
    return f"{said}: the rate stays on its course, at {new:.3g}"


def describe_epoch(row: dict[str, Any], epochs: int, prediction: str = "auto") -> str:
    """Return an epoch's row of metrics.jsonl as one human-readable line, with the figures of `model.prediction`."""
    parts = [f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}"]
    for name, label in (("val", "top-1"), ("val_ema", "averaged weights")):
        if name in row:
            parts.append(f"{label} {row[name][final_head(row[name], prediction)]['top1']:.2%}")
    waiting = row["waited_seconds"] / max(row["seconds"], 1e-9)
    if row["skipped"]:
        parts.append(f"{row['skipped']:,} damaged skipped")
    parts.append(f"{row['images_per_second']:,.0f} images/s, waiting {waiting:.0%}, {duration(row['seconds'])}")
    return ", ".join(parts)
