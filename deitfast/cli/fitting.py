"""What the user left to deitfast, fitted to the data set, the ranks and a teacher cache, with a line on each change."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from deitfast.config import recipe as recipes
from deitfast.config.fit_to_data import Batching, DataFacts, fit_to_data
from deitfast.distill.cache_manifest import is_cache, read_manifest
from pipelines.errors import pluralize
from pipelines.workers import world_size

OF_CACHE = ("augment.mix_group", "augment.repeats", "augment.mixup", "augment.cutmix")
"""Fields that may be fitted, and that a teacher cache was filled for."""


def fit_recipe(values: Mapping[str, Any], kept: Collection[str], facts: DataFacts) -> tuple[dict[str, Any], list[str]]:
    """Return what is to be changed so that a recipe fits its teacher cache, the data and the ranks, and notes on it.

    Args:
        values: every field by full name; bad ones are left to the validation.
        kept: fields that stay.
        facts: of the data set.

    Raises:
        UserError: what is kept cannot work.
        DeitfastError: the cache is damaged.
    """
    if not facts.counts:
        return {}, []
    changes, notes = _of_cache(values, kept)
    good = recipes.with_defaults_for_bad({**values, **changes})
    valid = {key for key in (*kept, *_cached(values)) if good.get(key) == {**values, **changes}[key]}
    ranks, images = world_size(), facts.images(good["train.fraction"])
    fitted, said = fit_to_data(good, valid, images, ranks)
    changes |= {key: value for key, value in fitted.items() if key not in kept}
    if len(facts.counts) == 1:
        notes.append("the data set has one class: whatever is learned, top-1 is 100 %")
    return changes, [*notes, *said, *_of_average({**good, **changes}, images)]


def _cached(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run's teacher cache was filled with, of OF_CACHE; empty where it has none yet."""
    folder = values["distill.cache"]
    if values["distill.mode"] == "none" or folder in ("none", "auto") or not is_cache(Path(str(folder))):
        return {}
    identity = read_manifest(Path(folder)).identity
    return {key: identity[key] for key in OF_CACHE if key in identity}


def _of_cache(values: Mapping[str, Any], kept: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    changes = {key: value for key, value in _cached(values).items() if value != values[key] and key not in kept}
    said = ", ".join(f"{key} {value} instead of {values[key]}" for key, value in changes.items())
    return changes, [f"{said}: as the teacher cache {values['distill.cache']} has it"] if said else []


def _of_average(values: Mapping[str, Any], images: int) -> list[str]:
    """Return a line where the run is shorter than what its averaged weights would average over."""
    decay = values["train.ema"]
    group = values["augment.mix_group"] if values["augment.mixup"] or values["augment.cutmix"] else 1
    batch = values["train.batch"]
    steps = Batching(batch, group, values["augment.repeats"]).views(images) // batch * values["train.epochs"]
    if not decay or steps * (1 - decay) >= 1:
        return []
    highest = steps / (9 + steps)  # `train.ema.Ema`'s in its last update
    return [f"averaged weights: decay at most {highest:.3g} instead of {decay:g}: {pluralize(steps, 'step')} in all"]
