"""What an evaluation says, computed from all logits and labels at once; every figure is scikit-learn's."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DeitfastError

CLASSES_AT_ONCE = 32
"""Columns of the logits that the AUC sorts at a time: 6 MB for 50,000 images."""


@dataclass(frozen=True)
class Metrics:
    """Figures of one head over one split. Shares are in [0, 1]; macro means over classes, each with equal weight."""

    samples: int
    """Images evaluated."""
    top1: float
    """Share whose largest logit is the label's."""
    top5: float
    """Share whose label is among the five largest logits (all of them below five classes).

    Of equal logits, which half precision often gives, the lower class comes first, as in `top1`.
    """
    loss: float
    """Mean cross-entropy with the label, unsmoothed, in nats."""
    precision: float
    """Macro precision."""
    recall: float
    """Macro recall."""
    f1: float
    """Macro F1: the mean of the classes' F1."""
    auc: float
    """Macro one-vs-rest area under the ROC curve; NaN where no class has positives and negatives."""
    auc_classes: int
    """Classes that `auc` is a mean over: those with positives and negatives."""
    confusion: Tensor
    """int64 [C, C] on the host: row is the label, column the prediction."""

    def summary(self) -> dict[str, float]:
        """Return the figures without the confusion matrix, as JSON takes them: NaN and infinity are left out."""
        names = ("samples", "top1", "top5", "loss", "precision", "recall", "f1", "auc", "auc_classes")
        return {name: getattr(self, name) for name in names if math.isfinite(getattr(self, name))}

    def everything(self) -> dict[str, object]:
        """Return the figures and the confusion matrix, as JSON takes them."""
        return {**self.summary(), "confusion": self.confusion.tolist()}


@torch.no_grad()
def measure(logits: Tensor, labels: Tensor) -> Metrics:
    """Compute all metrics of logits [N, C] against labels int64 [N], on the logits' device.

    Precision, recall and F1 follow scikit-learn's defaults: the mean is over classes that occur among the labels or
    the predictions, and what is undefined (a class never predicted, or never there) counts as 0.

    Raises:
        DeitfastError: no image, labels outside the logits' classes, or logits that are not finite.
    """
    count, classes = logits.shape
    if not count:
        raise DeitfastError("no image to evaluate", expected="a validation split with images")
    if labels.min() < 0 or labels.max() >= classes:
        raise DeitfastError(
            f"labels {int(labels.min())} to {int(labels.max())} do not fit a model of {classes} classes",
            expected=f"labels 0 to {classes - 1}",
            remedy="evaluate on the data set that the model was trained for",
        )
    logits = logits.float()
    if bad := int((~logits.isfinite()).any(dim=1).sum()):
        raise DeitfastError(
            f"the model's logits are not finite (NaN or infinite) for {bad:,} of {count:,} images",
            expected="finite logits",
            remedy="take weights from before training diverged; with fp16, try --set train.amp=off",
        )
    log_total = logits.logsumexp(dim=1)
    own, column = logits.gather(1, labels[:, None]), torch.arange(classes, device=logits.device)
    # topk would do, but for ties: it takes any of them, on every device others
    rank = ((logits > own) | ((logits == own) & (column < labels[:, None]))).sum(dim=1)
    loss = float((log_total - own.squeeze(1)).cpu().double().mean())
    predicted = logits.argmax(dim=1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes).cpu()
    precision, recall, f1 = _macro(confusion.numpy())
    areas = _one_vs_rest_auc(logits, log_total, labels)
    return Metrics(
        samples=count,
        top1=int(confusion.diagonal().sum()) / count,
        top5=int((rank < 5).sum()) / count,
        loss=loss,
        precision=precision,
        recall=recall,
        f1=f1,
        auc=float(areas.mean()) if len(areas) else math.nan,
        auc_classes=len(areas),
        confusion=confusion,
    )


def _macro(confusion: np.ndarray) -> tuple[float, float, float]:
    """Return macro precision, recall and F1 of a confusion matrix [C, C]."""
    hits, truth, predicted = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    occurs = truth + predicted > 0
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(truth, 1)
    f1 = 2 * hits / np.maximum(truth + predicted, 1)
    return float(precision[occurs].mean()), float(recall[occurs].mean()), float(f1[occurs].mean())


def _one_vs_rest_auc(logits: Tensor, log_total: Tensor, labels: Tensor) -> np.ndarray:
    """Return the exact AUC, float64, of each class that has positives and negatives.

    The score is the class's log-probability, which still ranks where the float32 probability has vanished.
    With n positives, m negatives and, for positive i, l_i scores below and e_i scores equal to its own (itself among
    them): AUC = (sum_i (l_i + e_i / 2) - n^2 / 2) / (n m), the Mann-Whitney statistic; a tie counts one half, and
    n^2 / 2 is what the positives contribute among themselves.
    """
    count, classes = logits.shape
    positives = torch.bincount(labels, minlength=classes)
    by_class = labels.argsort(stable=True)
    start = positives.cumsum(0) - positives
    doubled = torch.empty(classes, dtype=torch.int64, device=logits.device)
    for first in range(0, classes, CLASSES_AT_ONCE):
        chunk = slice(first, min(first + CLASSES_AT_ONCE, classes))
        scores = (logits[:, chunk] - log_total[:, None]).T.contiguous()
        # Positives of each class side by side, [chunk, most positives]; short ones run on into the next, masked below.
        column = torch.arange(max(1, int(positives[chunk].max())), device=logits.device)
        rows = by_class[(start[chunk, None] + column).clamp(max=count - 1)]
        own = scores.gather(1, rows)
        ordered = _sorted(scores)
        below_twice = torch.searchsorted(ordered, own) + torch.searchsorted(ordered, own, right=True)
        doubled[chunk] = (below_twice * (column < positives[chunk, None])).sum(dim=1)
    n, twice = positives.cpu().numpy(), doubled.cpu().numpy()
    defined = (n > 0) & (n < count)
    n, twice = n[defined], twice[defined]
    return (twice - n * n) / (2.0 * n * (count - n))


def _sorted(rows: Tensor) -> Tensor:
    """Sort each row of [R, N]. On the host numpy's, which sorts values alone, is nine times as fast as torch's."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(dim=1).values
