"""Defaults fitted to few images, many ranks and short runs; what was typed stays or is refused."""

from collections.abc import Mapping
from typing import Any

import pytest

from deitfast.config import recipe as recipes
from deitfast.config.fit_to_data import Batching, fit_to_data
from pipelines.errors import UserError
from pipelines.rng.sampler import SamplerSpec, TrainSampler, group_size

IMAGENET, CIFAR, RESNET = (
    recipes.flatten(recipes.load(name)) for name in ("deit_ti_imagenet", "deit_ti_cifar10", "resnet18_imagenet")
)


def fitted(values: Mapping[str, Any], images: int, ranks: int = 1, **typed: Any) -> tuple[dict[str, Any], list[str]]:
    """Fit with fields typed, by the last part of their names."""
    own = {key: typed[name] for key in values if (name := key.rpartition(".")[2]) in typed}
    return fit_to_data({**values, **own}, own, images, ranks)


@pytest.mark.parametrize("values", [IMAGENET, CIFAR, RESNET], ids=["imagenet", "cifar10", "resnet18"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("images", [2, 3, 17, 65, 120, 1000])
def test_the_sampler_takes_what_was_fitted(values: dict[str, Any], images: int, ranks: int) -> None:
    if images < ranks:
        with pytest.raises(UserError, match=f"{images} images? cannot be shared by {ranks} ranks"):
            fitted(values, images, ranks)
        return
    changes, notes = fitted(values, images, ranks)
    recipe = recipes.override(recipes.Recipe(), {**values, **changes})
    augment, batch = recipe.augment, recipe.train.batch
    group = group_size(augment, batch // ranks)
    spec = SamplerSpec(samples=images, batch=batch, seed=0, repeats=augment.repeats, group=group, world=ranks)
    assert TrainSampler(spec).steps_per_epoch * batch == Batching(batch, group, augment.repeats).views(images) > 0
    assert bool(notes) == bool(changes)


@pytest.mark.parametrize("images", [1924, 50_000, 1_281_167])
def test_what_works_is_left_alone(images: int) -> None:
    assert fitted(IMAGENET, images) == ({}, [])


def test_a_line_says_what_is_changed_and_why() -> None:
    changes, notes = fitted(IMAGENET, 120)
    assert changes == {"train.batch": 96, "augment.mix_group": 32}
    assert notes == ["batch 96 instead of 1,024, mixing groups of 32 instead of 64: 120 images"]
    assert fitted(IMAGENET, 1000) == ({"train.batch": 960}, ["batch 960 instead of 1,024: 1,000 images"])
    assert "no MixUp, no CutMix" in fitted(IMAGENET, 2, 2)[1][0]


def test_what_was_typed_stays_and_the_rest_follows() -> None:
    assert fitted(IMAGENET, 120, batch=32)[0] == {"augment.mix_group": 32}
    assert fitted(IMAGENET, 120, mix_group=8)[0] == {"train.batch": 96}
    assert fitted(IMAGENET, 120, batch=64, mix_group=64)[0] == {"augment.repeats": 1}


@pytest.mark.parametrize(
    ("typed", "ranks"), [({"batch": 33}, 1), ({"batch": 500}, 1), ({"batch": 10}, 4), ({"mix_group": 128}, 1)]
)
def test_what_cannot_work_is_refused_with_what_does(typed: dict[str, int], ranks: int) -> None:
    with pytest.raises(UserError, match="does not fit 120 images") as caught:
        fitted(IMAGENET, 120, ranks, **typed)
    parts = [part.split() for part in caught.value.remedy.removeprefix("these work together: ").split(", ")]
    offered = {name.rpartition(".")[2]: int(value) for name, value in parts}
    assert fitted(IMAGENET, 120, ranks, **offered)[0].keys() <= {"schedule.min_lr", "augment.repeats"}


def test_a_short_run_does_not_spend_itself_in_warm_up() -> None:
    assert fitted(IMAGENET, 50_000, epochs=10)[0] == {"schedule.warmup_epochs": 2.0}
    assert fitted(IMAGENET, 50_000, epochs=10, warmup_epochs=5.0) == ({}, [])


def test_the_schedule_ends_below_its_peak() -> None:
    changes, _ = fitted(IMAGENET, 4)
    peak = IMAGENET["optim.lr"] * changes["train.batch"] / IMAGENET["optim.lr_batch"]
    assert 0 < changes["schedule.min_lr"] < peak
