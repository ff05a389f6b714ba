"""Which teacher cache belongs to which run: what its targets depend on, compared field by field."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import training_sampler, training_subset
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_files import ABSENT, FORMAT, Manifest, TargetSpec, is_cache, read_manifest, require_same
from deitfast.distill.teacher import FINGERPRINT_FIELDS, LoadedTeacher, load_teacher
from deitfast.environment import version
from deitfast.runtime import Runtime
from deitfast.weights.zoo import is_zoo_model
from pipelines.errors import UserError
from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import RAW

CACHES = Path("caches")
"""Where caches go that were not given a name."""
PER_IMAGE = ("size", "crop", "eval_crop", "eval_resize", "eval_interpolation", "mean", "std")
"""Fields of `AugmentSpec` that decide what a teacher sees of a whole image; eval_* have no part in a view."""
LIBRARIES = ("torch", "torchvision", "pillow", "numpy", "nvidia-nvimgcodec-cu13", "nvidia-dali-cuda130", "ffcv")
LIBRARIES += ("nvidia-nvimgcodec-cu12", "nvidia-dali-cuda120")


def teacher_fingerprint(recipe: Recipe, classes: tuple[str, ...]) -> tuple[dict[str, Any], LoadedTeacher | None]:
    """Return what a run can know of its teacher, for comparison with its cache, and the teacher if it is at hand.

    With a complete cache nobody needs the teacher: a run or file that is there is read for its digest, and nothing is
    fetched.

    Raises:
        UserError: the cache is not complete and there is no such teacher, or it does not know the classes.
    """
    distill = recipe.distill
    complete = is_cache(Path(distill.cache)) and bool(read_manifest(Path(distill.cache)).crc32)
    published = is_zoo_model(distill.teacher) and not distill.teacher_weights
    if complete and (published or not Path(distill.teacher_weights or distill.teacher or "/nowhere").exists()):
        return dict.fromkeys(FINGERPRINT_FIELDS) | ({"teacher.network": distill.teacher} if published else {}), None
    loaded = load_teacher(distill, classes)
    return loaded.identity(), loaded


def uses_cache(recipe: Recipe) -> bool:
    """Whether a run's targets go through a cache.

    `distill.cache = "auto"` keeps hard targets, which are small and exact. Soft ones take 20 times as much and leave
    out small logits: only on request.
    """
    distill = recipe.distill
    if distill.mode == "none" or distill.cache == "none":
        return False
    return distill.cache != "auto" or distill.mode == "hard" or distill.targets != "exact"


def cache_folder(recipe: Recipe, dataset: Dataset, manifest: Manifest) -> Path | None:
    """Return the folder of a run's cache; None where it keeps none.

    `distill.cache = "auto"` names it by all that its targets depend on: the same question finds the same answers.
    """
    distill = recipe.distill
    if not uses_cache(recipe):
        return None
    if distill.cache != "auto":
        return Path(distill.cache)
    question = json.dumps([manifest.identity, manifest.views], sort_keys=True).encode()
    digest = hashlib.blake2b(question, digest_size=4).hexdigest()
    network = str(manifest.identity["teacher.network"]).replace("/", "-")  # of timm/NAME
    return CACHES / f"{dataset.spec.name}-{network}-{digest}"


def open_cache(
    recipe: Recipe, dataset: Dataset, loader: str, teacher: dict[str, Any], runtime: Runtime
) -> TeacherCache | None:
    """Open the cache of a run, or start it where there is none yet; None where the run keeps none.

    Args:
        recipe: of the run.
        dataset: that it trains on.
        loader: name of the loader that makes its pixels.
        teacher: `LoadedTeacher.identity()`; with None for what cannot be known, as the teacher is not at hand.
        runtime: rank 0 writes.

    Raises:
        UserError: the cache is of another data set, recipe, teacher or loader; the message names the fields.
        DeitfastError: it is damaged, or the disk is full.
    """
    manifest = needed_manifest(recipe, dataset, loader, teacher, runtime)
    folder = cache_folder(recipe, dataset, manifest)
    if folder is None:
        return None
    if runtime.is_main_process and not is_cache(folder):
        TeacherCache.create(folder, manifest)
    runtime.barrier()  # nobody opens it before it is there
    cache = TeacherCache.open(folder)
    kept = cache.manifest
    require_same(folder, kept.identity, manifest.identity)
    if manifest.views > kept.views:
        raise UserError(
            f"the teacher cache {folder} has fewer views of each image than the run looks at",
            expected=f"{manifest.views}",
            found=f"{kept.views}",
            remedy=f"--views {kept.views} goes round them (DeiT no longer exactly), or `deitfast teach` fills another",
        )
    return cache


def software_changes(cache: TeacherCache, runtime: Runtime) -> list[str]:
    """Return in which precision and versions a run differs from what a cache was begun with."""
    now = _software(runtime)
    return [
        f"{name} {old} -> {now.get(name)}" for name, old in cache.manifest.made_with.items() if now.get(name) != old
    ]


def needed_manifest(
    recipe: Recipe, dataset: Dataset, loader: str, teacher: dict[str, Any], runtime: Runtime
) -> Manifest:
    """Return the manifest of the cache that a run needs, before anything is in it; arguments as `open_cache`'s."""
    per_image = recipe.distill.targets == "per_image"
    samples = dataset.split("train").num_samples
    fields, spec = asdict(recipe.augment), target_spec(recipe, dataset)
    chosen = PER_IMAGE if per_image else [name for name in fields if not name.startswith("eval_")]
    identity = {
        "data": dataset.spec.fingerprint,
        "fraction": recipe.train.fraction,
        "loader": pixels_of(loader, dataset, recipe),
        "seen": "each image, whole" if per_image else "each view",
        **{f"targets.{name}": value for name, value in asdict(spec).items() if name != "tau"},  # any tau may read them
        **{f"augment.{name}": fields[name] for name in chosen},
        **teacher,
    }
    batch = recipe.augment.mix_group * runtime.world  # any that the ranks can share
    answered = training_sampler(dataset, recipe, runtime, batch, include_partial=True).views_per_epoch
    if per_image:
        subset = training_subset(dataset, recipe)
        answered = samples if subset is None else len(subset)
    return Manifest(
        FORMAT,
        spec,
        views=1 if per_image else recipe.views,
        samples=samples,
        targets_per_view=answered,
        repeats=1 if per_image else recipe.augment.repeats,
        identity=identity,
        made_with=_software(runtime),
    )


def target_spec(recipe: Recipe, dataset: Dataset) -> TargetSpec:
    """Return what a run's cache keeps of an answer.

    Raises:
        UserError: more classes than a label of two bytes tells apart.
    """
    distill, classes = recipe.distill, len(dataset.spec.classes)
    if classes >= ABSENT:
        raise UserError(f"a teacher cache holds less than {ABSENT:,} classes", found=f"{classes:,}")
    if distill.mode == "hard":
        return TargetSpec("hard")
    return TargetSpec("soft", min(distill.top_k, classes), distill.top_dtype, distill.tau)


def pixels_of(loader: str, dataset: Dataset, recipe: Recipe) -> str:
    """Return whose pixels a loader gives: its own, or everybody's where nothing is decoded and nothing resized."""
    reader, augment = dataset.split("train"), recipe.augment
    sides = np.minimum(reader.heights, reader.widths)
    if augment.crop == "padded" and (reader.modes == RAW).all() and (sides == augment.size).all():
        return "any"
    return "reference" if loader == "resident" else loader  # equal to the bit


def _software(runtime: Runtime) -> dict[str, str]:
    installed = {name: found for name in LIBRARIES if (found := version(name))}
    return {"precision": runtime.precision, **installed}
