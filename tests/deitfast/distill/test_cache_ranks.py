"""Faults in the teacher or its cache on one rank of several: all end, soon, and the cause is told."""

from pathlib import Path

import pytest

from deitfast.distill.cache import TeacherCache
from tests.deitfast.train.test_ranks import faulty, scratch
from tests.helpers.small_runs import run, tiny_recipe

__all__ = ["scratch"]
FAULTS = {"teacher": "planted: the teacher fails", "teacher nan": "are not finite"}
"""What goes wrong on one rank, and what is said then."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("targets", ["exact", "per_image"])
def test_a_fault_of_the_teacher_on_one_rank_ends_all(
    tiny_small: Path, tmp_path: Path, fault: str, targets: str
) -> None:
    """In the loop that writes the cache as it goes, and while targets of whole images are computed ahead."""
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    run(tiny_small, teacher, tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    words = ["--teacher", teacher, "--distill", "hard", "--cache", cache, "--set", f"distill.targets={targets}"]
    text, code, seconds = faulty(fault, 1, 2, tiny_small, tmp_path / "run", *map(str, words))
    assert code != 0
    assert FAULTS[fault] in text
    assert seconds < 120  # with the start of the processes, on a loaded machine
    assert not TeacherCache.open(cache).complete
    words += ["--resume"] if targets == "exact" else []  # the other one had no run yet
    text, code, _ = faulty("none", 1, 2, tiny_small, tmp_path / "run", *map(str, words))
    assert code == 0, text
    assert TeacherCache.open(cache).complete
