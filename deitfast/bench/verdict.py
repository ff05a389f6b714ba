"""Which stage limits training, and what a change would bring: arithmetic on what was measured, nothing else.

The model: an image passes through four resources that work at the same time: disk, loader, copy and device. A
resource's time for an image is the sum of its stages' times, those of the loader's threaded stages divided by its
threads. All resources take their processor time from the same cores. The slowest of these five limits the whole.
"""

import math
from dataclasses import dataclass, replace

from deitfast.bench.record import Change, Measured, Resource, Verdict

RESOURCES: tuple[Resource, ...] = ("disk", "loader", "copy", "device")
CORES = "cores"
"""The fifth limit."""
MIN_GAIN = 1.03
"""A change whose predicted gain is less is not suggested."""


@dataclass(frozen=True)
class Cost:
    """Time and processor time that one stage takes for an image."""

    stage: str
    resource: Resource
    seconds: float
    cpu: float
    """Processor time in seconds."""
    threaded: bool = False
    """Whether the loader's threads share `seconds`."""


@dataclass(frozen=True)
class Capacity:
    """Threads and cores that the stages share."""

    workers: int
    cores: int


def cost_of(stage: Measured) -> Cost:
    """Return a measured stage's cost."""
    assert stage.resource is not None
    return Cost(stage.name, stage.resource, stage.seconds, stage.cpu_seconds, stage.threaded)


def loader_costs(stages: list[Cost], whole: Measured, capacity: Capacity) -> list[Cost]:
    """Return the loader's costs by stage, scaled so that together they are what the whole loader measured.

    Handing work to threads, and threads waiting for each other, belong to no stage: all are scaled alike. A loader
    whose stages cannot be measured one by one is one threaded stage.
    """
    if not stages:
        return [Cost(whole.name, "loader", whole.seconds * capacity.workers, whole.cpu_seconds, threaded=True)]
    modeled = sum(_share(cost, capacity) for cost in stages)
    cpu = sum(cost.cpu for cost in stages)
    slower, busier = whole.seconds / modeled, whole.cpu_seconds / cpu if cpu else 1.0
    return [replace(cost, seconds=cost.seconds * slower, cpu=cost.cpu * busier) for cost in stages]


def limits(costs: list[Cost], capacity: Capacity) -> dict[str, float]:
    """Return images/s that each resource in use allows, and the cores."""
    found = {}
    for resource in RESOURCES:
        if seconds := sum(_share(cost, capacity) for cost in costs if cost.resource == resource):
            found[resource] = 1 / seconds
    if cpu := sum(cost.cpu for cost in costs):
        found[CORES] = capacity.cores / cpu
    return found


def predict(costs: list[Cost], capacity: Capacity) -> float:
    """Return images/s of everything together."""
    return min(limits(costs, capacity).values())


def find_bottleneck(costs: list[Cost], capacity: Capacity) -> Verdict:
    """Return which stage limits training, by which resource, and what would make it faster."""
    found = limits(costs, capacity)
    limit = min(found, key=lambda name: found[name])
    if limit == CORES:
        worst = max(costs, key=lambda cost: cost.cpu)
    else:
        worst = max((cost for cost in costs if cost.resource == limit), key=lambda cost: _share(cost, capacity))
    return Verdict(worst.stage, limit, found, found[limit], _advice(limit, found, costs, capacity))


def loader_bound(costs: list[Cost], verdict: Verdict) -> bool:
    """Whether the loader limits training: by its threads, or by its share of the cores."""
    if verdict.limit == CORES:
        return any(cost.resource == "loader" and cost.stage == verdict.bottleneck for cost in costs)
    return verdict.limit == "loader"


def workers_for(rate: float, costs: list[Cost], capacity: Capacity) -> int | None:
    """Return the threads with which the loader reaches `rate` images/s; None where no number of them does."""
    own = [cost for cost in costs if cost.resource == "loader"]
    left = 1 / rate - sum(cost.seconds for cost in own if not cost.threaded)
    shared = sum(cost.seconds for cost in own if cost.threaded)
    return max(1, math.ceil(shared / left - 1e-9)) if left > 0 else None


def with_loader(costs: list[Cost], other: list[Cost]) -> list[Cost]:
    """Return the costs with another loader's in place of the loader's."""
    return [*(cost for cost in costs if cost.resource != "loader"), *other]


def scaled(costs: list[Cost], factors: dict[str, float]) -> list[Cost]:
    """Return the costs with those of the named stages multiplied."""
    return [
        replace(cost, seconds=cost.seconds * factors.get(cost.stage, 1), cpu=cost.cpu * factors.get(cost.stage, 1))
        for cost in costs
    ]


def more_cores(costs: list[Cost], capacity: Capacity) -> Change | None:
    """Return how many cores would make the loader keep up with the other resources; None where that would not help.

    Every further thread needs a further core, as it is busy all the time.
    """
    found = limits(costs, capacity)
    others = [found[resource] for resource in RESOURCES if resource in found and resource != "loader"]
    if not others:
        return None
    goal = min(others)
    workers = workers_for(goal, costs, capacity)
    if workers is None:
        return None
    cores = max(workers, math.ceil(goal * sum(cost.cpu for cost in costs) - 1e-9))
    predicted = predict(costs, Capacity(max(workers, capacity.workers), cores))
    if cores <= capacity.cores or predicted < MIN_GAIN * found[min(found, key=lambda name: found[name])]:
        return None
    return Change(f"{cores} cores", predicted, f"the loader's work on {cores} cores instead of {capacity.cores}")


def _share(cost: Cost, capacity: Capacity) -> float:
    """Return a stage's time on its resource, in seconds per image."""
    return cost.seconds / capacity.workers if cost.threaded else cost.seconds


def _advice(limit: str, found: dict[str, float], costs: list[Cost], capacity: Capacity) -> str:
    match limit:
        case "loader":
            others = [rate for resource, rate in found.items() if resource != "loader"]
            return f"with a faster loader: up to {min(others):,.0f} images/s" if others else "nothing else was measured"
        case "disk":
            return "the data set is larger than the free memory: a faster disk, more memory, or a smaller --max-side"
        case "copy":
            return "batches wait for the bus: check that the GPU has all of its PCIe lanes"
        case "cores":
            return f"all {capacity.cores} cores are busy: more cores, or less work for them"
        case _:
            needed = workers_for(found[limit], costs, capacity)
            enough = needed is not None and needed <= capacity.workers
            keeps_up = f"the loader keeps up with {needed} of {capacity.workers} threads; " if enough else ""
            return keeps_up + "only a faster step helps"
