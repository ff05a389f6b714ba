"""Drawing several steps at once gives each step what it would get alone, with fewer calls."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.loaders import batch_plan
from pipelines.loaders.batch_plan import ROW_COLUMNS
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import BATCH, PADDED, RESIZED, open_eval, open_train


@pytest.mark.parametrize("spec", [RESIZED, PADDED])
@pytest.mark.parametrize("opened", [open_train, open_eval])
def test_steps_drawn_together_are_those_drawn_alone(photos: Reader, spec, opened, monkeypatch) -> None:
    monkeypatch.setattr(batch_plan, "DRAWN_TOGETHER", 2 * BATCH)
    plan = opened("reference", photos, spec).plan
    for start in (0, 1):
        together = list(plan.draws(1, start))
        assert len(together) == plan.sampler.steps_per_epoch - start
        for step, (rows, params) in enumerate(together, start):
            alone, expected = plan.draw(1, step)
            np.testing.assert_array_equal(params.table, expected.table)
            for column in ROW_COLUMNS:
                np.testing.assert_array_equal(getattr(rows, column), getattr(alone, column))


def test_training_resizes_with_bicubic_whatever_evaluation_takes(photos: Reader) -> None:
    both = RESIZED, replace(RESIZED, eval_interpolation="bilinear")
    for opened, same in ((open_train, True), (open_eval, False)):
        one, other = (next(iter(opened("reference", photos, spec).epoch(0))).images for spec in both)
        assert torch.equal(one, other) == same


def test_few_calls_draw_many_small_steps(photos: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plan = [], open_train("reference", photos, RESIZED).plan
    draw = batch_plan.draw_train
    monkeypatch.setattr(batch_plan, "draw_train", lambda *arguments: calls.append(1) or draw(*arguments))
    assert len(list(plan.draws(0))) == plan.sampler.steps_per_epoch > 1
    assert len(calls) == 1
