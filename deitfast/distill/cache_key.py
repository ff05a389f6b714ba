"""Which teacher cache belongs to which run: what its targets depend on, compared field by field."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import training_sampler, training_subset
from deitfast.distill.cache_manifest import (
    ABSENT,
    FORMAT,
    MANIFEST,
    Manifest,
    TargetSpec,
    damaged,
    is_cache,
    read_manifest,
    require_same,
)
from deitfast.distill.teacher import FINGERPRINT, LoadedTeacher, load_teacher
from deitfast.environment import version
from deitfast.runtime import Runtime
from deitfast.weights.zoo import is_zoo_model
from pipelines.errors import UserError
from pipelines.loaders.factory import exact
from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import RAW

CACHES = Path("caches")
"""Parent of caches without a name of their own."""
WHOLE_IMAGE_FIELDS = ("size", "crop", "eval_crop", "eval_resize", "eval_interpolation", "mean", "std")
"""Fields of `AugmentSpec` that decide what a teacher sees of a whole image; of a view all do, but eval_*."""
LIBRARIES = ("torch", "torchvision", "pillow", "numpy", "nvidia-nvimgcodec-cu13", "nvidia-dali-cuda130", "ffcv")
LIBRARIES += ("nvidia-nvimgcodec-cu12", "nvidia-dali-cuda120")


def teacher_fingerprint(
    recipe: Recipe, classes: tuple[str, ...], *, required: bool = False
) -> tuple[dict[str, Any], LoadedTeacher | None]:
    """Return what a run can know of its teacher, for comparison with its cache, and the teacher if it was loaded.

    With a complete cache the teacher is not needed: a run or file that is there is read for its digest, and nothing is
    downloaded, unless it is `required`. Fields that are not known then are None.

    Raises:
        UserError: the cache is not complete and there is no such teacher, or it does not know the classes.
    """
    distill = recipe.distill
    complete = is_cache(Path(distill.cache)) and bool(read_manifest(Path(distill.cache)).crc32)
    downloaded = is_zoo_model(distill.teacher) and not distill.teacher_weights
    absent = not Path(distill.teacher_weights or distill.teacher or "/nowhere").exists()
    if complete and not required and (downloaded or absent):
        unknown: dict[str, Any] = {f"teacher.{name}": None for name in FINGERPRINT}
        return unknown | ({"teacher.network": distill.teacher} if downloaded else {}), None
    loaded = load_teacher(distill, classes)
    return loaded.fingerprint(), loaded


def uses_cache(recipe: Recipe) -> bool:
    """Whether a run's targets go through a cache.

    `distill.cache = "auto"` stores hard targets, which are small and exact. Soft ones take 20 times as much and leave
    out small logits: only on request.
    """
    distill = recipe.distill
    if distill.mode == "none" or distill.cache == "none":
        return False
    return distill.cache != "auto" or distill.mode == "hard" or distill.targets != "exact"


def cache_folder(recipe: Recipe, dataset: Dataset, manifest: Manifest) -> Path:
    """Return the folder of a run's cache. `distill.cache = "auto"` names it by all that its targets depend on."""
    if recipe.distill.cache != "auto":
        return Path(recipe.distill.cache)
    key = json.dumps([manifest.format, manifest.identity, manifest.views], sort_keys=True).encode()
    digest = hashlib.blake2b(key, digest_size=4).hexdigest()
    network = str(manifest.identity["teacher.network"]).replace("/", "-")  # of timm/NAME
    return CACHES / f"{dataset.spec.name}-{network}-{digest}"


def require_fit(folder: Path, stored: Manifest, needed: Manifest) -> None:
    """Check that a cache has what a run needs, or will have once it is complete.

    Raises:
        UserError: it is of another data set, recipe, teacher or loader (the message names the fields), or has fewer
            views.
    """
    require_same(folder, stored.identity, needed.identity)
    for name in ("classes", "samples", "targets_per_view", "repeats"):  # follow from what is the same
        if getattr(stored, name) != getattr(needed, name):
            raise damaged(folder / MANIFEST, f"{name} {getattr(needed, name)}", f"{name} {getattr(stored, name)}")
    if needed.views > stored.views:
        raise UserError(
            f"the teacher cache {folder} has fewer views of each image than the run needs",
            expected=f"{needed.views}",
            found=f"{stored.views}",
            remedy=f"--views {stored.views} uses them again and again (not exactly DeiT), or fill another cache with "
            "`deitfast teach`",
        )


def software_changes(manifest: Manifest, runtime: Runtime) -> list[str]:
    """Return in which precision and versions a run differs from what a cache was started with."""
    now = _software(runtime)
    return [f"{name} {old} -> {now.get(name)}" for name, old in manifest.made_with.items() if now.get(name) != old]


def needed_manifest(
    recipe: Recipe, dataset: Dataset, loader: str, teacher: dict[str, Any], runtime: Runtime
) -> Manifest:
    """Return the manifest of the cache that a run needs, before anything is in it.

    Args:
        recipe: of the run.
        dataset: that it trains on.
        loader: name of the loader that makes its pixels.
        teacher: `LoadedTeacher.fingerprint()`; None for what is not known, as the teacher is not loaded.
        runtime: of the run.

    Raises:
        UserError: there are more classes than the format has labels.
    """
    per_image = recipe.distill.targets == "per_image"
    samples = dataset.split("train").num_samples
    fields, spec = asdict(recipe.augment), target_spec(recipe, dataset)
    chosen = WHOLE_IMAGE_FIELDS if per_image else [name for name in fields if not name.startswith("eval_")]
    identity = {
        "data": dataset.spec.fingerprint,
        "fraction": recipe.train.fraction,
        "loader": pixels_of(loader, dataset, recipe, runtime),
        "teacher.sees": "each image, whole" if per_image else "each view",
        **{f"targets.{name}": value for name, value in asdict(spec).items() if name != "tau"},  # any tau may read them
        **{f"augment.{name}": fields[name] for name in chosen},
        **teacher,
    }
    batch = recipe.augment.mix_group * runtime.world  # any that the ranks can share
    per_view = training_sampler(dataset, recipe, runtime, batch, include_partial=True).views_per_epoch
    if per_image:
        subset = training_subset(dataset, recipe)
        per_view = samples if subset is None else len(subset)
    return Manifest(
        FORMAT,
        spec,
        classes=len(dataset.spec.classes),
        views=1 if per_image else recipe.views,
        samples=samples,
        targets_per_view=per_view,
        repeats=1 if per_image else recipe.augment.repeats,
        identity=identity,
        made_with=_software(runtime),
    )


def target_spec(recipe: Recipe, dataset: Dataset) -> TargetSpec:
    """Return what a run's cache stores of the teacher's logits.

    Raises:
        UserError: more classes than a label of two bytes tells apart.
    """
    distill, classes = recipe.distill, len(dataset.spec.classes)
    if classes >= ABSENT:
        raise UserError(f"a teacher cache holds less than {ABSENT:,} classes", found=f"{classes:,}")
    if distill.mode == "hard":
        return TargetSpec("hard")
    return TargetSpec("soft", min(distill.top_k, classes), distill.top_dtype, distill.tau)


def pixels_of(loader: str, dataset: Dataset, recipe: Recipe, runtime: Runtime) -> str:
    """Return whose pixels a loader gives: "any" where nothing is decoded and nothing resized, else its own."""
    reader, augment = dataset.split("train"), recipe.augment
    sides = np.minimum(reader.heights, reader.widths)
    if augment.crop == "padded" and (reader.modes == RAW).all() and (sides == augment.size).all():
        return "any"
    if loader == "dali":
        return f"dali on {runtime.device.type}"  # decodes and resizes on the device: other pixels on another one
    return "reference" if exact(loader) else loader


def _software(runtime: Runtime) -> dict[str, str]:
    installed = {name: found for name in LIBRARIES if (found := version(name))}
    return {"precision": runtime.precision, **installed}
