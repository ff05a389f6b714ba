"""Training: the step alone, everything together, watched for waits and traced; on photographs and at CIFAR's size."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from deitfast.bench.machine import arithmetic
from deitfast.bench.record import Figure
from deitfast.bench.stages import all_together, device_stages, step_alone
from deitfast.bench.timing import BenchCase, measure
from deitfast.bench.workbench import Workbench
from deitfast.config import recipe as recipes
from deitfast.data_loaders import open_split
from deitfast.eval.evaluate import predict
from pipelines.loaders.factory import why_not
from tools.gpu_check.context import Context, Note, rates, ratio
from tools.gpu_check.trace import ON_GPU, STEP, read, read_waits, summary

KEEPS_UP = 0.95
"""Least share of the step's own rate that loader, augmentation and step together are to reach."""
WARM_UP = 3
"""Steps before watching or tracing begins."""
SYNCHRONIZES = "synchronizing CUDA operation"
"""What torch's warning says."""
SETTINGS = {
    "dali": (
        *(f"loader.hw_decoder_load={share}" for share in ("0.0", "0.3", "0.65", "0.9", "1.0")),
        "loader.prefetch=4",
    ),
    "cpu": ("loader.name=cpu",),
}
"""What `alternatives` changes, by the loader that it needs: the hardware decoder's share next to the step, which may
not be the best one alone; more batches under way; decoding on the host, which leaves the GPU to the step."""


def step(context: Context) -> Iterator[Figure | Note]:
    """The step alone, the targets' look-up and augmentation."""
    bench = context.bench
    found = measure(device_stages(bench), bench.clock, context.timing)
    for stage in found:
        yield rates(stage, f"{stage.name} alone")
    how = arithmetic(bench, found[-1], context.timing)
    text = f"{how.step_flops / 1e12:.3g} of {how.product_flops / 1e12:.3g} TFLOP/s"
    yield Figure("step, of a matrix product", "share", (how.utilization,), text)


def together(context: Context) -> Iterator[Figure | Note]:
    """The loop that `train` runs, with loader, augmentation and targets, compared with the step alone."""
    bench = context.bench
    alone, both = measure([step_alone(bench), all_together(bench)], bench.clock, context.timing)
    yield rates(alone, "step alone")
    yield rates(both, "end to end", what=f"{bench.loader.name} loader, augmentation, cached targets, step")
    yield ratio("end to end, of the step alone", both, alone, least=KEEPS_UP)
    waits = tuple(sample.waited_seconds / sample.seconds for sample in both.samples)
    yield Figure("end to end, waiting for a batch", "share", waits)
    yield Note("setting", vars(bench.setting()))


def cifar(context: Context) -> Iterator[Figure | Note]:
    """The same at CIFAR's size and several batches, whose steps are so short that starting their kernels counts."""
    for batch in context.scale.batches:
        with context.small_bench(f"train.batch={batch}") as bench:
            alone, both = measure([step_alone(bench), all_together(bench)], bench.clock, context.timing)
            how = "CUDA graphs" if bench.student.train_step.graphs else "no CUDA graphs"
            yield rates(alone, f"step alone, batch {batch}", what=how)
            yield rates(both, f"end to end, batch {batch}", what=f"{bench.loader.name} loader")
            yield ratio(f"end to end, of the step alone, batch {batch}", both, alone)


def cifar_ungraphed(context: Context) -> Iterator[Figure | Note]:
    """The middle batch size compiled without CUDA graphs."""
    batch, compiled = context.scale.batches[len(context.scale.batches) // 2], "on" if context.cuda else "off"
    with context.small_bench(f"train.batch={batch}", f"train.compile={compiled}") as bench:
        (alone,) = measure([step_alone(bench)], bench.clock, context.timing)
        yield rates(alone, f"step alone, batch {batch}, no CUDA graphs")


def waiting(context: Context) -> Iterator[Figure | Note]:
    """Where the host waits in training steps, the loader's thread included.

    Counted twice: torch warns at each of its own synchronizations; the profiler's trace has every call of the CUDA
    runtime, so also those of DALI, and allocations, which wait for the device as well.
    """
    case, steps = all_together(context.bench), context.scale.steps
    repeat(case, WARM_UP)
    with synchronizations(context.runtime.device) as places:
        repeat(case, steps)
    yield Figure("host synchronizations by torch", "count", (len(places),), f"in {steps} steps", most=0)
    yield Note("places", sorted(set(places)))
    if context.cuda:
        with traced(context, case):
            waits = read_waits(context.trace)
        for calls, name, most in (
            (waits.loop, "calls that wait for the GPU, training loop's thread", 0),
            (waits.allocations, "allocations that wait for the GPU, other threads", 0),
            (waits.others, "calls that wait for the GPU, other threads", None),
        ):
            yield Figure(name, "count", (sum(calls.values()),), f"in {steps} steps", most=most)
        yield Note("calls", vars(waits))


@contextmanager
def synchronizations(device: torch.device) -> Iterator[list[str]]:
    """Collect where the block, in any thread, makes the host wait for the GPU through torch; nothing on a CPU."""
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


def trace(context: Context) -> Iterator[Figure | Note]:
    """A torch.profiler trace of end-to-end steps, and what it says."""
    case = all_together(context.bench)
    repeat(case, WARM_UP)
    with traced(context, case):
        found = summary(read(context.trace, ON_GPU if context.cuda else ("cpu_op",)))
    steps = f"{context.scale.steps} steps, under the profiler"
    yield Figure("GPU busy", "share", (found["busy"],), steps)
    for part, share in found["parts"].items():
        yield Figure(f"GPU busy: {part}", "share", (share,), steps)
    yield Note("summary", found)
    yield Note("file", context.trace.name)


@contextmanager
def traced(context: Context, case: BenchCase) -> Iterator[None]:
    """Run some steps under the profiler; in the block, their trace lies at `context.trace`."""
    context.bench.clock.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.cuda else [])]
    when = schedule(wait=0, warmup=1, active=context.scale.steps, repeat=1)  # the profiler's own start is not traced

    def export(profiler: profile) -> None:
        profiler.export_chrome_trace(str(context.trace))

    with profile(activities=activities, schedule=when, on_trace_ready=export) as profiler:
        for number in range(1 + context.scale.steps):
            with record_function(STEP):
                case.call()
            if number == context.scale.steps:
                context.bench.clock.wait()  # the last step's kernels belong to it
            profiler.step()
    yield


def evaluation(context: Context) -> Iterator[Figure | Note]:
    """Evaluation through the same loader, augmentation and network."""
    bench = context.bench
    recipe, runtime, model = bench.recipe, bench.runtime, bench.student.train_step.model
    with closing(open_split(bench.dataset, "val", recipe, runtime)) as loader:
        images = bench.dataset.split("val").num_samples

        def evaluate() -> object:
            return predict(model, loader, recipe, runtime)

        what = f"{images:,} images a pass, {loader.name} loader"
        case = BenchCase("evaluation", what, None, images, evaluate, on_device=True)
        (found,) = measure([case], bench.clock, context.timing)
    yield rates(found, "evaluation")


def graphs(context: Context) -> Iterator[Figure | Note]:
    """The step with CUDA graphs, compared with the step as it is."""
    bench = context.bench
    if not bench.runtime.compile:
        yield Note("left out", "nothing is compiled here")
        return
    recipe = recipes.override(bench.recipe, {"train.compile": "graphs"})
    with closing(Workbench(bench.dataset, recipe, bench.runtime, batch=bench.batch)) as graphed:
        cases = [
            replace(step_alone(each), name=name)
            for each, name in ((bench, "step without CUDA graphs"), (graphed, "step with CUDA graphs"))
        ]
        for found in measure(cases, bench.clock, context.timing):
            yield rates(found, found.name)


def alternatives(context: Context) -> Iterator[Figure | Note]:
    """End to end with one setting changed at a time, as a share of the step alone."""
    bench = context.bench
    with ExitStack() as stack:
        cases = {"as it is": all_together(bench)}
        for loader, settings in SETTINGS.items():
            for setting in settings if not why_not(loader) else ():
                cases[setting] = all_together(stack.enter_context(closing(bench.changed([setting]))))
        if context.cuda:
            cases["the step on a stream of the loader's priority"] = unhurried(
                cases["as it is"], context.runtime.device
            )
        alone, *found = measure([step_alone(bench), *cases.values()], bench.clock, context.timing)
    for name, each in zip(cases, found, strict=True):
        yield ratio(f"of the step alone: {name}", each, alone)


def unhurried(case: BenchCase, device: torch.device) -> BenchCase:
    """Return the same work on a stream of the usual priority, the loader's (see `runtime.device.step_stream`)."""
    stream = torch.cuda.Stream(device)

    def call() -> object:
        usual = torch.cuda.current_stream(device)
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            result = case.call()
        usual.wait_stream(stream)
        return result

    return replace(case, call=call)


def repeat(case: BenchCase, count: int) -> None:
    """Call a case so many times."""
    for _ in range(count):
        case.call()
