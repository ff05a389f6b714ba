"""Which stage holds a run back, and what a change would do: arithmetic on what was measured, nothing else.

The model: an image passes through four lanes that work at the same time, disk, loader, copy and device. A lane's time
for an image is the sum of its stages', the loader's threaded stages divided by its threads. All lanes take their
processor time from the same cores. The slowest of these five is the rate of the whole.
"""

import math
from dataclasses import dataclass, replace

from deitfast.bench.record import Change, Lane, Measured, Verdict

LANES: tuple[Lane, ...] = ("disk", "loader", "copy", "device")
CORES = "cores"
"""The fifth limit."""
WORTH = 1.03
"""A change that promises less than this is not worth naming."""


@dataclass(frozen=True)
class Cost:
    """What one stage costs an image."""

    stage: str
    lane: Lane
    seconds: float
    cpu: float
    """Processor time in seconds."""
    threaded: bool = False
    """Whether the loader's threads share `seconds`."""


@dataclass(frozen=True)
class Setup:
    """What the stages have to share."""

    workers: int
    cores: int


def cost_of(stage: Measured) -> Cost:
    """Return a measured stage's cost."""
    assert stage.lane is not None
    return Cost(stage.name, stage.lane, stage.seconds, stage.cpu_seconds, stage.threaded)


def loader_costs(stages: list[Cost], whole: Measured, setup: Setup) -> list[Cost]:
    """Return the loader's costs by stage, scaled so that together they are what the whole loader measured.

    Handing work to threads, and threads waiting for each other, belong to no stage: all are stretched alike. A loader
    whose stages cannot be told apart is one threaded stage.
    """
    if not stages:
        return [Cost(whole.name, "loader", whole.seconds * setup.workers, whole.cpu_seconds, threaded=True)]
    modeled = sum(_share(cost, setup) for cost in stages)
    cpu = sum(cost.cpu for cost in stages)
    stretch, extra = whole.seconds / modeled, whole.cpu_seconds / cpu if cpu else 1.0
    return [replace(cost, seconds=cost.seconds * stretch, cpu=cost.cpu * extra) for cost in stages]


def limits(costs: list[Cost], setup: Setup) -> dict[str, float]:
    """Return images/s that each lane in use allows, and the cores."""
    found = {}
    for lane in LANES:
        if seconds := sum(_share(cost, setup) for cost in costs if cost.lane == lane):
            found[lane] = 1 / seconds
    if cpu := sum(cost.cpu for cost in costs):
        found[CORES] = setup.cores / cpu
    return found


def predict(costs: list[Cost], setup: Setup) -> float:
    """Return images/s of everything together."""
    return min(limits(costs, setup).values())


def judge(costs: list[Cost], setup: Setup) -> Verdict:
    """Return what holds the whole back, and what follows."""
    found = limits(costs, setup)
    limit = min(found, key=lambda name: found[name])
    if limit == CORES:
        worst = max(costs, key=lambda cost: cost.cpu)
    else:
        worst = max((cost for cost in costs if cost.lane == limit), key=lambda cost: _share(cost, setup))
    return Verdict(worst.stage, limit, found, found[limit], _advice(limit, found, costs, setup))


def starved(costs: list[Cost], verdict: Verdict) -> bool:
    """Whether it is the loader that holds the step back: by its threads, or by its share of the cores."""
    if verdict.limit == CORES:
        return any(cost.lane == "loader" and cost.stage == verdict.bottleneck for cost in costs)
    return verdict.limit == "loader"


def workers_for(rate: float, costs: list[Cost], setup: Setup) -> int | None:
    """Return the threads with which the loader reaches `rate` images/s; None where no number of them does."""
    own = [cost for cost in costs if cost.lane == "loader"]
    left = 1 / rate - sum(cost.seconds for cost in own if not cost.threaded)
    shared = sum(cost.seconds for cost in own if cost.threaded)
    return max(1, math.ceil(shared / left - 1e-9)) if left > 0 else None


def with_loader(costs: list[Cost], other: list[Cost]) -> list[Cost]:
    """Return the costs with another loader's in place of the loader's."""
    return [*(cost for cost in costs if cost.lane != "loader"), *other]


def scaled(costs: list[Cost], factors: dict[str, float]) -> list[Cost]:
    """Return the costs with those of the named stages multiplied."""
    return [
        replace(cost, seconds=cost.seconds * factors.get(cost.stage, 1), cpu=cost.cpu * factors.get(cost.stage, 1))
        for cost in costs
    ]


def more_cores(costs: list[Cost], setup: Setup) -> Change | None:
    """Return how many cores would make the loader keep up with the other lanes; None where that would not help.

    A thread more needs a core more, for it is busy all the time.
    """
    found = limits(costs, setup)
    others = [found[lane] for lane in LANES if lane in found and lane != "loader"]
    if not others:
        return None
    goal = min(others)
    workers = workers_for(goal, costs, setup)
    if workers is None:
        return None
    cores = max(workers, math.ceil(goal * sum(cost.cpu for cost in costs) - 1e-9))
    predicted = predict(costs, Setup(max(workers, setup.workers), cores))
    if cores <= setup.cores or predicted < WORTH * found[min(found, key=lambda name: found[name])]:
        return None
    return Change(f"{cores} cores", predicted, f"the loader's work on {cores} cores instead of {setup.cores}")


def _share(cost: Cost, setup: Setup) -> float:
    """Return a stage's time in its lane, in seconds an image."""
    return cost.seconds / setup.workers if cost.threaded else cost.seconds


def _advice(limit: str, found: dict[str, float], costs: list[Cost], setup: Setup) -> str:
    match limit:
        case "loader":
            above = [rate for lane, rate in found.items() if lane != "loader"]
            return f"the rest could take {min(above):,.0f} images/s" if above else "nothing else was measured"
        case "disk":
            return "the data set is larger than the free memory: a faster disk, more memory, or a smaller --max-side"
        case "copy":
            return "batches wait for the bus: is the device on its full number of lanes?"
        case "cores":
            return f"{setup.cores} cores are all busy: more cores, or less work for them"
        case _:
            needed = workers_for(found[limit], costs, setup)
            enough = needed is not None and needed <= setup.workers
            keeps_up = f"the loader keeps up with {needed} of {setup.workers} threads; " if enough else ""
            return keeps_up + "only a faster step helps"
