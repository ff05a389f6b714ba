"""What an epoch costs besides its steps and evaluations, counted: on a GPU one of CIFAR-10 takes a second."""

import os
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.eval.evaluate import predict
from deitfast.models.vit import reads_patches
from deitfast.train import trainer
from deitfast.train.step import TrainStep
from pipelines.augment.chain import augment
from tests.helpers.small_runs import CPU, run, tiny_recipe
from tests.helpers.step_inputs import CLASSES, batch_for

EPOCHS = 6


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """What each epoch of a run does: files put in place by the training thread, threads started, loaders opened."""
    epochs: list[Counter[str]] = [Counter()]

    def count(target: Any, name: str, label: Any) -> None:
        original = getattr(target, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            if found := label(*arguments):
                epochs[-1][found] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(target, name, counting)

    def written(source: object, target: Any) -> str:
        here = threading.current_thread() is threading.main_thread()
        return f"writes {Path(target).name}" if here else ""

    count(os, "replace", written)
    count(
        threading.Thread, "start", lambda thread: f"starts {thread.name}" if thread.name == "deitfast-prefetch" else ""
    )
    count(trainer, "open_training", lambda *arguments: "opens")
    count(trainer, "open_split", lambda *arguments: "opens")
    count(trainer, "all_finite", lambda *arguments: "checks weights")
    count(trainer.Checkpointer, "save", lambda *arguments: "checkpoint")
    count(trainer.Checkpointer, "wait", lambda *arguments: "waits for a file")
    finish = trainer.Trainer._finish_epoch

    def finished(self: trainer.Trainer, stop: Any) -> Any:
        row = finish(self, stop)
        epochs.append(Counter())
        return row

    monkeypatch.setattr(trainer.Trainer, "_finish_epoch", finished)
    return epochs


def test_an_epoch_of_a_second_pays_for_its_steps_and_evaluations_alone(
    tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[Counter[str]]
) -> None:
    """Weights that are better in every epoch included: they are written by the checkpoints' thread."""
    top1 = iter(range(EPOCHS))

    def evaluate(self: trainer.Trainer, *arguments: object) -> dict[str, Any]:
        return {"val": {"class": {"top1": next(top1) / EPOCHS}}}

    monkeypatch.setattr(trainer, "LEAST_SAVE_SECONDS", 1e9)
    monkeypatch.setattr(trainer.Trainer, "_evaluate", evaluate)
    monkeypatch.setattr(TrainStep, "step", lambda self, *arguments: torch.ones(3))
    run(tiny_small, tmp_path / "run", tiny_recipe(f"train.epochs={EPOCHS}", "train.ema=0"))
    first, *between, last, after = counted
    assert len(between) == EPOCHS - 2
    usual = Counter({"writes metrics.jsonl": 1, "starts deitfast-prefetch": 1, "checks weights": 1})
    assert between == [usual] * len(between)
    assert last == usual + Counter({"checkpoint": 1})
    assert first["opens"] == 2
    assert set(after) <= {"waits for a file"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_weights_and_their_average_share_one_compiled_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: object) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    recipe = tiny_recipe()
    learner, batch = TrainStep(recipe, CLASSES, replace(CPU, compile=True)), batch_for(recipe)
    patch = reads_patches(learner.model)

    class Loader:
        steps_per_epoch = 1

        def epoch(self, epoch: int, start_step: int = 0, *, then: Any) -> Any:
            yield then(batch)

    counts = []
    for epoch in range(2):
        inputs = augment(batch, recipe.augment, dtype=torch.float32, train=True, patch=patch)
        learner.step(learner.prepare(inputs, epoch), None, 1e-3)
        assert learner.ema
        for model in (learner.model, learner.ema.model):
            predict(model, Loader(), recipe, CPU)  # pyright: ignore
            counts.append(len(graphs))
    assert counts == [3] * 4  # model and loss in training, and one evaluation
