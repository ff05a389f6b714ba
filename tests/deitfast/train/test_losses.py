"""The losses against a plain dense reading of their formulas, in value and gradient."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import one_hot
from timm.loss import BinaryCrossEntropy
from torch.nn import functional as F

from deitfast.train.losses import (
    PARTS,
    distilled_loss,
    hard_distillation,
    mixed_binary_cross_entropy,
    mixed_cross_entropy,
    soft_distillation,
)
from pipelines.augment.chain import AugmentedBatch
from pipelines.errors import UserError
from pipelines.rng.view_params import COLUMNS, ViewParams

CLASSES, BATCH = 7, 6


def sample(seed, batch=BATCH, classes=CLASSES, heads=2):
    """Logits float64 [B, C] of each head, a batch's labels and shares, a teacher's logits."""
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, classes, generator=draw, dtype=torch.float64) * 3 for _ in range(heads)]
    labels, partners = torch.randint(0, classes, (2, batch), generator=draw)
    lam = torch.rand(batch, generator=draw)
    lam[0] = 1
    teacher = torch.randn(batch, classes, generator=draw) * 3
    width = sum(COLUMNS.values())
    inputs = AugmentedBatch(
        pixels=torch.zeros(batch, 3, 2, 2),
        labels=labels,
        mix_labels=partners,
        lam=lam,
        valid=torch.ones(batch, dtype=torch.bool),
        params=ViewParams(np.zeros((batch, width), np.int32)),
    )
    return SimpleNamespace(logits=logits, inputs=inputs, teacher=teacher)


def dense_cross_entropy(logits, inputs, smoothing):
    """timm's Mixup targets, written out: smoothed one-hot rows, mixed, then soft-target cross-entropy."""
    classes = logits.shape[1]
    off, on = smoothing / classes, 1 - smoothing + smoothing / classes
    own, partner = (F.one_hot(labels, classes) * (on - off) + off for labels in (inputs.labels, inputs.mix_labels))
    lam = inputs.lam[:, None].double()
    targets = own * lam + partner * (1 - lam)
    return torch.sum(-targets * torch.log_softmax(logits, dim=1), dim=1).mean()


def dense_kl(logits, teacher, tau):
    p, q = (torch.softmax(values.double() / tau, dim=1) for values in (teacher, logits))
    return tau**2 * (p * (p.log() - q.log())).sum()


def loss_of(heads, inputs, teacher=None, mode="none", **settings):
    """`distilled_loss` of a batch's plain tensors."""
    return distilled_loss(
        tuple(heads), inputs.labels, inputs.mix_labels, inputs.lam, teacher, inputs.valid, mode=mode, **settings
    )


def assert_agree(ours, expected, *logits):
    """Values and the gradients by every head's logits agree to float32."""
    for by, other in zip(
        torch.autograd.grad(ours, logits, allow_unused=True, retain_graph=True),
        torch.autograd.grad(expected, logits, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        assert (by is None) == (other is None)
        if by is not None:
            torch.testing.assert_close(by, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.7]), st.integers(1, 9), st.integers(2, 12))
def test_mixed_cross_entropy_is_the_dense_formula(seed, smoothing, batch, classes):
    case = sample(seed, batch, classes, heads=1)
    logits, inputs = case.logits[0].requires_grad_(), case.inputs
    ours = mixed_cross_entropy(logits, inputs.labels, inputs.mix_labels, inputs.lam, smoothing)
    assert ours.dtype == torch.float32
    assert_agree(ours, dense_cross_entropy(logits, inputs, smoothing), logits)


@pytest.mark.parametrize("threshold", ["off", 0.0, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms_of_the_mixed_targets(smoothing, threshold):
    case = sample(2, heads=1)
    logits, inputs = case.logits[0].requires_grad_(), case.inputs
    ours = mixed_binary_cross_entropy(
        logits, inputs.labels, inputs.mix_labels, inputs.lam, smoothing, threshold=threshold
    )
    theirs = BinaryCrossEntropy(smoothing, None if threshold == "off" else threshold)
    lam = inputs.lam[:, None]
    on, off = 1 - smoothing + smoothing / CLASSES, smoothing / CLASSES
    own, partner = (one_hot(labels, CLASSES, on, off) for labels in (inputs.labels, inputs.mix_labels))
    assert ours.dtype == torch.float32
    assert_agree(ours, theirs(logits, (own * lam + partner * (1 - lam)).double()), logits)
    rows = torch.arange(BATCH) < 4
    some = mixed_binary_cross_entropy(
        logits, inputs.labels, inputs.mix_labels, inputs.lam, smoothing, rows, threshold=threshold
    )
    alone = [value[:4] for value in (logits, inputs.labels, inputs.mix_labels, inputs.lam)]
    assert_agree(some, mixed_binary_cross_entropy(*alone, smoothing, threshold=threshold), logits)


def test_an_unmixed_row_is_torchs_smoothed_cross_entropy():
    case = sample(1)
    labels, others = case.inputs.labels, case.inputs.mix_labels
    ours = mixed_cross_entropy(case.logits[0], labels, others, torch.ones(BATCH), 0.1)
    expected = F.cross_entropy(case.logits[0].float(), labels, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_float32(dtype):
    case = sample(2)
    low = case.logits[0].to(dtype)
    inputs = case.inputs
    values = [
        (z, mixed_cross_entropy(z, inputs.labels, inputs.mix_labels, inputs.lam, 0.1),
         hard_distillation(z, inputs.labels), soft_distillation(z, case.teacher, 3.0, "batch"))
        for z in (low, low.float())
    ]  # fmt: skip
    for ours, expected in zip(values[0][1:], values[1][1:], strict=True):
        assert ours.dtype == torch.float32
        assert ours == expected


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize(("normalization", "divisor"), [("batch", BATCH), ("batch_classes", BATCH * CLASSES)])
def test_soft_distillation_is_the_dense_divergence(tau, normalization, divisor):
    case = sample(3)
    logits = case.logits[0].requires_grad_()
    teacher = case.teacher.requires_grad_()
    ours = soft_distillation(logits, teacher, tau, normalization)
    assert_agree(ours, dense_kl(logits, teacher, tau) / divisor, logits)
    assert torch.autograd.grad(ours, teacher, allow_unused=True) == (None,)


def test_soft_distillation_vanishes_where_the_student_says_what_the_teacher_says():
    teacher = sample(4).teacher
    assert soft_distillation(teacher + 5, teacher, 3.0, "batch") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.1])
@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("head", ["distillation", "class"])
def test_distilled_loss_weighs_base_and_distillation(mode, head, alpha):
    case = sample(5, heads=2 if head == "distillation" else 1)
    logits = [z.requires_grad_() for z in case.logits]
    teacher = case.teacher.argmax(1) if mode == "hard" else case.teacher
    total, parts = loss_of(logits, case.inputs, teacher, mode, alpha=alpha, tau=2.0, head=head)
    base = dense_cross_entropy(logits[0], case.inputs, 0.1)
    if mode == "hard":
        one_hot = F.one_hot(case.teacher.argmax(1), CLASSES)
        distill = -(one_hot * torch.log_softmax(logits[-1], dim=1)).sum(1).mean()
    else:
        distill = dense_kl(logits[-1], case.teacher, 2.0) / BATCH
    assert_agree(total, (1 - alpha) * base + alpha * distill, *logits)
    assert tuple(parts) == PARTS
    assert not any(part.requires_grad for part in parts.values())
    expected = {"loss": total.item(), "base": base.item(), "distill": distill.item()}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_without_a_teacher_every_head_learns_from_the_labels(heads):
    case = sample(6, heads=heads)
    logits = [z.requires_grad_() for z in case.logits]
    total, parts = loss_of(logits, case.inputs)
    expected = torch.stack([dense_cross_entropy(z, case.inputs, 0.1) for z in logits]).mean()
    assert_agree(total, expected, *logits)
    assert parts["distill"] == 0
    assert parts["base"] == parts["loss"] == total


def test_the_reference_agrees_for_hard_distillation():
    """facebookresearch/deit, losses.py: base * (1 - alpha) + cross_entropy(student, teacher.argmax) * alpha."""
    case = sample(7)
    a, b = (z.float() for z in case.logits)
    expected = 0.5 * dense_cross_entropy(a.double(), case.inputs, 0.1) + 0.5 * F.cross_entropy(
        b, case.teacher.argmax(1)
    )
    total, _ = loss_of((a, b), case.inputs, case.teacher.argmax(1), "hard")
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_missing_head_and_missing_teacher_are_named():
    case = sample(8)
    with pytest.raises(UserError, match="model that has none"):
        loss_of(case.logits[:1], case.inputs, case.teacher, "soft")
    with pytest.raises(UserError, match="no teacher's target"):
        loss_of(case.logits, case.inputs, None, "hard")


@pytest.mark.parametrize("mode", ["none", "hard", "soft"])
def test_rows_that_are_not_valid_count_for_nothing(mode):
    case, kept = sample(9), torch.tensor([True, False, True, True, False, True])
    teacher = {"none": None, "hard": case.teacher.argmax(1), "soft": case.teacher}[mode]
    names = ("pixels", "labels", "mix_labels", "lam", "valid")
    fewer = replace(case.inputs, **{name: getattr(case.inputs, name)[kept] for name in names})
    logits = [z.requires_grad_() for z in case.logits]
    expected, _ = loss_of([z[kept] for z in logits], fewer, teacher if teacher is None else teacher[kept], mode)
    poisoned = tuple(torch.where(kept[:, None], z, torch.nan) for z in logits)
    ours, _ = loss_of(poisoned, replace(case.inputs, valid=kept), teacher, mode)
    assert_agree(ours, expected, *logits)


def test_a_batch_without_a_valid_row_teaches_nothing():
    case = sample(10)
    inputs = replace(case.inputs, valid=torch.zeros(BATCH, dtype=torch.bool))
    total, _ = loss_of(case.logits, inputs)
    assert total == 0
