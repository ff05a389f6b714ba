"""A bench's setting; and what it compiled is dropped with it: torch compiles a function only so often in a process."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from deitfast.bench import workbench
from deitfast.bench.workbench import Student, Workbench, forget_compiled
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import CPU, tiny_recipe


@torch._dynamo.config.patch(recompile_limit=2)  # pytest's own patch of it cannot be undone
def test_what_was_forgotten_does_not_count_against_torchs_limit() -> None:
    torch.compiler.reset()

    def through(sizes: range, *, forgetting: bool) -> None:
        for size in sizes:
            torch.compile(torch.sin, backend="eager", fullgraph=True, dynamic=False)(torch.ones(size))
            if forgetting:
                forget_compiled()

    through(range(1, 8), forgetting=True)
    with pytest.raises(FailOnRecompileLimitHit):
        through(range(1, 8), forgetting=False)
    forget_compiled()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_student_that_was_compiled_is_forgotten_when_it_is_closed(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    calls = []
    monkeypatch.setattr(workbench, "forget_compiled", lambda: calls.append(1))
    monkeypatch.setattr(workbench, "TrainStep", lambda *arguments: object())
    student = Student(tiny_recipe(), None, replace(CPU, compile=compiled))  # pyright: ignore[reportArgumentType]
    student.close()
    assert calls == []  # nothing was built
    monkeypatch.setattr(Student, "train_step", property(lambda self: setattr(self, "_train_step", object())))
    _ = student.train_step
    student.close()
    assert calls == [1] * compiled


def test_a_file_of_ffcvs_alone_is_called_by_its_name(tiny_small: Path) -> None:
    path = tiny_small / "train.beton"
    with closing(Dataset.open(path)) as data, closing(Workbench(data, tiny_recipe(), CPU)) as bench:
        assert bench.setting().data == str(path)
