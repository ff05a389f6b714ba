"""What only a GPU shows: streams that must wait for each other, graphs that overwrite, hosts that must not wait."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_training
from deitfast.distill.encoding import from_records
from deitfast.runtime import Runtime
from deitfast.train.step import TrainStep
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.batch import Batch
from pipelines.loaders.factory import why_not
from pipelines.loaders.prefetch import prefetched
from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import RESIZED, open_eval, open_train
from tests.helpers.small_runs import CPU, tiny_recipe
from tests.helpers.step_inputs import batch_for, targets

GPU = torch.device("cuda", 0)
HERE = Runtime(GPU, rank=0, world=1, amp=None, compile=False)
BUSY = 200_000_000
"""GPU cycles, some 100 ms: whatever does not wait for them comes too early."""
USUAL = (
    "`torch.jit.script_method` is deprecated",  # Inductor's first import, in torch 2.11
    "The .grad attribute of a Tensor",  # Dynamo looks at the logits'
    "TensorFloat32 tensor cores",  # Inductor's advice on float32 products: these are compared with eager ones
    "Synchronization debug mode is a prototype",  # torch's word at its first use in a process
)
"""Beginnings of warnings that torch gives on a GPU, and that say nothing of ours."""
pytestmark = [pytest.mark.gpu, *(pytest.mark.filterwarnings(f"ignore:{words}") for words in USUAL)]
needs_dali = pytest.mark.skipif(bool(why_not("dali")), reason=why_not("dali"))


def on(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, images=batch.images.to(device), labels=batch.labels.to(device), valid=batch.valid.to(device))


def inputs_on(recipe: Recipe, device: torch.device) -> AugmentedBatch:
    return augment(on(batch_for(recipe), device), recipe.augment, dtype=torch.float32, train=True, patch=16)


def test_batches_arrive_whole_though_the_gpu_is_busy() -> None:
    """The copy's stream and the step's wait for each other, and memory is not handed out again too early."""
    one = batch_for(tiny_recipe())
    count = 24
    batches = [replace(one, images=torch.full_like(one.images, number)) for number in range(count)]
    found = []
    for batch in prefetched(lambda stop: iter(batches), 2, GPU, lambda batch: batch):
        torch.cuda._sleep(BUSY // 20)
        found.append(batch.images.float().mean())
        del batch
    assert torch.stack(found).tolist() == list(range(count))


def test_cached_targets_arrive_whole_though_the_gpu_is_busy() -> None:
    """Page-locked memory may be used again only once it was copied."""
    torch.cuda._sleep(BUSY)
    found = [from_records(np.full(4096, number, np.uint16), GPU).label.double().mean() for number in range(50)]
    assert torch.stack(found).tolist() == list(range(50))


@needs_dali
def test_crops_of_dali_are_near_the_references(photos: Reader) -> None:
    for open_ in (open_train, open_eval):
        with closing(open_("dali", photos, RESIZED, device=GPU, hw_decoder_load=0.65)) as loader:
            ours = list(loader.epoch(0))
        with closing(open_("reference", photos, RESIZED)) as loader:
            theirs = list(loader.epoch(0))
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(one.params.table, other.params.table)
            assert torch.equal(one.labels.cpu(), other.labels)
            assert torch.equal(one.valid.cpu(), other.valid)
            assert (one.crops().cpu().float() - other.images.float()).abs().mean() < 1


@needs_dali
def test_crops_of_dali_stay_as_they_are_while_more_are_decoded(photos: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's memory is copied from before DALI has it back, also where that or the step's stream is far behind."""
    from pipelines.loaders.dali.loader import BatchAssembler

    place = BatchAssembler.place

    def late(*given: Any) -> Any:
        torch.cuda._sleep(BUSY // 10)
        return place(*given)

    with closing(open_train("dali", photos, RESIZED, device=GPU, hw_decoder_load=0.65)) as loader:
        quiet = [batch.images.cpu() for batch in loader.epoch(0)]
        monkeypatch.setattr(BatchAssembler, "place", late)
        kept = []
        for batch in loader.epoch(0):
            torch.cuda._sleep(BUSY // 10)
            kept.append(batch.images.clone())
    for one, other in zip(quiet, kept, strict=True):
        assert (one.float() - other.cpu().float()).abs().mean() < 0.5  # which decoder takes an image is chance


def test_resident_crops_are_the_cpus(tiny_small: Path) -> None:
    recipe = tiny_recipe("loader.name=resident")
    with closing(Dataset.open(tiny_small)) as dataset:
        found = []
        for runtime in (HERE, CPU):
            with closing(open_training(dataset, recipe, runtime)) as loader:
                found.append(torch.cat([batch.images.cpu() for batch in loader.epoch(0)]))
    assert torch.equal(*found)


@pytest.mark.parametrize("compiled", ["on", "graphs"])
def test_a_compiled_step_learns_what_an_eager_one_does(compiled: str) -> None:
    """Losses are added up as training does it: a graph that writes over its last loss would show."""
    sums, weights = [], []
    for how in ("off", compiled):
        torch.compiler.reset()
        recipe = tiny_recipe("model.drop_path=0.0", f"train.compile={how}", "distill.mode=hard", "distill.teacher=x")
        learner = TrainStep(recipe, 10, HERE.with_precision(replace(recipe.train, amp="off")))
        total = torch.zeros(3, device=GPU)
        for epoch in range(6):
            inputs, teacher = learner.prepare(inputs_on(recipe, GPU), epoch), targets("hard")
            assert teacher is not None
            total += learner.step(inputs, teacher.to(GPU), 1e-4)
        sums.append(total)
        weights.append(torch.cat([weight.flatten() for weight in learner.model.parameters()]))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-3, atol=1e-3)
    # AdamW moves weights that have no gradient either way
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-2, atol=2e-3)
    torch.compiler.reset()


def test_training_never_makes_the_host_wait(tiny_small: Path) -> None:
    """As torch sees it, in every thread, from the loader's batch to the update."""
    recipe = tiny_recipe("loader.name=resident", "optim.clip=1.0", "train.accumulate=2")
    learner = TrainStep(recipe, 10, HERE)
    with closing(Dataset.open(tiny_small)) as dataset, closing(open_training(dataset, recipe, HERE)) as loader:

        def train(epoch: int) -> None:
            for batch in loader.epoch(epoch):
                inputs = augment(batch, recipe.augment, dtype=torch.float32, train=True, patch=16)
                learner.step(learner.prepare(inputs, epoch), None, 1e-4)

        train(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", ["off", "graphs"])
def test_a_step_drops_what_it_is_given_also_in_a_graph(compiled: str) -> None:
    """The same epoch twice is the same loss, another epoch is another: a graph that captured a draw would repeat it."""
    torch.compiler.reset()
    recipe = tiny_recipe("model.drop_path=0.5", "train.ema=0", "optim.name=sgd", f"train.compile={compiled}")
    learner = TrainStep(recipe, 10, HERE.with_precision(replace(recipe.train, amp="off")))
    inputs = inputs_on(recipe, GPU)
    losses = [learner.step(learner.prepare(inputs, epoch), None, 0.0)[0].item() for epoch in (0, 1, 2, 3, 1, 0)]
    assert losses[4:] == [losses[1], losses[0]]
    assert len(set(losses)) == 4
    torch.compiler.reset()
