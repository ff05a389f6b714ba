"""Looking at a run: what a look finds, and that no step waits for the device."""

import math
from dataclasses import replace

import pytest
import torch

from deitfast.interrupt import Stop
from deitfast.train import monitor as monitor_module
from deitfast.train.loop import TrainLoop
from deitfast.train.monitor import StepMonitor
from deitfast.train.state import DivergedError, TrainState
from pipelines.augment.chain import AugmentedBatch
from tests.helpers.small_runs import CPU, tiny_recipe
from tests.helpers.step_inputs import NoWaiting, batch_for

WAITS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "to")
"""Methods of a tensor on a device whose caller waits for it."""


class OnDevice(torch.Tensor):
    """A tensor that counts how often the host waits for it, as if it were on a GPU."""

    waits = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        OnDevice.waits += func.__name__ in WAITS
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if type(found) is torch.Tensor else found


class Batches:
    """A loader of one batch, again and again."""

    name = "test"

    def __init__(self, steps: int) -> None:
        self.steps_per_epoch, self.batch = steps, batch_for(tiny_recipe())

    def epoch(self, epoch: int, start_step: int = 0, *, then):
        for _ in range(start_step, self.steps_per_epoch):
            yield then(self.batch)

    def close(self) -> None:
        """Nothing is open."""


class Step:
    """A step that takes no time; its loss is 1, or what `losses` says of a step, from 1."""

    def __init__(self, losses: dict[int, float] | None = None) -> None:
        self.model, self.losses, self.done = torch.nn.Identity(), losses or {}, 0

    def prepare(self, inputs: AugmentedBatch, epoch: int) -> AugmentedBatch:
        return inputs

    def step(self, *arguments: object) -> torch.Tensor:
        self.done += 1
        return torch.full((3,), self.losses.get(self.done, 1.0)).as_subclass(OnDevice)


def loop_of(steps: int, losses: dict[int, float] | None = None) -> TrainLoop:
    return TrainLoop(tiny_recipe(), CPU, Batches(steps), Step(losses), None)  # pyright: ignore


def on_device() -> TrainState:
    state = TrainState.start(CPU.device)
    return replace(state, losses=state.losses.as_subclass(OnDevice))


@pytest.mark.parametrize("steps", [24, 48, 1251])
def test_no_step_waits_for_the_device(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short an epoch is, and even where every step is looked at."""
    monkeypatch.setattr(monitor_module, "LOOK_SECONDS", 0.0)
    loop, state = loop_of(steps), on_device()
    epoch = loop.epoch(state, Stop(CPU), lambda: False)
    OnDevice.waits, looks = 0, 0
    with NoWaiting():
        for _ in range(10):
            looks += next(epoch) is not None
    assert (OnDevice.waits, looks, state.steps) == (0, 10, 10)
    state.means()
    assert OnDevice.waits == 1  # the counter counts


def test_looks_are_a_matter_of_time() -> None:
    loop = loop_of(400)
    looks = [seen for seen in loop.epoch(TrainState.start(CPU.device), Stop(CPU), lambda: False) if seen]
    assert 1 <= len(looks) < 100
    assert looks[-1].means is None or looks[-1].means["loss"] == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_ends_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "LOOK_SECONDS", 0.0)
    with pytest.raises(DivergedError, match="epoch 1, step") as caught:
        list(loop_of(20, {7: math.nan}).epoch(TrainState.start(CPU.device), Stop(CPU), lambda: False))
    assert 7 <= caught.value.steps <= 9  # a look reads what the look before has copied


def test_a_checkpoint_is_due_at_once() -> None:
    monitor, state = StepMonitor(CPU), TrainState.start(CPU.device)
    monitor._interval = 1000
    assert monitor.after_step(state, 0, False) is None
    seen = monitor.after_step(state, 0, True)
    assert seen
    assert seen.save


def test_a_finished_epochs_means_are_not_the_next_ones() -> None:
    monitor, state = StepMonitor(CPU), TrainState.start(CPU.device)
    state.losses += 4
    state.steps = 2
    monitor._interval = 0
    assert monitor.after_step(state, 0, False).means["loss"] == 2  # pyright: ignore
    monitor._copy_of = 0, 2  # as where the device had not done the copy by then
    monitor._read(TrainState.start(CPU.device, epoch=1))
    assert monitor._means is None


class Late:
    """An event behind a copy, which the device has done when told so."""

    done = False

    def record(self) -> None:
        """It is behind what comes now."""

    def query(self) -> bool:
        return self.done


def test_a_look_says_up_to_which_step_it_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is the step of an earlier look, however many steps were enqueued since."""
    monkeypatch.setattr(monitor_module, "LOOK_SECONDS", 0.0)
    monitor, state, copied = StepMonitor(CPU), TrainState.start(CPU.device, epoch=3), Late()
    monkeypatch.setattr(monitor, "_copied", copied)
    places = []
    for state.steps in range(1, 7):
        copied.done = state.steps in (4, 5)
        seen = monitor.after_step(state, 0, False)
        assert seen
        places.append(seen.finite_at)
    assert places == [None, None, None, (3, 1), (3, 4), (3, 4)]
    state.losses += math.nan
    copied.done = True
    state.steps = 7
    assert monitor.after_step(state, 0, False).finite_at == (3, 5)  # pyright: ignore
    state.steps = 8
    seen = monitor.after_step(state, 0, False)
    assert seen
    assert seen.diverged
    assert seen.finite_at is None


@pytest.mark.parametrize(("theirs", "expected"), [((0, 1), (0, 1)), ((1, 2), (1, 1)), (None, None)])
def test_ranks_agree_on_the_earliest_place_that_one_of_them_has_seen(
    monkeypatch: pytest.MonkeyPatch, theirs: tuple[int, int] | None, expected: tuple[int, int] | None
) -> None:
    votes: list[list[float]] = []

    def agreed(own: list[float]) -> list[float]:
        votes.append(own)
        return [max(all_ranks) for all_ranks in zip(*votes, strict=True)]

    found = []
    for place in (theirs, (1, 1)):
        rank = StepMonitor(replace(CPU, world=2))
        monkeypatch.setattr(rank, "_agreed", agreed)
        monkeypatch.setattr(rank, "_read_at", place)
        monkeypatch.setattr(rank, "_copy", lambda state: None)  # the device has done no later copy
        found.append(rank.after_step(TrainState.start(CPU.device, epoch=1), 0, False))
    assert found[-1].finite_at == expected
