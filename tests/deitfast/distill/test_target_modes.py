"""Targets that are not the teacher's for the very view: reused ones, and those of whole images."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deitfast.data_loaders import open_training
from deitfast.distill.cache import TeacherCache
from deitfast.distill.targets import PerImageTargets
from deitfast.distill.teacher import Teacher
from pipelines.augment.chain import augment
from pipelines.errors import UserError
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import CPU, run, tiny_recipe
from tests.helpers.small_teachers import (
    assert_same,
    cached,
    distilled,
    in_loop,
    judge,
    judged,
    seen,
    taught,
    with_cache,
)

__all__ = ["judged"]


def test_reused_views_come_round_again(tiny_small: Path, tmp_path: Path, judged) -> None:
    recipe = distilled("train.epochs=6", "distill.targets=reused", "distill.views=2")
    cache = taught(tiny_small, tmp_path / "cache", recipe)
    assert cache.manifest.views == 2
    found = seen(tiny_small, recipe, cached(tmp_path / "cache"))
    assert {view for view, _ in found} == {0, 1}
    assert_same(found, seen(tiny_small, recipe, in_loop))


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_per_image_targets_are_the_images_own_mixed_like_labels(
    tiny_small: Path, tmp_path: Path, judged, mode: str
) -> None:
    recipe = distilled(
        "train.epochs=1", "distill.cache=auto", "distill.targets=per_image", "distill.top_k=10", mode=mode
    )
    cache = taught(tiny_small, tmp_path / "cache", recipe)
    assert (cache.manifest.views, cache.count()) == (1, 80)
    with closing(Dataset.open(tiny_small)) as dataset:
        reader, classes = dataset.split("train"), len(dataset.spec.classes)
        pixels = torch.tensor(np.stack([reader.sample(i).reshape(32, 32, 3) for i in range(80)])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.augment.mean, recipe.augment.std))
        logits = Teacher(judge(classes), recipe, CPU).logits((pixels / 255 - mean) / std)
        targets = PerImageTargets(cache, recipe, classes, torch.device("cpu"))
        with closing(open_training(dataset, recipe, CPU)) as loader:
            inputs = augment(next(iter(loader.epoch(0))), recipe.augment, dtype=torch.float32, train=True)
        found = targets.get(inputs)
    own = logits[inputs.params.sample]
    partner = own[inputs.params.mix_index]
    if mode == "hard":
        assert torch.equal(found, torch.stack([own.argmax(-1), partner.argmax(-1)], 1))
        return
    tau, share = recipe.distill.tau, inputs.lam[:, None]
    expected = share * F.softmax(own / tau, -1) + (1 - share) * F.softmax(partner / tau, -1)
    assert torch.allclose(F.softmax(found / tau, -1), expected, atol=1e-3)


def test_a_run_of_per_image_targets_fills_its_cache_first_and_says_what_it_is(
    tiny_small: Path, tmp_path: Path, judged
) -> None:
    recipe = with_cache(
        distilled("train.epochs=1", "distill.cache=auto", "distill.targets=per_image"), tmp_path / "cache"
    )
    run(tiny_small, tmp_path / "run", recipe)
    assert TeacherCache.open(tmp_path / "cache").complete


def test_per_image_targets_are_asked_for_the_images_that_are_used(tiny_small: Path, tmp_path: Path, judged) -> None:
    recipe = distilled("train.fraction=0.5", "distill.cache=auto", "distill.targets=per_image")
    cache = taught(tiny_small, tmp_path / "cache", recipe)
    assert cache.count() == 40
    run(tiny_small, tmp_path / "run", with_cache(recipe, tmp_path / "cache"))


def test_modes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"distill\.views 2 and distill\.targets"):
        tiny_recipe("distill.views=2")
    with pytest.raises(UserError, match=r"must be a multiple of augment\.repeats"):
        tiny_recipe("distill.targets=reused", "distill.views=2", "augment.repeats=3")


def test_a_cnn_learns_from_a_teacher_through_its_only_head(tiny_small: Path, tmp_path: Path, judged) -> None:
    settings = ["distill.mode=hard", "distill.teacher=judge", "distill.head=class", "train.epochs=1"]
    recipe = tiny_recipe(*settings, base="resnet18_cifar10")
    row = run(tiny_small, tmp_path / "run", recipe)
    assert set(row["val"]) == {"class"}
    assert row["distill"] > 0
    assert row["loss"] == pytest.approx((row["base"] + row["distill"]) / 2)
