"""Teachers that are not finite, leftover parts, folders that ranks do not share: told by name before harm is done."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deitfast.distill.cache import TeacherCache, require_shared
from deitfast.distill.cache_files import PARTS
from deitfast.distill.cache_manifest import read_manifest
from deitfast.distill.teacher import Teacher
from deitfast.runtime import Runtime
from pipelines.errors import DeitfastError, UserError
from tests.helpers.small_runs import CPU, run
from tests.helpers.small_teachers import Judge, distilled, judge, judged, opened, taught, with_cache

__all__ = ["judged"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's logits of every fourth image are NaN."""
    original = Judge.forward

    def forward(self: Judge, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (logits,) = original(self, pixels)
        logits[::4] = float("nan")
        return (logits,)

    monkeypatch.setattr(Judge, "forward", forward)


def test_logits_that_are_not_finite_are_counted(broken) -> None:
    recipe = distilled()
    teacher = Teacher(judge(10), recipe, CPU)
    for _ in range(2):
        teacher.logits(torch.rand(16, 3, 32, 32))
    with pytest.raises(DeitfastError, match="the logits of teacher judge are not finite") as caught:
        teacher.require_finite()
    assert "8 of the last 32 views" in caught.value.found
    teacher.require_finite()  # each is told once


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("cache", ["none", "through"])
def test_a_training_from_logits_that_are_not_finite_ends_with_the_teachers_name(
    tiny_small: Path, tmp_path: Path, judged, broken, mode: str, cache: str
) -> None:
    recipe = distilled("train.epochs=1", mode=mode)
    if cache == "through":
        recipe = with_cache(recipe, tmp_path / "cache")
    with pytest.raises(DeitfastError, match="the logits of teacher judge are not finite"):
        run(tiny_small, tmp_path / "run", recipe)
    if cache == "through":
        assert TeacherCache.open(tmp_path / "cache").count() == 0  # nothing of it is stored
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["steps"] == 0


def test_a_teacher_that_breaks_is_found_by_teach(tiny_small: Path, tmp_path: Path, judged, broken) -> None:
    with pytest.raises(DeitfastError, match="the logits of teacher judge are not finite"):
        taught(tiny_small, tmp_path / "cache", distilled())
    assert TeacherCache.open(tmp_path / "cache").count() == 0


@pytest.mark.parametrize("user", ["teach", "train"])
def test_parts_left_beside_a_complete_cache_go(tiny_small: Path, tmp_path: Path, judged, user: str) -> None:
    recipe, folder = distilled("train.epochs=1"), tmp_path / "cache"
    taught(tiny_small, folder, recipe)
    (folder / PARTS).mkdir()
    if user == "teach":
        taught(tiny_small, folder, recipe)
    else:
        run(tiny_small, tmp_path / "run", with_cache(recipe, folder))
    assert not (folder / PARTS).exists()


def test_a_run_folder_that_is_taken_is_refused_before_the_teacher_runs(
    tiny_small: Path, tmp_path: Path, judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per-image targets need the teacher on the whole data set."""
    run(tiny_small, tmp_path / "run", distilled("train.epochs=1", "distill.mode=none", "distill.teacher="))

    def forward(self: Judge, pixels: torch.Tensor) -> Any:
        raise AssertionError("the teacher was run")

    monkeypatch.setattr(Judge, "forward", forward)
    recipe = distilled("distill.cache=auto", "distill.targets=per_image")
    with pytest.raises(UserError, match=str(tmp_path / "run")):
        run(tiny_small, tmp_path / "run", with_cache(recipe, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


class OfRank1(Runtime):
    """Rank 1 of 2, of which rank 0 has just sent `sent`."""

    sent: tuple[Any, ...] = ()

    def broadcast_from_rank0(self, value: Any) -> Any:
        """Return what rank 0 has sent."""
        return self.sent

    def barrier(self) -> None:
        """Do not wait."""


def rank1(*sent: Any) -> Runtime:
    runtime = OfRank1(**{**vars(CPU), "rank": 1, "world": 2})
    object.__setattr__(runtime, "sent", sent)
    return runtime


def test_ranks_that_do_not_see_one_folder_are_told_which_and_what_to_do(
    tiny_small: Path, tmp_path: Path, judged
) -> None:
    """Rank 1's folder is not rank 0's: fine for a complete copy, impossible where ranks fill a cache together."""
    recipe = distilled("train.epochs=1")
    opened(tiny_small, tmp_path / "filling", recipe)
    with pytest.raises(UserError, match=r"rank 1 on .* does not see the teacher cache of rank 0 on node0") as caught:
        require_shared(tmp_path / "filling", rank1("node0", (), "0123.partial"))
    assert "a folder of its own" in caught.value.found
    assert str(tmp_path / "filling") in caught.value.expected
    assert "--cache none" in caught.value.remedy
    (tmp_path / "filling" / PARTS / "0123.partial").touch()  # as rank 0 does, where the folder is shared
    require_shared(tmp_path / "filling", rank1("node0", (), "0123.partial"))

    taught(tiny_small, tmp_path / "done", recipe)
    shutil.copytree(tmp_path / "done", tmp_path / "copy")
    crc32 = read_manifest(tmp_path / "done").crc32
    require_shared(tmp_path / "copy", rank1("node0", crc32, ""))
    with pytest.raises(UserError, match=r"rank 1 on .* does not see"):
        require_shared(tmp_path / "filling", rank1("node0", crc32, ""))
    with pytest.raises(UserError, match=r"rank 1 on .* does not see") as caught:
        require_shared(tmp_path / "nowhere", rank1("node0", crc32, ""))
    assert caught.value.found == "no cache"


def test_a_pass_is_read_once_not_for_every_step(tiny_small: Path, tmp_path: Path, judged, monkeypatch) -> None:
    recipe = distilled("train.epochs=3")
    taught(tiny_small, tmp_path / "cache", recipe)
    reads, original = [], TeacherCache.read_pass

    def counted(self: TeacherCache, first: int) -> np.ndarray:
        reads.append(first)
        return original(self, first)

    monkeypatch.setattr(TeacherCache, "read_pass", counted)
    run(tiny_small, tmp_path / "run", with_cache(recipe, tmp_path / "cache"))
    assert reads == [0, 1, 2, 0, 1, 2]  # checked before the first epoch, then read as needed
