"""The arithmetic of the bench: limits, the bottleneck and predictions, exactly."""

from dataclasses import replace

import pytest

from deitfast.bench.record import Measured, Measurement
from deitfast.bench.verdict import (
    Capacity,
    Cost,
    cost_of,
    find_bottleneck,
    limits,
    loader_bound,
    loader_costs,
    more_cores,
    predict,
    scaled,
    with_loader,
    workers_for,
)

COSTS = [
    Cost("drawing", "loader", 10e-6, 10e-6),
    Cost("reading", "loader", 40e-6, 40e-6, threaded=True),
    Cost("decoding", "loader", 600e-6, 600e-6, threaded=True),
    Cost("cropping", "loader", 160e-6, 160e-6, threaded=True),
    Cost("copying", "copy", 5e-6, 1e-6),
    Cost("augmentation", "device", 10e-6, 2e-6),
    Cost("step", "device", 40e-6, 3e-6),
]
"""A GPU that takes 20,000 images/s, with threads that decode 1,250 each."""
SIXTEEN = Capacity(workers=16, cores=16)


def measured(name: str, seconds: float, cpu: float, images: int = 100) -> Measured:
    sample = Measurement(images, seconds * images, cpu * images)
    return Measured(name, "", "loader", False, (sample,) * 3)


def test_resources_add_up_their_stages_and_threads_share_the_loaders() -> None:
    found = limits(COSTS, SIXTEEN)
    assert found["loader"] == pytest.approx(1 / (10e-6 + 800e-6 / 16))
    assert found["copy"] == pytest.approx(200_000)
    assert found["device"] == pytest.approx(20_000)
    assert found["cores"] == pytest.approx(16 / 816e-6)
    assert set(found) == {"loader", "copy", "device", "cores"}


@pytest.mark.parametrize(
    ("stage", "factor", "limit"),
    [
        ("drawing", 30, "loader"),
        ("reading", 40, "loader"),
        ("decoding", 3, "loader"),
        ("cropping", 10, "loader"),
        ("copying", 50, "copy"),
        ("augmentation", 12, "device"),
        ("step", 3, "device"),
    ],
)
def test_the_verdict_and_the_prediction_follow_the_stage_that_is_slowed(stage: str, factor: float, limit: str) -> None:
    costs = [replace(cost, seconds=cost.seconds * factor) if cost.stage == stage else cost for cost in COSTS]
    found = find_bottleneck(costs, SIXTEEN)
    assert (found.bottleneck, found.limit) == (stage, limit)
    stages = [cost for cost in costs if cost.resource == limit]
    assert found.predicted == pytest.approx(1 / sum(c.seconds / (16 if c.threaded else 1) for c in stages))
    assert loader_bound(costs, found) == (limit == "loader")


def test_cores_are_the_limit_where_all_compute_on_them() -> None:
    step = Cost("step", "device", 1e-3, 1.9e-3)
    costs = [Cost("decoding", "loader", 1.6e-3, 1.6e-3, threaded=True), step]
    found = find_bottleneck(costs, Capacity(workers=2, cores=2))
    assert (found.limit, found.bottleneck) == ("cores", "step")
    assert found.predicted == pytest.approx(2 / 3.5e-3)
    assert not loader_bound(costs, found)
    costs[0] = replace(costs[0], cpu=2e-3)
    assert loader_bound(costs, find_bottleneck(costs, Capacity(2, 2)))


def test_a_disk_that_every_epoch_reads_can_be_the_bottleneck() -> None:
    found = find_bottleneck([*COSTS, Cost("reading, disk", "disk", 1e-3, 0.0)], SIXTEEN)
    assert (found.bottleneck, found.limit, found.predicted) == ("reading, disk", "disk", pytest.approx(1000))


def test_the_loaders_stages_are_stretched_to_what_the_whole_loader_measured() -> None:
    own = [cost for cost in COSTS if cost.resource == "loader"]
    costs = loader_costs(own, measured("loader", seconds=90e-6, cpu=972e-6), SIXTEEN)
    assert limits(costs, SIXTEEN)["loader"] == pytest.approx(1 / 90e-6)
    assert sum(cost.cpu for cost in costs) == pytest.approx(972e-6)
    assert [cost.seconds / old.seconds for cost, old in zip(costs, own, strict=True)] == pytest.approx([1.5] * 4)


def test_a_loader_without_stages_is_one_that_its_threads_share() -> None:
    costs = loader_costs([], measured("loader", seconds=100e-6, cpu=1.2e-3), SIXTEEN)
    assert predict(costs, SIXTEEN) == pytest.approx(10_000)
    assert limits(costs, Capacity(4, 16))["loader"] == pytest.approx(2500)


def test_the_threads_that_a_rate_needs() -> None:
    assert workers_for(1 / 60e-6, COSTS, SIXTEEN) == 16
    assert workers_for(1 / 59e-6, COSTS, SIXTEEN) == 17
    assert workers_for(20_000, COSTS, SIXTEEN) == 20
    assert workers_for(1.0, COSTS, SIXTEEN) == 1
    assert workers_for(1 / 10e-6, COSTS, SIXTEEN) is None  # drawing alone takes that long


def test_more_cores_until_the_next_resource_is_full() -> None:
    change = more_cores(COSTS, SIXTEEN)
    assert change is not None
    assert change.change == "20 cores"
    assert change.predicted == pytest.approx(20_000)
    assert more_cores(COSTS, Capacity(20, 20)) is None
    serial = [replace(cost, threaded=False) for cost in COSTS]
    assert more_cores(serial, SIXTEEN) is None


def test_cheaper_decoding_and_other_loaders_are_predicted_from_what_they_cost() -> None:
    halved = scaled(COSTS, {"decoding": 0.5, "reading": 0.25})
    assert limits(halved, SIXTEEN)["loader"] == pytest.approx(1 / (10e-6 + 470e-6 / 16))
    other = with_loader(COSTS, [Cost("loader", "loader", 4e-3, 4e-3, threaded=True)])
    assert predict(other, SIXTEEN) == pytest.approx(16 / 4.006e-3)  # the cores have the step to start as well


def test_a_stage_costs_its_median() -> None:
    samples = tuple(Measurement(10, seconds, cpu) for seconds, cpu in ((1.0, 3.0), (5.0, 1.0), (2.0, 2.0)))
    found = cost_of(Measured("decoding", "", "loader", True, samples))
    assert found == Cost("decoding", "loader", pytest.approx(0.2), pytest.approx(0.2), threaded=True)


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        (COSTS, "up to 19,608 images/s"),
        (scaled(COSTS, {"step": 10}), "keeps up with 2 of 16 threads"),
        (scaled(COSTS, {"step": 0.01, "augmentation": 0.01, "copying": 100, "decoding": 0.1}), "the bus"),
        ([Cost("step", "device", 1.0, 1.0)], "only a faster step helps"),
    ],
)
def test_the_verdict_says_what_follows(costs: list[Cost], says: str) -> None:
    assert says in find_bottleneck(costs, SIXTEEN).advice
