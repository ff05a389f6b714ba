"""What a cache refuses: other data, recipes, loaders, teachers, and damage; each by name."""

from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deitfast.config import recipe as recipes
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_files import TARGETS
from deitfast.distill.cache_key import needed_manifest, teacher_fingerprint
from deitfast.run_folder import RunFolder
from pipelines.augment.chain import augment
from pipelines.errors import DeitfastError, UserError
from pipelines.spec import AugmentSpec
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import Dataset
from tests.helpers.sample_images import MemorySource, drawn, entries
from tests.helpers.small_runs import CPU, run, tiny_recipe
from tests.helpers.small_teachers import Judge, distilled, judged, opened, taught, with_cache

__all__ = ["judged"]


OTHER = {"crop": "resized", "policy": "autoaugment", "size": 64, "mix_group": 8, "repeats": 2, "seed": 1,
         "scale": [0.2, 1.0], "ratio": [0.5, 2.0], "erasing_area": [0.1, 0.3], "erasing_ratio": [0.5, 2.0],
         "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "padding": 2, "mixup_off_epoch": 1}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in fields(AugmentSpec) if not field.name.startswith("eval_")])
def test_another_value_of_any_field_that_makes_a_view_is_refused(tiny_small: Path, tmp_path: Path, field: str) -> None:
    recipe = distilled()
    opened(tiny_small, tmp_path / "cache", recipe)
    value = OTHER.get(field, 0.4)
    assert value != getattr(recipe.augment, field)
    with pytest.raises(UserError, match=rf"another .*augment\.{field}") as caught:
        opened(tiny_small, tmp_path / "cache", recipes.override(recipe, {f"augment.{field}": value}))
    assert f"augment.{field} {value!r}" in str(caught.value.expected)


def test_what_evaluation_alone_reads_is_no_reason_to_refuse(tiny_small: Path, tmp_path: Path) -> None:
    opened(tiny_small, tmp_path / "cache", distilled())
    other = ["augment.eval_crop=0.9", "augment.eval_resize=squash", "optim.lr=1.0", "distill.tau=1.0"]
    opened(tiny_small, tmp_path / "cache", distilled(*other))


@pytest.mark.parametrize(
    ("field", "value"),
    [("eval_crop", "0.6"), ("eval_resize", "squash"), ("eval_interpolation", "bilinear"), ("crop", "resized"),
     ("mean", "[0.5,0.5,0.5]"), ("std", "[0.5,0.5,0.5]")],
)  # fmt: skip
def test_another_preprocessing_of_whole_images_is_refused(
    tiny_small: Path, tmp_path: Path, field: str, value: str
) -> None:
    """And what only a view is made by is no reason to."""
    whole = ("distill.cache=auto", "distill.targets=per_image")
    opened(tiny_small, tmp_path / "cache", distilled(*whole))
    opened(tiny_small, tmp_path / "cache", distilled(*whole, "augment.flip=0.1", "augment.mixup=0.3"))
    with pytest.raises(UserError, match=rf"another .*augment\.{field}"):
        opened(tiny_small, tmp_path / "cache", distilled(*whole, f"augment.{field}={value}"))


def test_another_share_of_the_images_or_other_targets_are_refused(tiny_small: Path, tmp_path: Path) -> None:
    opened(tiny_small, tmp_path / "cache", distilled())
    with pytest.raises(UserError, match="another fraction"):
        opened(tiny_small, tmp_path / "cache", distilled("train.fraction=0.5"))
    with pytest.raises(UserError, match=r"targets\.kind, targets\.k, targets\.dtype"):
        opened(tiny_small, tmp_path / "cache", distilled(mode="soft"))
    with pytest.raises(UserError, match=r"another .*teacher\.sees"):
        opened(tiny_small, tmp_path / "cache", distilled("distill.cache=auto", "distill.targets=per_image"))


def test_another_loaders_pixels_are_refused_where_they_differ(tiny_dataset: Path, tiny_small: Path, tmp_path: Path):
    """tiny_small is raw and not resized: every loader gives its very bytes. The other is JPEGs."""
    taught_with = {}
    for data in (tiny_dataset, tiny_small):
        with closing(Dataset.open(data)) as dataset:
            recipe = distilled()
            found = {
                name: needed_manifest(recipe, dataset, name, {}, CPU).identity["loader"]
                for name in ("reference", "resident", "cpu", "ffcv")
            }
            taught_with[data] = found
    assert len(set(taught_with[tiny_small].values())) == 1
    found = taught_with[tiny_dataset]
    assert found["resident"] == found["reference"] == "reference"
    assert found["ffcv"] == "ffcv"
    assert found["cpu"] in ("cpu", "reference")  # where its compiled codec runs, its pixels are Pillow's


def test_dalis_pixels_are_those_of_its_device(tiny_dataset: Path) -> None:
    with closing(Dataset.open(tiny_dataset)) as dataset:
        runtimes = [replace(CPU, device=torch.device(name)) for name in ("cpu", "cuda")]
        loaders = [
            [needed_manifest(distilled(), dataset, name, {}, runtime).identity["loader"] for runtime in runtimes]
            for name in ("dali", "cpu", "reference")
        ]
    assert loaders[0] == ["dali on cpu", "dali on cuda"]
    assert loaders[1][0] == loaders[1][1]
    assert loaders[2] == ["reference", "reference"]


def images(count: int = 40) -> list[np.ndarray]:
    return [drawn(32, 32, number) for number in range(count)]


def converted(contents: list[np.ndarray], folder: Path) -> Path:
    names = "t#{}"
    splits = {"train": entries(contents, classes=10, names=names), "val": entries(images(4), classes=10, names=names)}
    convert(MemorySource("cifar10", classes=tuple("abcdefghij"), splits=splits), folder, ConvertOptions(workers=1))
    return folder


def test_two_swapped_images_and_other_images_of_the_same_names_are_refused(tmp_path: Path) -> None:
    recipe, first = distilled(), images()
    swapped = [*first]
    swapped[0], swapped[10] = first[10], first[0]  # of the same class: labels and names stay
    other = [255 - image for image in first]
    opened(converted(first, tmp_path / "data"), tmp_path / "cache", recipe)
    opened(converted(first, tmp_path / "copy"), tmp_path / "cache", recipe)
    for name, contents_ in {"swapped": swapped, "other": other}.items():
        data = converted(contents_, tmp_path / name)
        with pytest.raises(UserError, match="was filled for another data") as caught:
            opened(data, tmp_path / "cache", recipe)
        with closing(Dataset.open(data)) as dataset:
            assert dataset.spec.fingerprint in str(caught.value.expected)


def test_a_teacher_with_one_other_weight_is_refused(tiny_small: Path, tmp_path: Path) -> None:
    """A real run as the teacher, of which one weight changes by its last bit."""
    out = tmp_path / "teacher"
    run(tiny_small, out, tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    cache = tmp_path / "cache"
    recipe = with_cache(
        tiny_recipe("distill.mode=hard", f"distill.teacher={out}", "distill.teacher_checkpoint=last"), cache
    )
    taught(tiny_small, cache, recipe)
    known, loaded = teacher_fingerprint(recipe, tuple("abcdefghij"))
    assert loaded
    opened(tiny_small, cache, recipe, loaded)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    weight = state["model"]["head.weight"]
    weight[3, 7] = torch.nextafter(weight[3, 7], torch.tensor(9.0))
    torch.save(state, out / "checkpoint.pt")
    with pytest.raises(UserError, match=r"another teacher\.digest"):
        run(tiny_small, tmp_path / "student", recipe)
    assert known["teacher.digest"] == TeacherCache.open(cache).manifest.identity["teacher.digest"]


def test_a_complete_cache_needs_no_teacher_and_an_incomplete_one_does(tiny_small: Path, tmp_path: Path, judged) -> None:
    recipe, folder = distilled("train.epochs=1"), tmp_path / "cache"
    taught(tiny_small, folder, recipe)
    alone = with_cache(recipe, folder, "distill.teacher=")
    row = run(tiny_small, tmp_path / "run", alone)
    assert row["teacher_views"] == 0
    (folder / TARGETS).unlink()
    with pytest.raises(DeitfastError, match=r"targets\.npy"):
        run(tiny_small, tmp_path / "again", alone)


def test_a_flipped_byte_of_the_last_epoch_is_found_before_the_first(tiny_small: Path, tmp_path: Path, judged) -> None:
    recipe, folder = distilled("train.epochs=5"), tmp_path / "cache"
    taught(tiny_small, folder, recipe)
    content = bytearray((folder / TARGETS).read_bytes())
    content[-10] ^= 4
    (folder / TARGETS).write_bytes(content)
    with pytest.raises(DeitfastError, match=r"targets\.npy: damaged") as caught:
        run(tiny_small, tmp_path / "run", with_cache(recipe, folder))
    assert "of view 4" in str(caught.value.expected)
    assert not RunFolder(tmp_path / "run").metrics()


def test_an_incomplete_cache_without_a_teacher_is_refused(tiny_small: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("distill.mode=hard", "distill.teacher=nowhere", f"distill.cache={tmp_path / 'cache'}")
    with pytest.raises(UserError, match="teacher 'nowhere' not found"):
        run(tiny_small, tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_more_epochs_than_views_are_refused_and_the_way_out_named(tiny_small: Path, tmp_path: Path) -> None:
    opened(tiny_small, tmp_path / "cache", distilled("train.epochs=4"))
    opened(tiny_small, tmp_path / "cache", distilled("train.epochs=3"))
    with pytest.raises(UserError, match="fewer views") as caught:
        opened(tiny_small, tmp_path / "cache", distilled("train.epochs=5"))
    assert "--views 4" in str(caught.value.remedy)
    reused = distilled("train.epochs=5", "distill.targets=reused", "distill.views=4")
    assert opened(tiny_small, tmp_path / "cache", reused).manifest.views == 4


def test_the_spot_check_finds_views_that_are_made_otherwise(tiny_small: Path, tmp_path: Path, judged, monkeypatch):
    recipe = distilled("train.epochs=1")
    taught(tiny_small, tmp_path / "cache", recipe)
    taught(tiny_small, tmp_path / "cache", recipe)  # runs it on some again, and finds the same
    original = augment

    def otherwise(batch, *arguments, **options):
        made = original(batch, *arguments, **options)
        return replace(made, pixels=made.pixels.flip(1))  # red and blue exchanged

    monkeypatch.setattr("deitfast.distill.build_cache.augment", otherwise)
    with pytest.raises(DeitfastError, match="are not those of the teacher now") as caught:
        taught(tiny_small, tmp_path / "cache", recipe)
    assert "of image" in str(caught.value.expected)


def test_the_spot_check_lets_a_near_tie_pass(tiny_small: Path, tmp_path: Path, judged, monkeypatch) -> None:
    recipe = distilled("train.epochs=1")
    taught(tiny_small, tmp_path / "cache", recipe)
    original = Judge.forward

    def tied(self, pixels):
        (logits,) = original(self, pixels)
        best = logits.amax(-1, keepdim=True)
        return (torch.where(logits == best, best - 1e-5, logits).scatter_reduce(
            1, logits.topk(2).indices[:, 1:], best, "amax"),)  # fmt: skip

    monkeypatch.setattr(Judge, "forward", tied)
    taught(tiny_small, tmp_path / "cache", recipe)  # another class by .00001: no reason to fail
