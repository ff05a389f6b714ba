"""A teacher's logits as targets, and as what a cache keeps of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deitfast.distill.cache_files import TargetSpec
from pipelines.device import to_device


@dataclass(frozen=True)
class TeacherTargets:
    """What is kept of a teacher's logits for a batch, on any device."""

    label: Tensor
    """int64 [B] (hard), or [B, k]: the classes of the k largest logits, the largest first (soft)."""
    logit: Tensor | None = None
    """float32 [B, k], rounded as the cache keeps them (soft)."""
    lse: Tensor | None = None
    """float32 [B]: log(sum(exp(z))) over all logits z (soft)."""
    lse_tau: Tensor | None = None
    """float32 [B]: the same of z / tau, at the cache's tau (soft)."""


def encode(logits: Tensor, spec: TargetSpec) -> TeacherTargets:
    """Return what a cache keeps of logits, float32 [B, C]."""
    if spec.kind == "hard":
        return TeacherTargets(logits.argmax(-1))
    largest = logits.topk(spec.k, dim=-1)
    rounded = largest.values.to(getattr(torch, spec.dtype)).float()
    return TeacherTargets(largest.indices, rounded, logits.logsumexp(-1), (logits / spec.tau).logsumexp(-1))


def decode(answers: TeacherTargets, spec: TargetSpec, classes: int, tau: float) -> Tensor:
    """Return the target that a loss takes: labels, int64 [B], or logits, float32 [B, classes].

    The k kept logits are in their places. The other classes share what is left of the probability at temperature tau,
    in equal parts: at the cache's own tau that is known exactly. At another one it is what an even rest has there: m
    classes of together r = exp(lse) - sum(exp(z)) have the logit log(r / m) each.
    """
    if answers.logit is None or answers.lse is None or answers.lse_tau is None:
        return answers.label
    rest = classes - spec.k
    logits = answers.logit.new_zeros(len(answers.label), classes)
    if rest:
        at, total = (tau, answers.lse_tau) if tau == spec.tau else (1.0, answers.lse)
        kept = (answers.logit / at).logsumexp(-1)
        # log(exp(total) - exp(kept)); rounding may leave kept above total: then the rest has next to nothing
        left = total + torch.log1p(-torch.exp((kept - total).clamp(max=-1e-6)))
        logits += (at * (left - np.log(rest)))[:, None]
    return logits.scatter(1, answers.label, answers.logit)


def to_records(answers: Sequence[TeacherTargets], spec: TargetSpec) -> np.ndarray:
    """Return batches of answers as a cache's records, [n]. Waits for the device."""
    labels = torch.cat([each.label for each in answers]).cpu().numpy()
    if spec.kind == "hard":
        return labels.astype(spec.record)
    records = np.zeros(len(labels), spec.record)
    records["label"] = labels
    for name in ("logit", "lse", "lse_tau"):
        records[name] = torch.cat([getattr(each, name) for each in answers]).cpu().numpy()
    return records


def from_records(records: np.ndarray, device: torch.device) -> TeacherTargets:
    """Return a cache's records, [B], on a device; the copy does not wait."""

    def column(values: np.ndarray, dtype: type) -> Tensor:
        return to_device(torch.from_numpy(values.astype(dtype)), device)

    if records.dtype.names is None:
        return TeacherTargets(column(records, np.int32).long())
    label = column(records["label"], np.int32).long()
    return TeacherTargets(label, *(column(records[name], np.float32) for name in ("logit", "lse", "lse_tau")))
