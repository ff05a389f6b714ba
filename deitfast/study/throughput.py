"""The paper's table of speed: parameters, resolution and images/s of each network, eager and compiled."""

from dataclasses import replace

import torch

from deitfast.bench.timing import BenchCase, Clock, TimingOptions, measure
from deitfast.config.recipe import Recipe
from deitfast.environment import environment
from deitfast.models.vit import build_model
from deitfast.progress import Display
from deitfast.runtime import Runtime
from deitfast.study.plan import StudyPlan, parameters
from deitfast.study.results import Measurements, RowResult, StudyResult, judge
from pipelines.errors import DeitfastError

CLASSES = 1000
"""Outputs of the networks, as in the paper."""
BATCH = {"cuda": 256, "cpu": 8}
"""Images that go through a network at once, by kind of device."""
ROUNDS = 5


def measure_throughput(plan: StudyPlan, runtime: Runtime, display: Display, seconds: float = 0.5) -> StudyResult:
    """Time every row's network in evaluation mode: `ROUNDS` measurements of at least `seconds` each, on random images.

    A row that fails is reported and does not stop the others.
    """
    recipes = {run.name: run.recipe for run in plan.runs}
    rows = []
    with display.bar("measuring", len(plan.rows)) as bar:
        for row in plan.rows:
            recipe = recipes[row.runs[0]]
            figures: dict[str, Measurements] = {}
            failures: tuple[str, ...] = ()
            try:
                figures = _row(recipe, runtime, seconds, [c for c in plan.study.columns if c in ("eager", "compiled")])
            except (DeitfastError, torch.OutOfMemoryError) as error:
                failures = (f"{row.row.name}: {error}",)
            rows.append(RowResult(row.row.name, figures, row.row.published, (), int(not failures), 1, failures))
            bar.advance(1, row.row.name)
    found = tuple(rows)
    claims = tuple(judge(claim, found) for claim in plan.study.claims)
    return StudyResult(plan, found, (), claims, environment())


def _row(recipe: Recipe, runtime: Runtime, seconds: float, columns: list[str]) -> dict[str, Measurements]:
    """Return a network's figures by column."""
    size = recipe.augment.size
    figures = {
        "parameters": Measurements((parameters(recipe, CLASSES),)),
        "size": Measurements((size,)),
    }
    for column in columns:
        runtime = replace(runtime, compile=column == "compiled")
        case = _inference(recipe, runtime)
        (found,) = measure([case], Clock(runtime.device), TimingOptions(seconds, ROUNDS))
        figures[column] = Measurements(found.rates)
    return figures


def _inference(recipe: Recipe, runtime: Runtime) -> BenchCase:
    """Return the forward pass of a batch that stays on the device."""
    model = build_model(recipe.model, size=recipe.augment.size, classes=CLASSES, distilled=recipe.distilled)
    model = model.to(runtime.device).to(memory_format=torch.channels_last).eval()  # pyright: ignore
    batch = BATCH[runtime.device.type]
    shape = (batch, 3, recipe.augment.size, recipe.augment.size)
    pixels = torch.randn(shape, device=runtime.device, dtype=runtime.input_dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    if runtime.compile:
        model.compile(fullgraph=True, dynamic=False)

    def forward() -> None:
        with torch.inference_mode(), runtime.autocast():
            model(pixels)

    return BenchCase("forward", "evaluation of one batch", "device", batch, forward, on_device=True)
