"""What a step drops: the rates, what it depends on, and that a compiled step drops something else each time."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from deitfast.train.step import TrainStep, split_batch
from deitfast.train.stochastic_depth import draw_kept, dropout_seed
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.rng.view_params import COLUMNS, ViewParams
from tests.helpers.small_runs import CPU, tiny_recipe
from tests.helpers.step_inputs import CLASSES, batch_for

TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def uncompiled() -> None:
    """Nothing that an earlier test compiled."""
    torch._dynamo.reset()


def rows(samples: np.ndarray, view: int = 0) -> ViewParams:
    params = ViewParams(np.zeros((len(samples), sum(COLUMNS.values())), np.int32))
    params.sample[:], params.view[:] = samples, view
    return params


def augmented(*settings: str) -> tuple[AugmentedBatch, TrainStep]:
    recipe = tiny_recipe("model.drop_path=0.5", "train.ema=0", *settings)
    inputs = augment(batch_for(recipe), recipe.augment, dtype=torch.float32, train=True, patch=16)
    return inputs, TrainStep(recipe, CLASSES, CPU)


def test_every_branch_is_dropped_at_its_rate_by_itself() -> None:
    rates, count = [0.0, 0.1, 0.5, 0.9, 0.1], 20_000
    kept = draw_kept(rates, rows(np.arange(count)), 0, 7)
    assert kept.shape == (count, 5)
    assert kept[:, 0].all()
    for rate, column in zip(rates, kept.T, strict=True):
        assert column.mean() == pytest.approx(1 - rate, abs=4 * (0.25 / count) ** 0.5)
    assert abs(np.corrcoef(kept[:, 1:].T) - np.eye(4)).max() < 0.04


def test_a_row_drops_the_same_wherever_it_stands_and_something_else_in_another_epoch_view_or_seed() -> None:
    rates, samples = [0.5] * 24, np.arange(64)
    whole = draw_kept(rates, rows(samples), 3, 5)
    shuffled = samples[::-1][:10]
    assert np.array_equal(draw_kept(rates, rows(shuffled), 3, 5), whole[shuffled])
    for other in (
        draw_kept(rates, rows(samples), 4, 5),
        draw_kept(rates, rows(samples, view=1), 3, 5),
        draw_kept(rates, rows(samples), 3, 6),
        draw_kept(rates, rows(samples), 3, 5 + 2**32),
    ):
        assert 0.4 < (other == whole).mean() < 0.6
        for shift in range(4, 24, 4):  # a block of four branches is no other one's either
            assert 0.4 < (other[:, shift:] == whole[:, :-shift]).mean() < 0.6
            assert 0.4 < (other[:, :-shift] == whole[:, shift:]).mean() < 0.6


def test_dropout_has_a_seed_of_its_own_for_each_step_and_rank() -> None:
    seeds = {dropout_seed(rows(np.array([s, 9]), v), e, 1) for s in range(3) for v in range(3) for e in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_micro_batches_drop_what_the_whole_batch_drops() -> None:
    inputs, learner = augmented()
    prepared = learner.prepare(inputs, 0)
    assert prepared.kept is not None
    parts = [part.kept for part, _ in split_batch(prepared, None, 4)]
    assert torch.equal(torch.cat(parts), prepared.kept)  # pyright: ignore
    losses = [learner.step(prepared, None, 0.0)]
    learner.accumulate = 4
    losses.append(learner.step(prepared, None, 0.0))
    torch.testing.assert_close(*losses)


@TRACED
def test_a_compiled_step_drops_something_else_each_time_and_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped is an input of the graph: a CUDA graph of it replays with what is given, and draws nothing."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    inputs, plain = augmented("optim.name=sgd")
    compiled = TrainStep(plain.recipe, CLASSES, replace(CPU, compile=True))
    losses = []
    for epoch in range(3):
        found = [learner.step(learner.prepare(inputs, epoch), None, 0.0) for learner in (plain, compiled)]
        torch.testing.assert_close(*found)
        losses.append(found[1][0].item())
    assert len(set(losses)) == 3  # nothing else changes: the learning rate is 0
    assert len(graphs) == 2  # model and loss
    assert not [node for graph in graphs for node in graph.graph.nodes if "bernoulli" in str(node.target)]


def test_a_step_draws_nothing_from_torchs_generator() -> None:
    inputs, learner = augmented()
    before = torch.get_rng_state()
    learner.step(learner.prepare(inputs, 0), None, 1e-3)
    assert torch.equal(torch.get_rng_state(), before)
    inputs, learner = augmented("model.dropout=0.1")
    learner.step(learner.prepare(inputs, 0), None, 1e-3)
    assert not torch.equal(torch.get_rng_state(), before)
