"""Teacher targets: a teacher's logits as a cache stores them (`encode`), and as a loss takes them (`decode`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deitfast.distill.cache_manifest import TargetSpec
from pipelines.device import to_device


@dataclass(frozen=True)
class TeacherTargets:
    """What a cache stores of a teacher's logits for a batch; on any device."""

    label: Tensor
    """int64 [B] (hard), or [B, k]: the classes of the k largest logits, the largest first (soft)."""
    logit: Tensor | None = None
    """float32 [B, k], rounded as the cache stores them (soft)."""
    lse: Tensor | None = None
    """float32 [B]: log(sum(exp(z))) over all logits z (soft)."""
    lse_tau: Tensor | None = None
    """float32 [B]: the same of z / tau, at the cache's tau (soft)."""


def encode(logits: Tensor, spec: TargetSpec) -> TeacherTargets:
    """Return what a cache stores of logits, float32 [B, C]."""
    if spec.kind == "hard":
        return TeacherTargets(logits.argmax(-1))
    largest = logits.topk(spec.k, dim=-1)
    rounded = largest.values.to(getattr(torch, spec.dtype)).float()
    return TeacherTargets(largest.indices, rounded, logits.logsumexp(-1), (logits / spec.tau).logsumexp(-1))


def decode(targets: TeacherTargets, spec: TargetSpec, classes: int, tau: float) -> Tensor:
    """Return the target that a loss takes: labels, int64 [B], or logits, float32 [B, classes].

    The k stored logits are in their places. The other classes share the remaining probability at temperature tau in
    equal parts. At the cache's own tau the remaining probability is known exactly. At another tau it is taken from an
    even distribution over the rest: m classes of together r = exp(lse) - sum(exp(z)) have the logit log(r / m) each.
    """
    if targets.logit is None or targets.lse is None or targets.lse_tau is None:
        return targets.label
    rest = classes - spec.k
    logits = targets.logit.new_zeros(len(targets.label), classes)
    if rest:
        at, total = (tau, targets.lse_tau) if tau == spec.tau else (1.0, targets.lse)
        stored = (targets.logit / at).logsumexp(-1)
        # log(exp(total) - exp(stored)); rounding may leave stored above total: then the rest has next to nothing
        remaining = total + torch.log1p(-torch.exp((stored - total).clamp(max=-1e-6)))
        logits += (at * (remaining - np.log(rest)))[:, None]
    return logits.scatter(1, targets.label, targets.logit)


def to_records(batches: Sequence[TeacherTargets], spec: TargetSpec) -> np.ndarray:
    """Return the targets of several batches as a cache's records, `TargetSpec.record` [n]. Waits for the device."""
    labels = torch.cat([targets.label for targets in batches]).cpu().numpy()
    if spec.kind == "hard":
        return labels.astype(spec.record)
    records = np.zeros(len(labels), spec.record)
    records["label"] = labels
    for name in ("logit", "lse", "lse_tau"):
        records[name] = torch.cat([getattr(targets, name) for targets in batches]).cpu().numpy()
    return records


def from_records(records: np.ndarray, device: torch.device) -> TeacherTargets:
    """Return a cache's records, `TargetSpec.record` [B], on a device; the host does not wait for the copy."""

    def column(values: np.ndarray, dtype: type) -> Tensor:
        return to_device(torch.from_numpy(values.astype(dtype)), device)

    if records.dtype.names is None:
        return TeacherTargets(column(records, np.int32).long())
    label = column(records["label"], np.int32).long()
    return TeacherTargets(label, *(column(records[name], np.float32) for name in ("logit", "lse", "lse_tau")))
