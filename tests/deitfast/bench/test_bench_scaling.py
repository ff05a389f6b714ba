"""The scale model: its arithmetic, exactly, and what it predicts for real ranks that exchange over gloo."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from deitfast.bench import cluster_jobs
from deitfast.bench.cluster_jobs import conversion_rate, predict_cluster, teacher_views
from deitfast.bench.record import FullRun
from deitfast.bench.run import BenchOptions
from deitfast.bench.scaling import NODE_GBITS, Cluster, exchange_seconds, gradient_bytes, scale
from deitfast.bench.timing import TimingOptions
from deitfast.bench.verdict import Capacity, Cost, predict
from deitfast.bench.workbench import Workbench
from pipelines.errors import UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.dataset import Dataset
from pipelines.storage.entry import Entry, InMemory
from pipelines.workers import usable_cores
from tests.helpers.sample_images import jpeg
from tests.helpers.small_runs import CPU, tiny_recipe
from tests.helpers.small_teachers import distilled, judge

ROOT = Path(__file__).parents[3]
COSTS = [
    Cost("drawing", "loader", 2e-6, 2e-6),
    Cost("decoding", "loader", 400e-6, 400e-6, threaded=True),
    Cost("copying", "copy", 5e-6, 1e-6),
    Cost("step", "device", 40e-6, 3e-6),
]
"""A GPU that takes 25,000 images/s, with threads that decode 2,500 each."""
NODE = Capacity(workers=128, cores=128)
BATCH, GRADIENTS = 256, 22_000_000


def test_one_process_is_what_the_bench_predicts() -> None:
    found = scale(COSTS, NODE, Cluster(), BATCH, GRADIENTS)
    assert found.predicted == pytest.approx(predict(COSTS, NODE))
    assert found.efficiency == pytest.approx(1)
    assert found.exchange_seconds == 0
    assert found.limit in found.limits
    assert not any("ring" in line for line in found.assumptions)  # nothing is exchanged


def test_a_ring_sends_twice_the_gradients_but_for_one_share() -> None:
    assert exchange_seconds(10**9, Cluster(2, 1, 8.0), on_cpu=False) == pytest.approx(1.0)  # 1 GB each at 1 GB/s
    assert exchange_seconds(10**9, Cluster(4, 1, 8.0), on_cpu=False) == pytest.approx(1.5)
    within = exchange_seconds(10**9, Cluster(1, 2, 8.0), on_cpu=False)
    assert within == pytest.approx(8 / NODE_GBITS)  # the network is not used
    assert exchange_seconds(10**9, Cluster(1, 2, 8.0), on_cpu=True) == pytest.approx(1.0)


def test_a_slow_network_limits_the_step_and_a_fast_one_does_not() -> None:
    slow, fast = (scale(COSTS, NODE, Cluster(4, 2, gbits), BATCH, GRADIENTS) for gbits in (1.0, 400.0))
    assert slow.limit == fast.limit == "step and gradient exchange"
    assert slow.exchange_seconds == pytest.approx(2 * 7 / 8 * GRADIENTS * 8 / 1e9)
    step = BATCH * 40e-6
    assert slow.predicted == pytest.approx(8 * BATCH / (step + slow.exchange_seconds))
    assert slow.efficiency == pytest.approx(step / (step + slow.exchange_seconds))
    assert fast.efficiency > 0.9


def test_the_processes_of_a_node_share_its_threads_and_cores() -> None:
    found = scale(COSTS, Capacity(32, 32), Cluster(2, 8, 1e6), BATCH, GRADIENTS)
    assert found.limits["loader"] == pytest.approx(16 / (2e-6 + 400e-6 / 4))
    assert found.limits["cores"] == pytest.approx(2 * 32 / 406e-6)
    assert found.limits["copy"] == pytest.approx(16 / 5e-6)
    assert found.limit == "loader"
    assert "8 processes with 4 loader threads each" in found.assumptions[0]


def test_the_disk_is_one_a_node() -> None:
    costs = [*COSTS, Cost("reading, disk", "disk", 1e-4, 0.0)]
    assert scale(costs, NODE, Cluster(3, 8, 1e6), BATCH, GRADIENTS).limits["disk"] == pytest.approx(30_000)


def test_on_a_cpu_processes_that_compute_on_the_same_cores_slow_each_other() -> None:
    costs = [replace(cost, cpu=0.0) for cost in COSTS]
    free, crowded = (
        scale(costs, Capacity(4, 4), Cluster(1, 4, 1e6), BATCH, 0, step_threads=threads) for threads in (1, 4)
    )
    assert free.limits["device"] == pytest.approx(4 / 40e-6)
    assert crowded.limits["device"] == pytest.approx(1 / 40e-6)


def test_gradients_are_those_of_what_is_trained() -> None:
    model = nn.Linear(3, 5)
    model.bias.requires_grad_(False)
    assert gradient_bytes(model) == 4 * 15


@pytest.fixture
def slow_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe's teacher takes half a second for a batch."""
    monkeypatch.setattr(cluster_jobs, "load_teacher", lambda spec, classes: judge(len(classes), pause=0.5))


def test_a_recipes_whole_work_is_predicted(tiny_dataset: Path, slow_judge: None) -> None:
    short = ["augment.crop=resized", "augment.repeats=1", "train.epochs=3", "train.fraction=0.5", "distill.cache=auto"]
    cluster, node, run = Cluster(4, 1, 1e6), Capacity(2, 2), FullRun(3, 48, 1.0, 0)
    timing = TimingOptions(0.01, 1)
    with closing(Dataset.open(tiny_dataset)) as data, closing(Workbench(data, distilled(*short), CPU)) as bench:
        found = predict_cluster(bench, [*COSTS, Cost("targets", "device", 1.0, 0.0)], node, cluster, run, timing)
        online = predict_cluster(bench, [*COSTS, Cost("teacher", "device", 60e-6, 0.0)], node, cluster, run, timing)
        with closing(bench.changed(["distill.mode=none"])) as alone:
            untaught = predict_cluster(alone, COSTS, node, cluster, run, timing)
        with closing(bench.changed(["distill.targets=per_image"])) as once:
            assert teacher_views(once) == 16  # one of each of the 16 images
    converting, asking, training = found.jobs
    assert (converting.name, converting.images, converting.limit) == ("converting (one node)", 40, "cores")
    assert (asking.name, asking.images) == ("asking the teacher", 16 * 3)
    assert asking.rate == pytest.approx(4 * 16 / 0.5, rel=0.25)  # measured: training only looks the targets up
    assert training.rate == found.predicted < 4  # its targets take a second
    assert (training.images, training.seconds) == (48, pytest.approx(48 / found.predicted))
    assert online.jobs[1].rate > online.predicted  # as measured, without step and exchange
    assert [job.name for job in untaught.jobs] == ["converting (one node)", "training"]


def test_a_teacher_that_is_not_there_leaves_its_time_out(tiny_dataset: Path) -> None:
    recipe = distilled("augment.crop=resized", "distill.cache=auto", "distill.teacher=nobody")
    with closing(Dataset.open(tiny_dataset)) as data, closing(Workbench(data, recipe, CPU)) as bench:
        found = predict_cluster(bench, COSTS, Capacity(1, 1), Cluster(), FullRun(3, 48, 1.0, 0), TimingOptions(0.01, 1))
    assert [job.name for job in found.jobs] == ["converting (one node)", "training"]
    assert "the time to ask the teacher is not predicted: teacher 'nobody' not found" in found.assumptions


def test_conversion_is_measured_with_a_process_on_every_core(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, sizes = [], []

    def slow(_: Callable, tasks: Iterable[list[Entry]], workers: int) -> Generator[list, None, None]:
        asked.append(workers)
        for task in tasks:
            sizes.append(len(task))
            time.sleep(0.05)
            yield []

    monkeypatch.setattr(cluster_jobs, "in_order", slow)
    recipe = tiny_recipe("augment.crop=resized", "augment.repeats=1")
    with closing(Dataset.open(tiny_dataset)) as data, closing(Workbench(data, recipe, CPU)) as bench:
        rate = conversion_rate(bench, 5, TimingOptions(0.1, 1))
    assert asked == [5]
    assert set(sizes) == {64}  # 32 small images, again and again, in tasks as large as those of `convert`
    assert rate is not None
    assert 64 / 0.15 < rate < 64 / 0.05


@pytest.mark.slow
def test_conversion_is_as_fast_as_predicted(tmp_path: Path) -> None:
    """Eight hundred drawn photographs: predicted within a third of what `convert` itself takes after its start."""
    files = [jpeg(375, 500, seed=seed) for seed in range(40)]
    photographs = [Entry(f"{number}.jpg", 0, files[number % 40], len(files[number % 40])) for number in range(800)]
    source = InMemory("folder", "drawn", ("any",), {"train": photographs})
    seen: list[tuple[float, int]] = []

    def note(stage: str, done: int, total: int, size: int) -> None:
        if stage == "train":
            seen.append((time.perf_counter(), done))

    convert(source, tmp_path / "d", progress=note)
    (start, first), (end, last) = seen[len(seen) // 4], seen[-1]
    recipe = tiny_recipe("augment.crop=resized", "augment.repeats=1")
    with closing(Dataset.open(tmp_path / "d")) as data, closing(Workbench(data, recipe, CPU)) as bench:
        rate = conversion_rate(bench, usable_cores(), TimingOptions(1.0, 3))
    assert rate == pytest.approx((last - first) / (end - start), rel=1 / 3)


def test_what_cannot_be_predicted_is_refused() -> None:
    for wrong in ((0, 1, 10.0), (1, 0, 10.0), (1, 1, 0.0), (1, 1, float("inf"))):
        with pytest.raises(UserError, match="--nodes and --gpus"):
            Cluster(*wrong)
    with pytest.raises(UserError, match="cannot be combined"):
        BenchOptions(part="step", cluster=Cluster(2, 2))


@pytest.mark.slow
def test_gloo_ranks_are_as_fast_as_predicted(tiny_small: Path, tmp_path: Path) -> None:
    """Steps of a known length and a real exchange, through `train`: within 15 % of the model, for 1, 2 and 4 ranks."""
    seconds, batch, size = 1.5, 8, 8_000_000
    costs = [Cost("step", "device", seconds / batch, 0.0)]
    for world in (1, 2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        images = ["--data", str(tiny_small), "--batch", str(batch * world), "--epochs", "1", "--out", "run"]
        settings = ["model.patch=16", "augment.mix_group=8", "train.amp=off", "train.ema=0"]
        sets = [word for setting in settings for word in ("--set", setting)]
        script = [str(ROOT / "tests" / "helpers" / "slow_steps.py"), str(seconds), str(size)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *script]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "train", *images, "--arch", "vit_ti", "--device", "cpu", *sets],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        gbits = json.loads((folder / "exchange.json").read_text()) if world > 1 else 10.0
        row = json.loads((folder / "run" / "metrics.jsonl").read_text())
        timed = 9 * 2 * (world - 1) / world * size * 8 / gbits / 1e9  # the exchanges that were timed alone
        measured = row["images"] / (row["seconds"] - timed)
        cores = max(2, world)  # a step that sleeps needs none
        found = scale(costs, Capacity(2, cores), Cluster(1, world, gbits), batch, size, step_threads=1)
        assert measured == pytest.approx(found.predicted, rel=0.15), (world, gbits, row)
