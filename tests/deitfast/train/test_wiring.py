"""That a run uses what its pieces compute, where DeiT's own loop has nothing to compare it with (test_against_deit)."""

from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_training
from deitfast.eval.evaluate import predict
from deitfast.train.step import TrainStep
from pipelines.augment.chain import augment
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import CPU, run, tiny_recipe
from tests.helpers.step_inputs import CLASSES, batch_for

FLAT = ("model.drop_path=0.0", "train.ema=0", "train.epochs=1")


@contextmanager
def training(data: Path, recipe: Recipe) -> Any:
    """Yield a run's training loader."""
    with closing(Dataset.open(data)) as dataset, closing(open_training(dataset, recipe, CPU)) as loader:
        yield loader


def steps_of(monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, recipe: Recipe) -> list[Any]:
    """Train, and return of each step its samples, views, what it drops and the first weight before it."""
    found, step = [], TrainStep.step

    def watched(self: TrainStep, inputs: Any, *arguments: Any) -> torch.Tensor:
        weight = next(self.model.parameters()).detach().clone()
        dropped = inputs.dropout_seed, inputs.kept.tolist()
        found.append((inputs.params.sample.tolist(), inputs.params.view.tolist(), dropped, weight))
        return step(self, inputs, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", watched)
        run(data, out, recipe)
    return found


def test_a_gradient_is_clipped_after_it_is_unscaled() -> None:
    """With fp16's scale of 65,536 on it, every gradient is too long, and clipping it would leave next to nothing."""
    recipe = tiny_recipe(*FLAT, "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip=0.25")
    step = TrainStep(recipe, CLASSES, replace(CPU, amp=torch.float16))
    assert step.scaler.get_scale() > 1000
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    inputs = augment(batch_for(recipe), recipe.augment, dtype=torch.float16, train=True)
    step.step(step.prepare(inputs, 0), None, 0.1)
    moved = [(new.detach() - old).norm() for new, old in zip(step.model.parameters(), before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.1 * 0.25, rel=1e-3)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_networks_compute_in_the_runs_precision(amp: torch.dtype | None) -> None:
    recipe, runtime = tiny_recipe(*FLAT), replace(CPU, amp=amp)
    step, seen = TrainStep(recipe, CLASSES, runtime), []
    step.model.blocks[0].attn.qkv.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    batch = batch_for(recipe)
    inputs = augment(batch, recipe.augment, dtype=runtime.input_dtype, train=True)
    step.step(step.prepare(inputs, 0), None, 0.1)

    class Loader:
        steps_per_epoch = 1

        def epoch(self, epoch: int, start_step: int = 0, *, then: Any) -> Any:
            yield then(batch)

    predict(step.model, Loader(), recipe, runtime)  # pyright: ignore
    assert seen == [amp or torch.float32] * 2
    assert all(parameter.dtype == torch.float32 for parameter in step.model.parameters())


def test_a_resumed_step_has_the_scale_that_was_reached() -> None:
    recipe, runtime = tiny_recipe(*FLAT), replace(CPU, amp=torch.float16)
    first, second = TrainStep(recipe, CLASSES, runtime), TrainStep(recipe, CLASSES, runtime)
    inputs = augment(batch_for(recipe), recipe.augment, dtype=torch.float16, train=True)
    first.step(first.prepare(inputs, 0), None, 0.1)
    first.scaler.update(1024.0)
    second.restore(first.state())
    assert second.scaler.get_scale() == 1024.0


def test_one_seed_moves_nothing_of_the_other(tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.seed` draws weights and drop path; `augment.seed` images, their order and the share that is used."""
    common = ("model.drop_path=0.5", "train.ema=0", "train.epochs=1", "train.fraction=0.5")
    runs = {
        name: steps_of(monkeypatch, tiny_small, tmp_path / name, tiny_recipe(*common, *seeds))
        for name, seeds in (("plain", ()), ("train", ("train.seed=1",)), ("augment", ("augment.seed=1",)))
    }
    plain = runs["plain"]
    for number, step in enumerate(runs["train"]):
        assert step[:2] == plain[number][:2]
        assert step[2] != plain[number][2]
    for number, step in enumerate(runs["augment"]):
        assert step[0] != plain[number][0]
    dropped = {name: dropped_by_row(steps) for name, steps in runs.items()}
    assert same_where_both_are(dropped["plain"], dropped["augment"]) == 1
    assert same_where_both_are(dropped["plain"], dropped["train"]) < 0.9
    assert torch.equal(plain[0][3], runs["augment"][0][3])
    assert not torch.equal(plain[0][3], runs["train"][0][3])
    used = [{sample for step in runs[name] for sample in step[0]} for name in ("plain", "augment")]
    assert used[0] != used[1]


def dropped_by_row(steps: list[Any]) -> dict[tuple[int, int], list[bool]]:
    """Return which branches are kept of each (sample, view)."""
    return {
        (sample, view): row
        for samples, views, (_, kept), _ in steps
        for sample, view, row in zip(samples, views, kept, strict=True)
    }


def same_where_both_are(ours: dict[Any, Any], theirs: dict[Any, Any]) -> float:
    """Return the share of equal values of the keys that both have."""
    common = ours.keys() & theirs.keys()
    assert len(common) > 10
    return sum(ours[key] == theirs[key] for key in common) / len(common)


def test_every_step_and_rank_draws_dropout_of_its_own(tiny_small: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("model.dropout=0.1", "model.drop_path=0.0")
    step, seeds = TrainStep(recipe, CLASSES, CPU), []
    with closing(Dataset.open(tiny_small)) as dataset:
        for rank in range(2):
            with closing(open_training(dataset, recipe, replace(CPU, rank=rank, world=2))) as loader:
                for epoch in range(2):
                    for batch in loader.epoch(epoch):
                        inputs = augment(batch, recipe.augment, dtype=torch.float32, train=True)
                        seeds.append(step.prepare(inputs, epoch).dropout_seed)
    assert len(set(seeds)) == len(seeds) == 20


def test_a_share_of_the_images_is_the_same_of_every_class(tiny_small: Path) -> None:
    """Ten classes of eight images each, one after the other or mixed: three of each are used, again and again."""
    with closing(Dataset.open(tiny_small)) as dataset:
        labels = np.asarray(dataset.split("train").labels)
    with training(tiny_small, tiny_recipe("train.fraction=0.4")) as loader:
        assert loader.steps_per_epoch == 30 // 16
        used = {int(sample) for epoch in range(9) for batch in loader.epoch(epoch) for sample in batch.params.sample}
    assert Counter(labels[sorted(used)].tolist()) == dict.fromkeys(range(10), 3)
