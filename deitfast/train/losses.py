"""Losses of label and teacher, in float32 whatever the logits' dtype, each a mean over the batch's valid rows."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.errors import UserError

PARTS = ("loss", "base", "distill")
"""Names of what `distilled_loss` reports, the total first."""


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, mix_labels: Tensor, lam: Tensor, smoothing: float, valid: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of logits [B, C] with smoothed targets mixed by `lam`.

    A label's smoothed target is s/C off and 1 - s + s/C on the label; a row's is lam x its own + (1 - lam) x its
    partner's. The targets are never built: of each row two log-probabilities and their mean are read.

    Args:
        labels: int64 [B].
        mix_labels: int64 [B].
        lam: float32 [B], in [0, 1].
        smoothing: s, in [0, 1).
        valid: bool [B], the rows that count; None: all.
    """
    log_probs = F.log_softmax(logits.float(), dim=1)
    own = log_probs.gather(1, labels[:, None]).squeeze(1)
    partner = log_probs.gather(1, mix_labels[:, None]).squeeze(1)
    expected = (1 - smoothing) * (lam * own + (1 - lam) * partner)
    if smoothing:
        expected = expected + smoothing * log_probs.mean(dim=1)
    return _mean(-expected, valid)


def mixed_binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    mix_labels: Tensor,
    lam: Tensor,
    smoothing: float,
    valid: Tensor | None = None,
    *,
    threshold: float | Literal["off"] = "off",
) -> Tensor:
    """Return the binary cross-entropy of logits [B, C] with smoothed targets mixed by `lam`, the mean over the classes.

    As timm's `BinaryCrossEntropy` of a mixture's targets. Arguments are those of `mixed_cross_entropy`, and:

    Args:
        threshold: targets above it become 1, the others 0; "off": they stay.
    """
    targets = torch.full_like(logits, smoothing / logits.shape[1], dtype=torch.float32)
    share = ((1 - smoothing) * lam)[:, None]
    targets.scatter_add_(1, labels[:, None], share)
    targets.scatter_add_(1, mix_labels[:, None], (1 - smoothing) - share)
    if threshold != "off":
        targets = (targets > threshold).float()
    each = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)
    return _mean(each, valid)


def hard_distillation(logits: Tensor, teacher_labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of logits [B, C] with the teacher's argmax, int64 [B]; no smoothing."""
    return _mean(F.cross_entropy(logits.float(), teacher_labels, reduction="none"), valid)


def soft_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    tau: float,
    normalization: Literal["batch", "batch_classes"],
    valid: Tensor | None = None,
) -> Tensor:
    """Return tau^2 x sum_c p_teacher (log p_teacher - log p_student), both at temperature tau.

    This is KL(teacher || student), what the reference computes with `F.kl_div(student, teacher)`; the paper writes its
    arguments the other way round.

    Args:
        logits: the student's, [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        normalization: divisor of the sum over the batch: B (the paper) or B x C (the reference's code).
        valid: bool [B], the rows that count; None: all.
    """
    student = F.log_softmax(logits.float() / tau, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().float() / tau, dim=1)
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * tau**2
    return _mean(each, valid) / (1 if normalization == "batch" else logits.shape[1])


def distilled_loss(
    heads: tuple[Tensor, ...],
    labels: Tensor,
    mix_labels: Tensor,
    lam: Tensor,
    teacher: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    mode: Literal["none", "soft", "hard"] = "hard",
    head: Literal["distillation", "class"] = "distillation",
    alpha: float = 0.5,
    tau: float = 3.0,
    normalization: Literal["batch", "batch_classes"] = "batch",
    smoothing: float = 0.1,
    labeled_loss: Callable[..., Tensor] = mixed_cross_entropy,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (1 - alpha) x base + alpha x distillation, and its parts for the record.

    The base loss is the mixed cross-entropy (or another `labeled_loss`) of every head that the teacher does not have
    to itself: the class head, and without a teacher (or with the teacher on the class head) the distillation head as
    well, in equal parts.

    Args:
        heads: (class logits,) or (class logits, distillation logits), each [B, C].
        labels: int64 [B].
        mix_labels: int64 [B], labels of the rows that MixUp or CutMix mixed in; `labels` without.
        lam: float32 [B], weight of a row's own label; ones without mixing.
        teacher: int64 [B] labels for hard, or [B, 2] of row and partner to be mixed like labels; floating-point [B, C]
            logits for soft distillation; None without.
        valid: bool [B], the rows that count; None: all.
        mode: none, soft (KL divergence at temperature `tau`) or hard (cross-entropy with the teacher's label).
        head: the logits that the distillation term is applied to.
        alpha: weight of the distillation term.
        tau: temperature of soft distillation.
        normalization: divisor of the soft term, see `soft_distillation`.
        smoothing: label smoothing of the base loss.
        labeled_loss: the base loss of one head, with the arguments of `mixed_cross_entropy`.

    Returns:
        The loss, and "loss", "base" and "distill" as detached float32 scalars ("distill" is 0 without a teacher).

    Raises:
        UserError: distillation into a head that the model does not have, or without a teacher's target.
    """
    own_head = mode != "none" and head == "distillation"
    if own_head and len(heads) < 2:
        raise UserError(
            "distillation into the distillation head of a model that has none",
            expected="class and distillation logits",
            found=f"{len(heads)} head",
            remedy="set model.token to auto or on, or distill.head to class",
        )
    labeled = heads[:1] if own_head else heads
    each = [labeled_loss(logits, labels, mix_labels, lam, smoothing, valid) for logits in labeled]
    base = torch.stack(each).mean()
    if mode == "none":
        return base, {"loss": base.detach(), "base": base.detach(), "distill": torch.zeros_like(base)}
    if teacher is None:
        raise UserError(f"distill.mode is {mode}, but no teacher's target came with the batch")
    student = heads[1] if own_head else heads[0]
    if mode == "hard" and teacher.ndim == 2:  # labels of both images of a mixture, each seen by itself
        distill = mixed_cross_entropy(student, teacher[:, 0], teacher[:, 1], lam, 0, valid)
    elif mode == "hard":
        distill = hard_distillation(student, teacher, valid)
    else:
        distill = soft_distillation(student, teacher, tau, normalization, valid)
    total = (1 - alpha) * base + alpha * distill
    return total, {"loss": total.detach(), "base": base.detach(), "distill": distill.detach()}


def _mean(losses: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of losses, [B], over the valid rows; 0 where there are none. The host waits for nothing."""
    if valid is None:
        return losses.mean()
    return torch.where(valid, losses, 0).sum() / valid.sum().clamp(min=1)
