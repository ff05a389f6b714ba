"""The learning rate against the DeiT reference's, epoch by epoch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from deitfast.config import recipe as recipes
from deitfast.config.recipe import OptimSpec, ScheduleSpec
from deitfast.train.optim import build_optimizer, learning_rate, peak_lr

PEAK = 1e-3
BY_EPOCH = ScheduleSpec(per="epoch")


def reference(epochs, peak=PEAK):
    """Every epoch's rate as facebookresearch/deit's main.py has it: the scheduler is stepped after each epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates


@pytest.mark.parametrize("epochs", [300, 30, 3])
def test_every_epoch_is_the_references(epochs):
    rates = [learning_rate(BY_EPOCH, PEAK, epochs, 1251, epoch, step=17) for epoch in range(epochs)]
    assert rates == pytest.approx(reference(epochs), rel=1e-12)


def test_published_constants():
    """1e-6 twice, fifths of 1e-3 - 1e-6, then 1e-5 + .5 (1e-3 - 1e-5) (1 + cos(pi t / 300)) with t = epoch - 1."""
    table = {
        0: 1e-6,
        1: 1e-6,
        2: 2.008e-4,
        3: 4.006e-4,
        4: 6.004e-4,
        5: 8.002e-4,
        6: 9.993217e-4,
        51: 9.336826e-4,
        76: 8.550179e-4,
        151: 5.05e-4,
        226: 1.549821e-4,
        299: 1.010857e-5,
    }
    rates = {epoch: learning_rate(BY_EPOCH, peak_lr(OptimSpec(), 1024), 300, 1251, epoch, 0) for epoch in table}
    assert rates == pytest.approx(table, rel=1e-6)


def test_per_step_starts_at_warmup_peaks_after_it_and_ends_at_the_minimum():
    rates = [learning_rate(ScheduleSpec(), PEAK, 20, 10, epoch, step) for epoch in range(20) for step in range(10)]
    assert rates[0] == 1e-6
    assert rates[25] == pytest.approx((1e-6 + PEAK) / 2)
    assert rates[50] == pytest.approx(1e-5 + 0.5 * (PEAK - 1e-5) * (1 + math.cos(math.pi / 4)))
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)
    rising, falling = rates[:50], rates[50:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@given(st.integers(1, 400), st.integers(1, 50), st.floats(0, 20), st.data())
def test_rates_stay_between_their_bounds(epochs, steps, warmup, data):
    schedule = ScheduleSpec(warmup_epochs=warmup, per=data.draw(st.sampled_from(["step", "epoch"])))
    epoch, step = data.draw(st.integers(0, epochs - 1)), data.draw(st.integers(0, steps - 1))
    rate = learning_rate(schedule, PEAK, epochs, steps, epoch, step)
    assert 1e-6 <= rate <= PEAK * (1 + 1e-12)


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_a_constant_rate_is_the_references_fine_tuning(per):
    """The reference's command for 384 px has --lr 5e-6 --min-lr 5e-6, which makes its cosine flat."""
    recipe = recipes.override(recipes.load("deit_b_384_finetune"), {"schedule.per": per})
    peak = peak_lr(recipe.optim, recipe.train.batch)
    flat = ScheduleSpec(min_lr=peak, per=per)
    rates = [learning_rate(recipe.schedule, peak, 30, 100, epoch, 50) for epoch in range(30)]
    assert rates == pytest.approx([learning_rate(flat, peak, 30, 100, epoch, 50) for epoch in range(30)], rel=1e-12)
    assert set(rates[6:]) == {5e-6}
    assert max(rates[:5]) < 5e-6


def test_without_warmup_it_starts_at_the_peak():
    for per in ("step", "epoch"):
        assert learning_rate(ScheduleSpec(warmup_epochs=0, per=per), PEAK, 10, 5, 0, 0) == PEAK


def test_steps_down_are_torch_s_step_lr() -> None:
    spec = ScheduleSpec(shape="step", step_epochs=3, step_factor=0.5, warmup_epochs=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    torch_schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for epoch in range(10):
        assert learning_rate(spec, 0.8, 10, 7, epoch, 6) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torch_schedule.step()


def test_adam_is_torch_s_with_two_groups() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimSpec(name="adam", lr=1e-3, lr_batch=0, weight_decay=0.1), 8)
    assert type(optimizer) is torch.optim.Adam
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
