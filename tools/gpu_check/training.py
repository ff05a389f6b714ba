"""Training on photographs: the step alone, with everything in front of it, watched for waiting, and traced."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from deitfast.bench.machine import arithmetic
from deitfast.bench.stages import all_together, device_stages
from deitfast.bench.timing import Work, measure
from deitfast.data_loaders import open_split
from deitfast.eval.evaluate import predict
from tools.gpu_check.lab import Lab, fresh, rates, ratio
from tools.gpu_check.record import Figure, Note
from tools.gpu_check.trace import ON_GPU, read, summary

KEEPS_UP = 0.95
"""Least share of the step's own rate that loader, augmentation and step together are to have."""
WARM_UP = 3
"""Steps before watching or tracing begins."""
SYNCHRONIZES = "synchronizing CUDA operation"
"""What torch's warning says."""


def step(lab: Lab) -> Iterator[Figure | Note]:
    """The step alone, with the targets' look-up and augmentation beside it."""
    bench = lab.bench
    found = measure(device_stages(bench), bench.clock, lab.pace)
    for stage in found:
        yield rates(stage, f"{stage.name} alone")
    classes = len(bench.dataset.spec.classes)
    how = arithmetic(bench.recipe, classes, found[-1], bench.runtime, bench.clock, lab.pace)
    text = f"{how.step_flops / 1e12:.3g} of {how.product_flops / 1e12:.3g} TFLOP/s"
    yield Figure("step, of a matrix product", "share", (how.utilization,), text)


def together(lab: Lab) -> Iterator[Figure | Note]:
    """Loader, augmentation, targets and step as `train` runs them, in turns with the step alone."""
    bench = lab.bench
    alone, both = measure([device_stages(bench)[-1], all_together(bench)], bench.clock, lab.pace)
    yield rates(alone, "step alone, in turns")
    yield rates(both, "end to end", what=f"{bench.loader.name} loader, augmentation, cached targets, step")
    yield ratio("end to end, of the step alone", both, alone, least=KEEPS_UP)
    waits = tuple(sample.waited_seconds / sample.seconds for sample in both.samples)
    yield Figure("end to end, waiting for a batch", "share", waits)
    yield Note("setting", vars(bench.setting()))


def waiting(lab: Lab) -> Iterator[Figure | Note]:
    """Host synchronizations in training steps, loader thread included: torch warns at each, on a GPU."""
    train = all_together(lab.bench)
    run(train, WARM_UP)
    with synchronizations(lab.runtime.device) as seen:
        run(train, lab.scale.steps)
    yield Figure("host synchronizations", "count", (len(seen),), f"in {lab.scale.steps} steps", most=0)
    yield Note("places", sorted(set(seen)))


@contextmanager
def synchronizations(device: torch.device) -> Iterator[list[str]]:
    """Collect where the block, in any thread, makes the host wait for the GPU; nothing on a CPU."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    places += [f"{each.filename}:{each.lineno}" for each in caught if SYNCHRONIZES in str(each.message)]


def trace(lab: Lab) -> Iterator[Figure | Note]:
    """A torch.profiler trace of end-to-end steps, and what it says."""
    train = all_together(lab.bench)
    run(train, WARM_UP)
    lab.bench.clock.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if lab.cuda else [])]
    when = schedule(wait=0, warmup=1, active=lab.scale.steps, repeat=1)  # the profiler's own start is not traced

    def export(profiler: profile) -> None:
        profiler.export_chrome_trace(str(lab.trace))

    with profile(activities=activities, schedule=when, on_trace_ready=export) as profiler:
        for number in range(1 + lab.scale.steps):
            train.call()
            if number == lab.scale.steps:
                lab.bench.clock.wait()  # the last step's kernels belong to it
            profiler.step()
    found = summary(read(lab.trace, ON_GPU if lab.cuda else ("cpu_op",)))
    steps = f"{lab.scale.steps} steps, under the profiler"
    yield Figure("GPU busy", "share", (found["busy"],), steps)
    for part, share in found["parts"].items():
        yield Figure(f"GPU busy: {part}", "share", (share,), steps)
    yield Note("summary", found)
    yield Note("file", lab.trace.name)


def evaluation(lab: Lab) -> Iterator[Figure | Note]:
    """Evaluation through the same loader, augmentation and network."""
    bench = lab.bench
    recipe, runtime, model = bench.recipe, bench.runtime, bench.learner.model
    with closing(open_split(bench.dataset, "val", recipe, runtime)) as loader:
        images = bench.dataset.split("val").num_samples
        call: Callable[[], object] = lambda: predict(model, loader, recipe, runtime)  # noqa: E731
        work = Work("evaluation", f"{images:,} images a pass, {loader.name} loader", None, images, call, on_device=True)
        (found,) = measure([work], bench.clock, lab.pace)
    yield rates(found, "evaluation")


def graphs(lab: Lab) -> Iterator[Figure | Note]:
    """The step with CUDA graphs, in turns with the step as it is."""
    if not lab.bench.runtime.compile:
        yield Note("left out", "nothing is compiled here")
        return
    with fresh(), closing(lab.bench.changed(["train.compile=graphs"])) as graphed:
        graphed.held = lab.bench.held
        works = [
            replace(device_stages(bench)[-1], name=name)
            for bench, name in ((lab.bench, "step without CUDA graphs"), (graphed, "step with CUDA graphs"))
        ]
        for found in measure(works, lab.bench.clock, lab.pace):
            yield rates(found, found.name)


def run(work: Work, count: int) -> None:
    """Call some work so many times."""
    for _ in range(count):
        work.call()
