"""The loaders on photographs: how fast at every share for the hardware decoder, and how near to the reference."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing

import torch

from deitfast.bench.record import Figure
from deitfast.bench.stages import whole_loader
from deitfast.bench.timing import measure
from pipelines.batch import Batch
from pipelines.choices import LoaderName
from pipelines.loaders.dali.calibration import cache_file
from pipelines.loaders.factory import open_loader
from pipelines.rng.sampler import EvalSampler, Sampler, SamplerSpec, TrainSampler
from pipelines.spec import AugmentSpec, LoaderSpec
from tools.gpu_check.context import Context, Note, rates
from tools.parity.loading import ALLOWED

SHARES = ("auto", "0.0", "0.65", "0.9", "1.0")
"""Of the JPEGs for the GPU's own decoder; auto: as calibrated on this machine."""


def loader(context: Context) -> Iterator[Figure | Note]:
    """The dali loader alone, at several shares for the hardware decoder, round by round."""
    with ExitStack() as stack:
        cases = []
        for share in SHARES:
            bench = stack.enter_context(closing(context.bench.changed([f"loader.hw_decoder_load={share}"])))
            cases.append(whole_loader(bench, f"loader, hw_decoder_load {share}"))
        for found in measure(cases, context.bench.clock, context.timing):
            yield rates(found, found.name)
    if cache_file().exists():
        yield Note("calibrated", json.loads(cache_file().read_text()))


def pixels(context: Context) -> Iterator[Figure | Note]:
    """The dali loader's crops against the reference loader's, PIL: training windows and evaluation's centers."""
    spec, count = context.bench.recipe.augment, context.scale.compared
    samples = context.photos.split("train").num_samples
    train = TrainSampler(
        SamplerSpec(samples=samples, batch=count, seed=spec.seed, repeats=spec.repeats, group=spec.mix_group)
    )
    for sampler, what in ((train, "training"), (EvalSampler(samples, count), "evaluation")):
        ours, theirs = (_first(context, name, sampler, spec) for name in ("dali", "reference"))
        off = (ours.crops().cpu().int() - theirs.crops().cpu().int()).abs()
        means = tuple(off.float().mean((1, 2, 3)).tolist())
        yield Figure(f"{what}: pixels from PIL's, mean", "levels", means, f"{count} crops", most=ALLOWED["dali"])
        yield Figure(f"{what}: pixels from PIL's, worst", "levels", (float(off.max()),))
        same = (ours.params.table == theirs.params.table).all() and torch.equal(ours.labels.cpu(), theirs.labels.cpu())
        yield Figure(f"{what}: batches of other windows or labels", "count", (float(not same),), most=0)


def _first(context: Context, name: LoaderName, sampler: Sampler, spec: AugmentSpec) -> Batch:
    reader, device, train = context.photos.split("train"), context.runtime.device, isinstance(sampler, TrainSampler)
    with closing(open_loader(reader, spec, LoaderSpec(name=name), sampler, train=train, device=device)) as opened:
        batches = opened.epoch(0)
        try:
            return next(batches)
        finally:
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
