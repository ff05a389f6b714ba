"""Teacher caches in training: the same targets as in the loop, to the bit, and nothing that does not belong."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from deitfast.config import recipe as recipes
from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_files import PARTS, TARGETS
from deitfast.distill.cache_manifest import MANIFEST
from deitfast.distill.targets import CachedTargets
from deitfast.run_folder import RunFolder
from pipelines.choices import LoaderName
from pipelines.errors import DeitfastError
from pipelines.loaders.factory import available
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import run, weights
from tests.helpers.small_teachers import (
    assert_same,
    cached,
    distilled,
    fill_slowly,
    in_loop,
    judge,
    judged,
    opened,
    seen,
    taught,
    with_cache,
)

__all__ = ["judged"]
REASONS = available()
LOADERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(REASONS[name]), reason=REASONS[name] or "works here"))
    for name in get_args(LoaderName)
    if name != "auto"
]


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
    assert writing["teacher_views"] == 64  # two steps of 32; the rest is computed at the end
    assert TeacherCache.open(folder).complete
    again = run(tiny_small, tmp_path / "again", with_cache(recipe, folder))
    plain = run(tiny_small, tmp_path / "plain", recipe)
    assert again["teacher_views"] == 0
    assert plain["teacher_views"] == 64
    for row in (writing, again):
        assert (row["loss"], row["distill"]) == (plain["loss"], plain["distill"])
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "writing"))
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "again"))
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
        run(tiny_small, tmp_path / name, recipes.override(recipe, recipes.parse_settings(settings)))
    run(tiny_small, tmp_path / "full", with_cache(recipe, tmp_path / "cache"))
    curves = [[row["distill"] for row in RunFolder(tmp_path / name).metrics()] for name in ("loop", "through", "full")]
    assert len(curves[0]) == 10
    assert curves[0] == curves[1] == curves[2]
    assert_same(weights(tmp_path / "loop"), weights(tmp_path / "full"))


def test_a_training_killed_while_it_fills_goes_on_with_the_same_targets(
    tiny_small: Path, tmp_path: Path, judged, monkeypatch
) -> None:
    recipe = distilled("train.checkpoint_minutes=0", "train.epochs=1")
    run(tiny_small, tmp_path / "whole", with_cache(recipe, tmp_path / "a"))
    original = CachedTargets.get

    def dying(self, inputs):
        if self.teacher_views >= 32:
            raise ZeroDivisionError
        return original(self, inputs)

    monkeypatch.setattr(CachedTargets, "get", dying)
    with pytest.raises(ZeroDivisionError):
        run(tiny_small, tmp_path / "cut", with_cache(recipe, tmp_path / "b"))
    monkeypatch.undo()
    monkeypatch.setattr("deitfast.distill.cache_key.load_teacher", lambda spec, classes: judge(len(classes)))
    assert 0 < TeacherCache.open(tmp_path / "b").count() < 80
    run(tiny_small, tmp_path / "cut", with_cache(recipe, tmp_path / "b"), resume=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("fewer", [["train.epochs=1"], ["distill.targets=reused", "distill.views=2"]])
def test_a_run_of_fewer_views_completes_the_cache_of_a_longer_one(
    tiny_small: Path, tmp_path: Path, judged, fewer: list[str]
) -> None:
    longer = distilled("train.epochs=5")
    shorter = recipes.override(longer, recipes.parse_settings(fewer))
    taught(tiny_small, tmp_path / "whole", longer)
    opened(tiny_small, tmp_path / "begun", longer)
    run(tiny_small, tmp_path / "run", with_cache(shorter, tmp_path / "begun"))
    assert contents(tmp_path / "begun") == contents(tmp_path / "whole")
    assert taught(tiny_small, tmp_path / "begun", shorter).complete


@pytest.mark.parametrize("targets", ["exact", "per_image"])
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_nothing_is_kept_of_images_that_cannot_be_read(
    tiny_small: Path, tmp_path: Path, judged, mode: str, targets: str
) -> None:
    data = tmp_path / "damaged"
    shutil.copytree(tiny_small, data)
    with closing(Dataset.open(data)) as dataset:
        place = dataset.split("train").location(3)
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
    assert cache.count() == cache.manifest.views * 80 - lost
    assert row["teacher_views"] == 0
    with pytest.raises(DeitfastError, match="sample 3"):
        taught(data, tmp_path / "strict", distilled("train.epochs=2", mode=mode))


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_cache_killed_at_random_moments_is_the_undisturbed_one(
    tiny_small: Path, tmp_path: Path, monkeypatch, kills: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server that forks the children reads it
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["tests.helpers.small_teachers"])
    began = time.monotonic()
    fill_slowly(tiny_small, tmp_path / "whole")
    takes = time.monotonic() - began
    draw, partial, done = random.Random(kills), 0, 0
    for number in count():
        if done == kills:
            break
        out = tmp_path / f"killed{number}"  # a new one each time: a child may be done before it is killed
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
