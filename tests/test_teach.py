"""Teacher caches in training: the same targets as in the loop, to the bit, and nothing that does not belong."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from images import MemorySource, drawn, entries
from small_runs import CPU, run, tiny_recipe, weights
from teaching import Judge, distilled, fill_slowly, in_loop, judge, judged, nobody, opened, seen, taught, with_cache
from torch.nn import functional as F

from deitfast import recipe as recipes
from deitfast.answers import dense, from_records, keep, to_records
from deitfast.caching import known_teacher
from deitfast.runlog import RunFolder
from deitfast.targets import Cached, PerImage
from deitfast.teacher import Teacher
from pipelines.augment.chain import augment
from pipelines.cache_files import MANIFEST, PARTS, TARGETS, TargetSpec, present
from pipelines.errors import Failure, Mistake
from pipelines.loaders.opening import available
from pipelines.spec import AugmentSpec, LoaderName
from pipelines.storage.convert import convert
from pipelines.storage.dataset import Dataset
from pipelines.teacher_cache import TeacherCache

__all__ = ["judged"]
REASONS = available()
LOADERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(REASONS[name]), reason=REASONS[name] or "works here"))
    for name in get_args(LoaderName)
    if name != "auto"
]


def cached(folder: Path, mode: str = "hard"):
    """Targets from a complete cache."""
    cache = TeacherCache.open(folder)
    assert cache.complete
    return lambda recipe, classes: Cached(cache, recipe, classes, nobody, CPU)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("loader", LOADERS)
def test_cached_targets_are_the_loops_to_the_bit(request, tmp_path: Path, judged, loader: str, mode: str) -> None:
    data = request.getfixturevalue("tiny_small" if loader == "resident" else "tiny_dataset")
    soft = ["distill.top_k=1000", "distill.top_dtype=float32"]  # nothing left out, nothing rounded
    settings = [f"loader.name={loader}", "train.epochs=3", "augment.repeats=3", *soft]
    recipe = distilled(*settings, mode=mode)
    looped = seen(data, recipe, in_loop)
    taught(data, tmp_path / "cache", recipe)
    assert_same(looped, seen(data, recipe, cached(tmp_path / "cache")))


@pytest.mark.parametrize(("batch", "world", "start"), [(8, 1, 0), (32, 1, 1), (16, 2, 0), (16, 4, 3), (64, 4, 0)])
def test_any_batch_any_ranks_and_any_start_read_the_same_targets(
    tiny_small: Path, tmp_path: Path, judged, batch: int, world: int, start: int
) -> None:
    settings = ["train.epochs=2", "augment.repeats=2"]
    taught(tiny_small, tmp_path / "cache", distilled("train.batch=48", *settings))
    recipe = distilled(f"train.batch={batch}", *settings)
    read = seen(tiny_small, recipe, cached(tmp_path / "cache"), world, start)
    assert_same(seen(tiny_small, recipe, in_loop, world, start), read)


def test_what_one_training_asks_the_next_one_reads(tiny_small: Path, tmp_path: Path, judged) -> None:
    """Through the cache, from empty to complete: batches of another size leave other views out."""
    folder, recipe = tmp_path / "cache", distilled("train.batch=32")
    writing = run(tiny_small, tmp_path / "writing", with_cache(recipe, folder))
    assert writing["teacher_asked"] == 64  # two steps of 32; the rest is asked at the end
    assert TeacherCache.open(folder).complete
    again = run(tiny_small, tmp_path / "again", with_cache(recipe, folder))
    plain = run(tiny_small, tmp_path / "plain", recipe)
    assert again["teacher_asked"] == 0
    assert plain["teacher_asked"] == 64
    for row in (writing, again):
        assert (row["loss"], row["distill"]) == (plain["loss"], plain["distill"])
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, weights(tmp_path / "writing")[name])
        assert torch.equal(value, weights(tmp_path / "again")[name])
    taught(tiny_small, tmp_path / "taught", recipe)
    assert contents(folder) == contents(tmp_path / "taught")
    log = RunFolder(tmp_path / "again").log.read_text()
    assert "hard targets, exact (a view of its own in every epoch)" in log


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_fifty_steps_have_the_same_losses_in_the_loop_and_from_the_cache(
    tiny_small: Path, tmp_path: Path, judged, mode: str
) -> None:
    recipe = distilled("train.epochs=10", "distill.top_k=10", "distill.top_dtype=float32", mode=mode)
    for name, settings in {"loop": [], "through": [f"distill.cache={tmp_path / 'cache'}"]}.items():
        run(tiny_small, tmp_path / name, recipes.override(recipe, settings))
    run(tiny_small, tmp_path / "full", with_cache(recipe, tmp_path / "cache"))
    curves = [[row["distill"] for row in RunFolder(tmp_path / name).metrics()] for name in ("loop", "through", "full")]
    assert len(curves[0]) == 10
    assert curves[0] == curves[1] == curves[2]
    for name, value in weights(tmp_path / "loop").items():
        assert torch.equal(value, weights(tmp_path / "full")[name]), name


def test_a_training_killed_while_it_fills_goes_on_with_the_same_targets(
    tiny_small: Path, tmp_path: Path, judged, monkeypatch
) -> None:
    recipe = distilled("train.checkpoint_minutes=0", "train.epochs=1")
    run(tiny_small, tmp_path / "whole", with_cache(recipe, tmp_path / "a"))
    original = Cached.of

    def dying(self, inputs, skipped=0):
        if self.asked >= 32:
            raise ZeroDivisionError
        return original(self, inputs, skipped)

    monkeypatch.setattr(Cached, "of", dying)
    with pytest.raises(ZeroDivisionError):
        run(tiny_small, tmp_path / "cut", with_cache(recipe, tmp_path / "b"))
    monkeypatch.undo()
    monkeypatch.setattr("deitfast.teach.load_teacher", lambda spec, classes: judge(len(classes)))
    monkeypatch.setattr("deitfast.caching.load_teacher", lambda spec, classes: judge(len(classes)))
    assert 0 < TeacherCache.open(tmp_path / "b").answers() < 80
    run(tiny_small, tmp_path / "cut", with_cache(recipe, tmp_path / "b"), resume=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "cut")[name]), name


@pytest.mark.parametrize("targets", ["exact", "per_image"])
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_nothing_is_kept_of_images_that_cannot_be_read(
    tiny_small: Path, tmp_path: Path, judged, mode: str, targets: str
) -> None:
    data = tmp_path / "damaged"
    shutil.copytree(tiny_small, data)
    with closing(Dataset.open(data)) as dataset:
        place = dataset.split("train").place(3)
    content = bytearray(place.file.read_bytes())
    content[place.offset] ^= 1
    place.file.write_bytes(content)
    settings = ["train.epochs=2", "loader.skip_bad=true", f"distill.targets={targets}", "distill.cache=auto"]
    recipe = with_cache(distilled(*settings, mode=mode), tmp_path / "cache")
    for name in ("first", "second"):
        row = run(data, tmp_path / name, recipe)
        assert np.isfinite(row["distill"])
    cache = TeacherCache.open(tmp_path / "cache")
    assert not cache.complete
    lost = 1 if targets == "per_image" else 4  # each view of it, and of its partner there
    assert cache.answers() == cache.manifest.views * 80 - lost
    assert row["teacher_asked"] == 0
    with pytest.raises(Failure, match="sample 3"):
        taught(data, tmp_path / "strict", distilled("train.epochs=2", mode=mode))


# --- refusals -----------------------------------------------------------------------------------------------------

OTHER = {"crop": "resized", "policy": "autoaugment", "size": 64, "mix_group": 8, "repeats": 2, "seed": 1,
         "scale": [0.2, 1.0], "ratio": [0.5, 2.0], "erasing_area": [0.1, 0.3], "erasing_ratio": [0.5, 2.0],
         "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "padding": 2}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in fields(AugmentSpec) if field.name != "eval_crop"])
def test_another_value_of_any_field_that_makes_a_view_is_refused(tiny_small: Path, tmp_path: Path, field: str) -> None:
    recipe = distilled()
    opened(tiny_small, tmp_path / "cache", recipe)
    value = OTHER.get(field, 0.4)
    assert value != getattr(recipe.augment, field)
    with pytest.raises(Mistake, match=rf"another .*augment\.{field}") as caught:
        opened(tiny_small, tmp_path / "cache", recipes.override(recipe, [f"augment.{field}={value}"]))
    assert f"augment.{field} {value!r}" in str(caught.value.expected)


def test_what_evaluation_alone_reads_is_no_reason_to_refuse(tiny_small: Path, tmp_path: Path) -> None:
    opened(tiny_small, tmp_path / "cache", distilled())
    opened(tiny_small, tmp_path / "cache", distilled("augment.eval_crop=0.9", "optim.lr=1.0", "distill.tau=1.0"))


def test_another_share_of_the_images_or_other_targets_are_refused(tiny_small: Path, tmp_path: Path) -> None:
    opened(tiny_small, tmp_path / "cache", distilled())
    with pytest.raises(Mistake, match="another fraction"):
        opened(tiny_small, tmp_path / "cache", distilled("train.fraction=0.5"))
    with pytest.raises(Mistake, match=r"targets\.kind, targets\.k, targets\.dtype"):
        opened(tiny_small, tmp_path / "cache", distilled(mode="soft"))
    with pytest.raises(Mistake, match=r"another .*seen"):
        opened(tiny_small, tmp_path / "cache", distilled("distill.cache=auto", "distill.targets=per_image"))


def test_another_loaders_pixels_are_refused_where_they_differ(tiny_dataset: Path, tiny_small: Path, tmp_path: Path):
    """tiny_small is raw and not resized: every loader gives its very bytes. The other is JPEGs."""
    taught_with = {}
    for data in (tiny_dataset, tiny_small):
        with closing(Dataset.open(data)) as dataset:
            from deitfast.caching import describe_cache

            recipe = distilled()
            found = {
                name: describe_cache(recipe, dataset, name, {}, CPU).identity["loader"]
                for name in ("reference", "resident", "cpu", "ffcv")
            }
            taught_with[data] = found
    assert len(set(taught_with[tiny_small].values())) == 1
    assert len(set(taught_with[tiny_dataset].values())) == 3  # resident's are reference's


def images(count: int = 40) -> list[np.ndarray]:
    return [drawn(32, 32, number) for number in range(count)]


def converted(contents: list[np.ndarray], folder: Path) -> Path:
    names = "t#{}"
    splits = {"train": entries(contents, classes=10, names=names), "val": entries(images(4), classes=10, names=names)}
    convert(MemorySource("cifar10", classes=tuple("abcdefghij"), splits=splits), folder, workers=1)
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
        with pytest.raises(Mistake, match="was filled for another data") as caught:
            opened(data, tmp_path / "cache", recipe)
        with closing(Dataset.open(data)) as dataset:
            assert dataset.spec.fingerprint in str(caught.value.expected)


def test_a_teacher_with_one_other_weight_is_refused(tiny_small: Path, tmp_path: Path) -> None:
    """A real run as the teacher, of which one weight changes by its last bit."""
    out = tmp_path / "teacher"
    run(tiny_small, out, tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    cache = tmp_path / "cache"
    recipe = with_cache(tiny_recipe("distill.mode=hard", f"distill.teacher={out}"), cache)
    taught(tiny_small, cache, recipe)
    known, loaded = known_teacher(recipe, tuple("abcdefghij"))
    assert loaded
    opened(tiny_small, cache, recipe, loaded)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    weight = state["model"]["head.weight"]
    weight[3, 7] = torch.nextafter(weight[3, 7], torch.tensor(9.0))
    torch.save(state, out / "checkpoint.pt")
    with pytest.raises(Mistake, match=r"another teacher\.digest"):
        run(tiny_small, tmp_path / "student", recipe)
    assert known["teacher.digest"] == TeacherCache.open(cache).manifest.identity["teacher.digest"]


def test_a_complete_cache_needs_no_teacher_and_an_incomplete_one_does(tiny_small: Path, tmp_path: Path, judged) -> None:
    recipe, folder = distilled("train.epochs=1"), tmp_path / "cache"
    taught(tiny_small, folder, recipe)
    alone = with_cache(recipe, folder, "distill.teacher=")
    row = run(tiny_small, tmp_path / "run", alone)
    assert row["teacher_asked"] == 0
    (folder / TARGETS).unlink()
    with pytest.raises(Failure, match=r"targets\.npy"):
        run(tiny_small, tmp_path / "again", alone)


def test_a_flipped_byte_of_the_last_epoch_is_found_before_the_first(tiny_small: Path, tmp_path: Path, judged) -> None:
    recipe, folder = distilled("train.epochs=5"), tmp_path / "cache"
    taught(tiny_small, folder, recipe)
    content = bytearray((folder / TARGETS).read_bytes())
    content[-10] ^= 4
    (folder / TARGETS).write_bytes(content)
    with pytest.raises(Failure, match=r"targets\.npy: damaged") as caught:
        run(tiny_small, tmp_path / "run", with_cache(recipe, folder))
    assert "of view 4" in str(caught.value.expected)
    assert not (tmp_path / "run").exists()


def test_an_incomplete_cache_without_a_teacher_is_refused(tiny_small: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("distill.mode=hard", "distill.teacher=nowhere", f"distill.cache={tmp_path / 'cache'}")
    with pytest.raises(Mistake, match="no teacher of that name"):
        run(tiny_small, tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_more_epochs_than_views_are_refused_and_the_way_out_named(tiny_small: Path, tmp_path: Path) -> None:
    opened(tiny_small, tmp_path / "cache", distilled("train.epochs=4"))
    opened(tiny_small, tmp_path / "cache", distilled("train.epochs=3"))
    with pytest.raises(Mistake, match="fewer views") as caught:
        opened(tiny_small, tmp_path / "cache", distilled("train.epochs=5"))
    assert "--views 4" in str(caught.value.remedy)
    reused = distilled("train.epochs=5", "distill.targets=reused", "distill.views=4")
    assert opened(tiny_small, tmp_path / "cache", reused).manifest.views == 4


def test_the_spot_check_finds_views_that_are_made_otherwise(tiny_small: Path, tmp_path: Path, judged, monkeypatch):
    recipe = distilled("train.epochs=1")
    taught(tiny_small, tmp_path / "cache", recipe)
    taught(tiny_small, tmp_path / "cache", recipe)  # asks for some again, and is content
    original = augment

    def otherwise(batch, *arguments, **options):
        made = original(batch, *arguments, **options)
        return replace(made, pixels=made.pixels.flip(1))  # red and blue exchanged

    monkeypatch.setattr("deitfast.teach.augment", otherwise)
    with pytest.raises(Failure, match="does not say what the teacher says now") as caught:
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


# --- what is kept of an answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("k", "tau", "at"), [(10, 3.0, 3.0), (10, 3.0, 1.0), (10, 1.0, 3.0), (3, 2.0, 5.0), (1, 3.0, 3.0)]
)
def test_kept_logits_give_back_the_distribution(dtype: str, k: int, tau: int, at: int) -> None:
    """The kept classes' and the rest's probability are exact at the cache's tau and at 1; the rest shares evenly."""
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) * 3
    spec = TargetSpec("soft", k, dtype, tau)
    answers = keep(logits, spec)
    records = to_records([answers], spec)
    restored = dense(from_records(records, torch.device("cpu")), spec, 100, at)
    true, found = F.softmax(logits.double() / at, -1), F.softmax(restored.double() / at, -1)
    kept = torch.zeros_like(true, dtype=torch.bool).scatter(1, answers.label, True)
    if at in (1.0, tau):
        assert torch.allclose(true[kept], found[kept], atol=8e-3 if dtype == "float16" else 1e-5)
    rest = found[~kept].view(64, -1)
    assert torch.allclose(rest, rest[:, :1].expand_as(rest), rtol=1e-4)
    even = F.kl_div(found.log(), true, reduction="batchmean")
    cut = F.kl_div((torch.where(kept, true, 0) / torch.where(kept, true, 0).sum(-1, keepdim=True)).clamp(1e-9).log(),
                   true, reduction="batchmean")  # fmt: skip
    assert even < cut  # knowing the rest's share beats dropping it


def test_all_logits_kept_in_float32_are_the_teachers_own() -> None:
    logits = torch.randn(16, 10) * 5
    spec = TargetSpec("soft", 10, "float32", 3.0)
    restored = from_records(to_records([keep(logits, spec)], spec), torch.device("cpu"))
    assert torch.equal(dense(restored, spec, 10, 1.7), logits)


def test_hard_answers_are_the_argmax() -> None:
    logits = torch.randn(16, 1000)
    spec = TargetSpec("hard")
    restored = from_records(to_records([keep(logits, spec)], spec), torch.device("cpu"))
    assert torch.equal(dense(restored, spec, 1000, 3.0), logits.argmax(-1))


# --- modes ----------------------------------------------------------------------------------------------------------


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
    assert (cache.manifest.views, cache.answers()) == (1, 80)
    with closing(Dataset.open(tiny_small)) as dataset:
        reader, classes = dataset.split("train"), len(dataset.spec.classes)
        pixels = torch.tensor(np.stack([reader.sample(i).reshape(32, 32, 3) for i in range(80)])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.augment.mean, recipe.augment.std))
        logits = Teacher(judge(classes), recipe, CPU).logits((pixels / 255 - mean) / std)
        from deitfast.data import open_training

        targets = PerImage(cache, recipe, classes, torch.device("cpu"))
        with closing(open_training(dataset, recipe, CPU)) as loader:
            inputs = augment(next(iter(loader.epoch(0))), recipe.augment, dtype=torch.float32, train=True)
        found = targets.of(inputs)
    own = logits[inputs.params.sample]
    partner = own[inputs.params.partner]
    if mode == "hard":
        assert torch.equal(found, torch.stack([own.argmax(-1), partner.argmax(-1)], 1))
        return
    tau, share = recipe.distill.tau, inputs.share[:, None]
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
    assert cache.answers() == 40
    run(tiny_small, tmp_path / "run", with_cache(recipe, tmp_path / "cache"))


def test_modes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Mistake, match=r"distill\.views goes with"):
        tiny_recipe("distill.views=2")
    with pytest.raises(Mistake, match=r"no multiple of augment\.repeats"):
        tiny_recipe("distill.targets=reused", "distill.views=2", "augment.repeats=3")


# --- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_cache_killed_at_random_moments_is_the_undisturbed_one(
    tiny_small: Path, tmp_path: Path, monkeypatch, kills: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server that forks the children reads it
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["teaching"])
    began = time.monotonic()
    fill_slowly(tiny_small, tmp_path / "whole")
    takes = time.monotonic() - began
    draw, partial, done = random.Random(kills), 0, 0
    while done < kills:
        out = tmp_path / f"killed{done}"
        while not (out / TARGETS).exists():
            child = spawn.Process(target=fill_slowly, args=(tiny_small, out))
            child.start()
            while child.is_alive() and not (out / MANIFEST).exists():
                time.sleep(0.001)
            child.join(draw.uniform(0, takes))
            if child.is_alive() and done < kills:
                os.kill(child.pid, signal.SIGKILL)
            child.join()
            if child.exitcode:
                assert child.exitcode == -signal.SIGKILL
                done += 1
                partial += (out / PARTS).is_dir() and any((out / PARTS).iterdir())
        fill_slowly(tiny_small, out)
        assert contents(out) == contents(tmp_path / "whole")
        assert not (out / PARTS).exists()
    assert partial >= kills // 3  # they died in the middle of it


def test_cached_answers_are_present_only_where_they_were_given() -> None:
    assert present(np.array([0, 65535, 65534], "<u2")).tolist() == [True, False, True]
