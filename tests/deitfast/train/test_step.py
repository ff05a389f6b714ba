"""The training step: compiled without a break, and never waiting for the device."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from deitfast.config.recipe import Recipe, override
from deitfast.eval.evaluate import predict
from deitfast.models.vit import reads_patches
from deitfast.runtime import Runtime
from deitfast.train.loop import TrainLoop
from deitfast.train.step import TrainStep, keep_gradient_layout, takes_graphs
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.errors import UserError
from tests.helpers.small_runs import CPU, tiny_recipe
from tests.helpers.step_inputs import CLASSES, ROWS, NoWaiting, batch_for, targets

# Dynamo looks at the logits' .grad under a filter of its own, which pytest's turning of warnings into errors precedes.
TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
MODES = ("none", "soft", "hard")


@pytest.fixture(autouse=True)
def uncompiled() -> None:
    """Nothing that an earlier test compiled."""
    torch._dynamo.reset()


def recipe_of(mode: str, *settings: str) -> Recipe:
    distill = [f"distill.mode={mode}", "distill.teacher=somewhere"] if mode != "none" else []
    return tiny_recipe(*distill, *settings)


def inputs_for(recipe: Recipe, patch: int, dtype: torch.dtype = torch.float32) -> AugmentedBatch:
    return augment(batch_for(recipe), recipe.augment, dtype=dtype, train=True, patch=patch)


def step(learner: TrainStep, inputs: AugmentedBatch, teacher: torch.Tensor | None, epoch: int = 0) -> torch.Tensor:
    return learner.step(learner.prepare(inputs, epoch), teacher, 1e-3)


class Batches:
    """A loader of two evaluation batches."""

    steps_per_epoch = 2

    def __init__(self, recipe: Recipe) -> None:
        self.batch = batch_for(recipe)

    def epoch(self, epoch: int, start_step: int = 0, *, then):
        yield from (then(self.batch), then(self.batch))


def test_patches_teach_what_pixels_teach() -> None:
    recipe = recipe_of("none", "model.drop_path=0.0")
    losses, learned = [], []
    for read in (False, True):
        learner = TrainStep(recipe, CLASSES, CPU)
        patch = reads_patches(learner.model)
        assert patch == 16
        inputs = inputs_for(recipe, patch if read else 0)
        assert inputs.pixels.shape == ((ROWS, 4, 768) if read else (ROWS, 3, 32, 32))
        losses.append(step(learner, inputs, None))
        learned.append(learner.model.patch_embed.proj.weight)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(learned[0], learned[1])


@TRACED
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_loss_are_one_graph_each(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing with fullgraph raises at the first break; the eager backend computes what it traced."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    recipe = recipe_of(mode, "train.accumulate=2")
    plain, compiled = (TrainStep(recipe, CLASSES, replace(CPU, compile=on)) for on in (False, True))
    assert compiled.loss is not plain.loss
    inputs, teacher = inputs_for(recipe, 16), targets(mode)
    for epoch in range(2):
        torch.testing.assert_close(
            step(compiled, inputs, teacher, epoch), step(plain, inputs, teacher, epoch), rtol=1e-5, atol=1e-6
        )
    for one, other in ((compiled.model, plain.model), (compiled.ema.model, plain.ema.model)):
        ours, *_ = predict(one, Batches(recipe), recipe, CPU)
        theirs, *_ = predict(other, Batches(recipe), recipe, CPU)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_evaluation_lets_go_of_logits_before_the_next_batch() -> None:
    """CUDA graphs record another graph for every batch whose predecessor's logits are still held."""
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched(nn.Module):
        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert not any(reference() is not None for reference in alive), "a batch's logits outlive it"
            logits = pixels.mean((2, 3))
            alive.append(weakref.ref(logits))
            return (logits,)

    recipe = recipe_of("none")
    predict(Watched(), Batches(recipe), recipe, CPU)
    assert len(alive) == Batches.steps_per_epoch


@TRACED
@pytest.mark.parametrize("arch", ["resnet18", "vit_ti"])
def test_other_networks_are_one_graph(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    recipe = recipe_of("none", f"model.arch={arch}")
    learner = TrainStep(recipe, CLASSES, replace(CPU, compile=True))
    inputs = inputs_for(recipe, reads_patches(learner.model))
    assert step(learner, inputs, None).isfinite().all()


@TRACED
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("arch", ["deit_ti", "resnet50"])
def test_gradients_lie_in_memory_as_their_parameters(arch: str, compiled: bool) -> None:
    """DDP warns of any other stride, even of a dimension of 1, and copies more slowly."""
    recipe = recipe_of("hard" if arch == "deit_ti" else "none", f"model.arch={arch}")
    model = TrainStep(recipe, CLASSES, CPU).model.eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = []
    for kept in (False, True):
        if kept:
            keep_gradient_layout(model)
            if compiled:
                model.compile(backend="eager", fullgraph=True)
        model.zero_grad()
        torch.stack([head.square().sum() for head in model(torch.ones(2, 3, 32, 32))]).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert [name for name, value in gradients[1].items() if value.stride() != before[name].stride()] == []
    for name, value in gradients[1].items():
        torch.testing.assert_close(value, gradients[0][name])
    if arch == "deit_ti":
        assert gradients[0]["cls_token"].stride() != before["cls_token"].stride()  # what this is about


@pytest.mark.parametrize(("mode", "amp"), [("none", None), ("soft", None), ("hard", torch.float16)])
def test_a_step_never_waits_for_the_device(mode: str, amp: torch.dtype | None) -> None:
    recipe = recipe_of(mode, "optim.clip=1.0", "train.accumulate=2")
    runtime = replace(CPU, amp=amp)
    learner, batch, teacher = TrainStep(recipe, CLASSES, runtime), batch_for(recipe), targets(mode)
    with NoWaiting():
        for epoch in range(2):
            inputs = augment(batch, recipe.augment, dtype=runtime.input_dtype, train=True, patch=16)
            step(learner, inputs, teacher, epoch)


@pytest.mark.parametrize(
    "wait", [lambda x: x.item(), lambda x: x[x > 0], lambda x: bool(x > 0), lambda x: torch.equal(x, x)]
)
def test_waiting_is_noticed(wait) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        wait(torch.ones(()))


@pytest.mark.parametrize(
    ("settings", "world", "device", "expected"),
    [
        ([], 1, "cuda", True), ([], 2, "cuda", False), ([], 1, "cpu", False),
        (["augment.size=96"], 1, "cuda", False), (["train.accumulate=2"], 1, "cuda", False),
        (["train.compile=on"], 1, "cuda", False), (["augment.size=96", "train.compile=graphs"], 2, "cuda", True),
    ],
)  # fmt: skip
def test_graphs_are_for_small_inputs_on_one_gpu(settings: list[str], world: int, device: str, expected: bool) -> None:
    runtime = Runtime(torch.device(device), rank=0, world=world, amp=None, compile=True)
    assert takes_graphs(recipe_of("none", *settings), runtime) == expected


def test_graphs_keep_one_gradient_at_a_time() -> None:
    with pytest.raises(UserError, match=r"requires train\.accumulate = 1"):
        override(tiny_recipe(), {"train.compile": "graphs", "train.accumulate": 2})


def test_a_batch_that_does_not_fit_the_memory_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    """At the first step; weights and running statistics are as they were, and what was asked for is left alone."""
    recipe = recipe_of("none")
    learner = TrainStep(recipe, CLASSES, CPU)
    loss, inputs = learner.loss, inputs_for(recipe, reads_patches(learner.model))

    def short_of_memory(heads, labels, *arguments):
        if len(labels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(heads, labels, *arguments)

    learner.loss = short_of_memory
    loop = TrainLoop(recipe, CPU, Batches(recipe), learner, None)  # pyright: ignore
    loop.runtime = replace(CPU, device=torch.device("cuda"))
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    with caplog.at_level("INFO", "deitfast"):
        loop.fit_memory(learner.prepare(inputs, 0), None)
    assert learner.accumulate == 4
    assert f"{ROWS} = 4 x 4" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    asked = recipe_of("none", "train.accumulate=2")
    loop = TrainLoop(asked, CPU, Batches(recipe), TrainStep(asked, CLASSES, CPU), None)  # pyright: ignore
    loop.runtime = replace(CPU, device=torch.device("cuda"))
    loop.fit_memory(learner.prepare(inputs, 0), None)
    assert loop.train_step.accumulate == 2
