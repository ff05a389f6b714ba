"""The paper's ablation table as overrides of a recipe: `deitfast train --ablate NAME`.

Touvron et al., 2021, table 8: DeiT-B on ImageNet-1k, top-1 at 224 px, and at 384 px after fine-tuning.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pipelines.errors import UserError

BASE = (81.8, 83.1)
"""The recipe itself, per cent at 224 and 384 px."""


@dataclass(frozen=True)
class Ablation:
    """One row."""

    name: str
    changes: dict[str, Any]
    """Fields by full name, with their value in place of the recipe's."""
    paper: tuple[float, float]
    """Top-1 in the paper, per cent at 224 and 384 px."""
    note: str = ""


ABLATIONS = (
    Ablation(
        "sgd",
        {"optim.name": "sgd", "optim.lr": 0.1, "optim.lr_batch": 512, "optim.weight_decay": 1e-4},
        (74.5, 77.3),
        "rate and decay are ours; the paper prints none",
    ),
    Ablation("no-randaugment", {"augment.policy": "none"}, (79.6, 80.4), "color jitter comes on, as in the reference"),
    Ablation("autoaugment", {"augment.policy": "autoaugment"}, (81.2, 81.9)),
    Ablation("no-mixup", {"augment.mixup": 0}, (78.7, 79.8)),
    Ablation("no-cutmix", {"augment.cutmix": 0}, (80.0, 80.6)),
    Ablation("no-mixup-no-cutmix", {"augment.mixup": 0, "augment.cutmix": 0}, (75.8, 76.7)),
    Ablation("no-erasing", {"augment.erasing": 0}, (4.3, 0.1), "the paper's run did not train"),
    Ablation("no-stochastic-depth", {"model.drop_path": 0}, (3.4, 0.1), "the paper's run did not train"),
    Ablation("no-repeated-augmentation", {"augment.repeats": 1}, (76.5, 77.4)),
    Ablation("dropout", {"model.dropout": 0.1}, (81.3, 83.1), "the rate is ViT's; the paper prints none"),
    Ablation("ema", {"train.ema": 0.99996}, (81.9, 83.1), "read the averaged weights' row"),
)


def names() -> list[str]:
    """Return the names that `--ablate` takes."""
    return [row.name for row in ABLATIONS]


def overrides(chosen: Iterable[str]) -> dict[str, Any]:
    """Return the fields that the rows of these names set, by full name; of two rows for one field the last counts.

    Raises:
        UserError: there is no row of that name.
    """
    rows = {row.name: row for row in ABLATIONS}
    changes: dict[str, Any] = {}
    for name in chosen:
        if name not in rows:
            close = get_close_matches(name, rows, n=1)
            raise UserError(
                f"unknown ablation {name}" + (f" (did you mean {close[0]}?)" if close else ""),
                expected=f"one of: {', '.join(rows)}",
            )
        changes |= rows[name].changes
    return changes
