"""What more GPUs and more nodes would bring: arithmetic on what one process measured, nothing else.

The model: every process does what the measured one did, on batches of the same size, and after each step exchanges its
gradients with all others by a ring, nothing of which overlaps with the step. The processes of a node share its cores,
its disk and the loader's threads.
"""

from dataclasses import dataclass

from torch import nn

from deitfast.bench.record import Scaling
from deitfast.bench.verdict import CORES, RESOURCES, Capacity, Cost, predict
from pipelines.errors import UserError, pluralize

NODE_GBITS = 200.0
"""Assumed between two GPUs of one node, in Gbit/s: PCIe 4.0 x16. NVLink has several times as much."""

STEP_AND_EXCHANGE = "step and gradient exchange"
"""The limit that takes the place of the device's where processes exchange gradients."""


@dataclass(frozen=True)
class Cluster:
    """Machines like this one, to predict for."""

    nodes: int = 1
    gpus: int = 1
    """Of each node, one process each."""
    network_gbits: float = 10.0
    """Bandwidth between two nodes, in Gbit/s."""

    def __post_init__(self) -> None:
        """Refuse a cluster of nothing."""
        if self.nodes < 1 or self.gpus < 1 or not 0 < self.network_gbits < float("inf"):
            raise UserError(
                "--nodes and --gpus must be at least 1, --network more than 0 Gbit/s",
                found=f"--nodes {self.nodes} --gpus {self.gpus} --network {self.network_gbits:g}",
            )

    @property
    def processes(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's gradients, which the processes exchange in every step."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def exchange_seconds(size: int, cluster: Cluster, *, on_cpu: bool) -> float:
    """Return the time of one all-reduce of `size` bytes: every process sends 2 (n - 1) / n of them around a ring.

    The slowest link of the ring decides: the network where there are several nodes, else the link between GPUs. On a
    CPU the processes of one node are taken to exchange at the network's bandwidth as well.
    """
    n = cluster.processes
    gbits = cluster.network_gbits if cluster.nodes > 1 or on_cpu else NODE_GBITS
    return 2 * (n - 1) / n * size * 8 / (gbits * 1e9)


def scale(
    costs: list[Cost], capacity: Capacity, cluster: Cluster, batch: int, gradients: int, step_threads: int = 0
) -> Scaling:
    """Return the prediction for a cluster.

    Args:
        costs: of every stage on one process alone.
        capacity: that process's loader threads, and the cores of the machine.
        cluster: how many of what.
        batch: images of a step of one process.
        gradients: bytes that a step exchanges.
        step_threads: threads that the step computes with where it runs on the CPU; 0: it runs on a GPU.
    """
    n, gpus = cluster.processes, cluster.gpus
    seconds: dict[str, float] = dict.fromkeys(RESOURCES, 0.0)
    workers = max(1, min(capacity.workers, capacity.cores // gpus))
    crowding = max(1.0, gpus * step_threads / capacity.cores)  # processes that compute on the same cores
    for cost in costs:
        share = cost.seconds / workers if cost.threaded else cost.seconds
        seconds[cost.resource] += share * (crowding if cost.resource == "device" else 1.0)
    exchange = exchange_seconds(gradients, cluster, on_cpu=step_threads > 0)
    limits = {name: n / each for name, each in seconds.items() if each and name not in ("disk", "device")}
    if seconds["device"]:
        limits[STEP_AND_EXCHANGE if exchange else "device"] = n * batch / (batch * seconds["device"] + exchange)
    if seconds["disk"]:
        limits["disk"] = cluster.nodes / seconds["disk"]
    if cpu := sum(cost.cpu for cost in costs):
        limits[CORES] = cluster.nodes * capacity.cores / cpu
    limit = min(limits, key=lambda name: limits[name])
    link = f"{cluster.network_gbits:g} Gbit/s"
    if cluster.nodes == 1 and not step_threads:
        link = f"{NODE_GBITS:g} Gbit/s (PCIe 4.0 x16; --network counts between nodes only)"
    threads = pluralize(workers, "loader thread")
    assumptions = [
        f"every node has {capacity.cores} cores as here, for {pluralize(gpus, 'process')} with {threads} each",
        f"each process keeps its batch of {batch:,}: {n * batch:,} images a step over all",
        "nothing else slows down: no stragglers, no shared storage, evaluation and checkpoints left out",
    ]
    if exchange:
        assumptions.append(f"gradients travel around a ring of {n} at {link}, after the step, without overlap")
    return Scaling(
        nodes=cluster.nodes,
        gpus=gpus,
        network_gbits=cluster.network_gbits,
        limits=limits,
        limit=limit,
        predicted=limits[limit],
        efficiency=limits[limit] / (n * predict(costs, capacity)),
        gradient_bytes=gradients,
        exchange_seconds=exchange,
        assumptions=tuple(assumptions),
    )
