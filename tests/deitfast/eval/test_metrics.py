"""Every figure against scikit-learn's, and evaluation over batches, masks and processes."""

import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import nn

from deitfast.eval.evaluate import Agreement, agreement, evaluate, final_head
from deitfast.eval.metrics import measure
from pipelines.batch import Batch
from pipelines.errors import DeitfastError, UserError
from pipelines.rng.view_params import COLUMNS, ViewParams
from tests.helpers.small_runs import CPU, tiny_recipe

RECIPE = tiny_recipe("model.patch=8", "augment.size=8")


def assert_sklearns(logits, labels):
    """Compare each figure with scikit-learn's on the same float32 scores."""
    found = measure(logits, labels)
    classes = logits.shape[1]
    scores = (logits - logits.logsumexp(1, keepdim=True)).numpy()
    y, predicted = labels.numpy(), logits.argmax(1).numpy()
    columns = range(classes)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, predicted, average="macro", zero_division=0)
    areas = [sk.roc_auc_score(y == c, scores[:, c]) for c in columns if 0 < (y == c).sum() < len(y)]
    expected = {
        "samples": len(y),
        "top1": sk.accuracy_score(y, predicted),
        "loss": float(nn.functional.cross_entropy(logits.double(), labels)),  # sklearn's log_loss clips
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auc_classes": len(areas),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.auc == pytest.approx(np.mean(areas), rel=1e-12) if areas else math.isnan(found.auc)
    np.testing.assert_array_equal(found.confusion.numpy(), sk.confusion_matrix(y, predicted, labels=columns))
    assert found.confusion.dtype == torch.int64
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(2, 40), st.booleans())
def test_figures_are_sklearns(seed, count, classes, tied):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=draw) * 3
    if tied:  # whole rows twice: equal scores within every class, among positives and negatives alike
        logits = logits[torch.randint(0, count, (count,), generator=draw)]
    assert_sklearns(logits, torch.randint(0, classes, (count,), generator=draw))


@pytest.mark.filterwarnings("ignore:.*:sklearn.exceptions.UndefinedMetricWarning")
def test_auc_is_sklearns_own_one_vs_rest():
    torch.manual_seed(0)
    logits, labels = torch.randn(400, 5), torch.randint(0, 5, (400,))
    probabilities = logits.double().softmax(1).numpy()
    expected = sk.roc_auc_score(labels.numpy(), probabilities, multi_class="ovr", average="macro")
    assert measure(logits, labels).auc == pytest.approx(expected, rel=1e-12)


def test_top5_is_sklearns():
    torch.manual_seed(1)
    logits, labels = torch.randn(300, 12), torch.randint(0, 12, (300,))
    expected = sk.top_k_accuracy_score(labels.numpy(), logits.numpy(), k=5, labels=range(12))
    assert measure(logits, labels).top5 == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.sampled_from([1, 2, 3, 9]))
def test_of_equal_logits_the_lower_class_comes_first(seed, classes, values):
    """So top-5 never leaves out what top-1 takes, however few values the logits have."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, values, (50, classes), generator=draw).float()
    labels = torch.randint(0, classes, (50,), generator=draw)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    found = measure(logits, labels)
    assert found.top1 == pytest.approx((order[:, 0] == labels.numpy()).mean())
    assert found.top5 == pytest.approx((order[:, :5] == labels.numpy()[:, None]).any(1).mean())


def test_top5_takes_all_of_fewer_classes():
    assert measure(torch.randn(9, 3), torch.arange(9) % 3).top5 == 1


def test_probabilities_that_vanish_in_float32_still_rank():
    logits = torch.tensor([[200.0, 0], [190, 0], [180, 0], [170, 0]])
    found = assert_sklearns(logits, torch.tensor([0, 0, 1, 1]))
    assert found.auc == (0.5 + 1) / 2  # class 0: log-probabilities of 0, all tied; class 1: -200 < -190 < -180 < -170
    assert found.loss == pytest.approx(87.5)


def test_absent_classes_are_counted_out():
    found = assert_sklearns(torch.eye(6)[[0, 0, 1, 1, 4]] * 5, torch.tensor([0, 1, 1, 1, 3]))
    assert found.auc_classes == 3  # classes 0, 1 and 3 have images
    assert found.recall == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)  # over 0, 1, 3 and the predicted 4


def test_one_class_alone_has_no_area():
    found = measure(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert math.isnan(found.auc)
    assert found.auc_classes == 0
    assert "auc" not in found.summary()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_figure(value: float):
    logits = torch.zeros(4, 3)
    logits[2, 1] = value
    with pytest.raises(DeitfastError, match=r"not finite .* for 1 of 4 images"):
        measure(logits, torch.arange(4) % 3)


def test_the_summary_is_plain():
    summary = measure(torch.randn(20, 4), torch.arange(20) % 4).summary()
    assert {type(value) for value in summary.values()} <= {float, int}
    assert set(summary) == {"samples", "top1", "top5", "loss", "precision", "recall", "f1", "auc", "auc_classes"}


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(DeitfastError, match="labels 0 to 3 do not fit a model of 3 classes"):
        measure(torch.randn(4, 3), torch.arange(4))
    with pytest.raises(DeitfastError, match="no image"):
        measure(torch.randn(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.slow
def test_all_of_imagenet_takes_seconds():
    torch.manual_seed(0)
    logits, labels = torch.randn(50_000, 1000), torch.arange(50_000) % 1000
    began = time.monotonic()
    measure(logits, labels)
    assert time.monotonic() - began < 30


class TwoHeads(nn.Module):
    """Logits that are functions of each image's mean color."""

    def __init__(self, heads=2, classes=7):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(3, classes) for _ in range(heads))

    def forward(self, pixels):
        assert not self.training
        return tuple(head(pixels.float().mean((2, 3))) for head in self.heads)


class Images:
    """An evaluation loader over 23 images: this rank's share in batches of 4, the last ones filled up."""

    name, steps_per_epoch, batch = "images", 0, 4

    def __init__(self, rank=0, world=1, count=23, classes=7):
        draw = torch.Generator().manual_seed(5)
        self.images = torch.randint(0, 256, (count, 8, 8, 3), generator=draw, dtype=torch.uint8)
        self.images = self.images // torch.randint(1, 9, (count, 1, 1, 3), generator=draw, dtype=torch.uint8)
        self.labels = torch.randint(0, classes, (count,), generator=draw)
        self.mine = torch.arange(rank, count, world)
        self.steps_per_epoch = math.ceil(math.ceil(count / world) / self.batch)

    def epoch(self, epoch, start_step=0, *, then):
        for step in range(start_step, self.steps_per_epoch):
            mine = self.mine[step * self.batch : (step + 1) * self.batch]
            rows = torch.cat([mine, torch.zeros(self.batch - len(mine), dtype=torch.int64)])
            table = np.zeros((self.batch, sum(COLUMNS.values())), np.int32)
            valid = torch.arange(self.batch) < len(mine)
            yield then(Batch(self.images[rows], self.labels[rows], valid, ViewParams(table)))

    def close(self):
        pass


def run(model, loader, classes=7, runtime=CPU, progress=None):
    return evaluate(model, loader, RECIPE, runtime, classes, progress)


def test_evaluation_masks_its_padding_and_measures_every_head():
    model, loader, seen = TwoHeads().train(), Images(), []
    results = run(model, loader, progress=lambda done, total: seen.append((done, total)))
    assert model.training
    assert seen == [(step, 6) for step in range(1, 7)]
    assert list(results) == ["class", "distillation", "joint"]
    assert final_head(results) == "joint"
    assert [final_head(results, head) for head in ("class", "distillation", "joint", "auto")] == [*results, "joint"]
    spec = RECIPE.augment
    pixels = (loader.images.float() / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    with torch.no_grad():
        first, second = model.eval()(pixels.permute(0, 3, 1, 2))
    for name, logits in (("class", first), ("distillation", second), ("joint", (first + second) / 2)):
        expected = measure(logits, loader.labels)
        assert results[name].summary() == pytest.approx(expected.summary(), rel=1e-5)
        assert torch.equal(results[name].confusion, expected.confusion)
        assert results[name].samples == 23


def test_one_head_has_one_result():
    results = run(TwoHeads(heads=1), Images())
    assert list(results) == ["class"]
    assert final_head(results) == final_head(results, "distillation") == "class"


def test_evaluation_under_autocast_measures_in_float32():
    results = run(TwoHeads(), Images(), runtime=replace(CPU, amp=torch.bfloat16))
    assert results["joint"].loss == pytest.approx(run(TwoHeads(), Images())["joint"].loss, rel=0.02)


def test_models_of_other_widths_and_empty_splits_are_refused():
    with pytest.raises(UserError, match="the model has 7 classes, the data set 10"):
        run(TwoHeads(), Images(), classes=10)
    with pytest.raises(DeitfastError, match="no image"):
        run(TwoHeads(), SimpleNamespace(epoch=lambda epoch, then: iter(()), steps_per_epoch=0))


def _evaluate_as_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = run(TwoHeads(), Images(rank, world))
    summaries = {name: (found.summary(), found.confusion) for name, found in results.items()}
    torch.save(summaries, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_several_ranks_find_what_one_process_finds(tmp_path):
    """12 images against 11: the ranks' shards are of unequal size, the second's last batch has padding."""
    mp.spawn(_evaluate_as_rank, args=(2, str(tmp_path)), nprocs=2)
    alone = run(TwoHeads(), Images())
    for rank in range(2):
        for name, (summary, confusion) in torch.load(tmp_path / f"{rank}.pt").items():
            assert summary == pytest.approx(alone[name].summary(), rel=1e-9)
            assert torch.equal(confusion, alone[name].confusion)


def test_agreement_counts_what_changed_and_how_near_a_tie_it_was():
    labels = torch.tensor([0, 1, 2, 2])
    reference = (torch.tensor([[2.0, 1, 0], [0, 3, 2.5], [0, 1, 3], [0.2, 0.1, 0]]),)
    other = (reference[0] + torch.tensor([[0.0, 0, 0], [0, -1, 0], [0, 0, 0], [0, 0, 0.5]]),)
    found = agreement(other, reference, labels)
    assert (found.images, found.changed, found.top1, found.logits) == (4, 2, 0.0, 1.0)
    assert found.margin == pytest.approx(0.5)
    assert agreement(reference, reference, labels) == Agreement(4, 0, 0.0, 0.0, 0.0)
    both = agreement((other[0], reference[0]), (reference[0], reference[0]), labels)
    assert both.logits == 0.5
