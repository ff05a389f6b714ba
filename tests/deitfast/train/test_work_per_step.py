"""What a training's steps cost beside their arithmetic, counted: compilations, and reads of the teacher cache."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.distill.cache import TeacherCache
from tests.helpers import small_runs
from tests.helpers.small_runs import CPU, run, tiny_recipe
from tests.helpers.small_teachers import distilled, judged, with_cache

SMALL = ("model.depth=1", "model.width=64")
pytestmark = pytest.mark.usefixtures("judged")
assert judged


def test_a_complete_cache_is_read_once_a_pass(
    tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of five steps, a pass each: checked before the first step, and read once in its turn."""
    recipe = with_cache(distilled(*SMALL), tmp_path / "cache")
    run(tiny_small, tmp_path / "fills", recipe)
    reads, read = [], TeacherCache.read_pass
    monkeypatch.setattr(TeacherCache, "read_pass", lambda self, first: reads.append(first) or read(self, first))
    run(tiny_small, tmp_path / "reads", recipe)
    assert reads == [0, 1, 0, 1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_nothing_is_compiled_behind_the_first_epoch(
    tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rates, seeds, lambdas, averages and evaluations are new values and no new graphs."""
    graphs: list[int] = []
    epochs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(epochs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr("deitfast.run_folder.RunFolder.append", lambda self, row: epochs.append(row["epoch"]))
    monkeypatch.setattr(small_runs, "CPU", replace(CPU, compile=True))
    torch._dynamo.reset()
    run(tiny_small, tmp_path / "run", tiny_recipe(*SMALL, "train.epochs=3", "train.ema=0.9", "optim.clip=1"))
    torch._dynamo.reset()
    assert epochs == [1, 2, 3]
    assert set(graphs) == {0}, "compiled in a later epoch"
    assert len(graphs) <= 4, "model and loss, and both models in evaluation, once each"
