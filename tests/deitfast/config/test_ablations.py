"""The ablation table: every row changes what its name says, and nothing else."""

import pytest

from deitfast.config import recipe as recipes
from deitfast.config.ablations import ABLATIONS, BASE, names, overrides
from pipelines.errors import UserError

BASE_RECIPE = recipes.load("deit_b_imagenet")
CHANGES = {
    "sgd": {"optim.name": "sgd", "optim.lr": 0.1, "optim.weight_decay": 1e-4},
    "no-randaugment": {"augment.policy": "none"},
    "autoaugment": {"augment.policy": "autoaugment"},
    "no-mixup": {"augment.mixup": 0.0},
    "no-cutmix": {"augment.cutmix": 0.0},
    "no-mixup-no-cutmix": {"augment.mixup": 0.0, "augment.cutmix": 0.0},
    "no-erasing": {"augment.erasing": 0.0},
    "no-stochastic-depth": {"model.drop_path": 0.0},
    "no-repeated-augmentation": {"augment.repeats": 1},
    "dropout": {"model.dropout": 0.1},
    "ema": {},  # the base keeps the average already
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_changes_what_its_name_says(name: str) -> None:
    found = recipes.differences(BASE_RECIPE, recipes.override(BASE_RECIPE, overrides((name,))))
    assert {key: now for key, (_, now) in found.items()} == CHANGES[name]


def test_the_table_is_the_papers() -> None:
    figures = {row.name: row.paper for row in ABLATIONS}
    assert BASE == (81.8, 83.1)
    assert figures == {
        "sgd": (74.5, 77.3),
        "no-randaugment": (79.6, 80.4),
        "autoaugment": (81.2, 81.9),
        "no-mixup": (78.7, 79.8),
        "no-cutmix": (80.0, 80.6),
        "no-mixup-no-cutmix": (75.8, 76.7),
        "no-erasing": (4.3, 0.1),
        "no-stochastic-depth": (3.4, 0.1),
        "no-repeated-augmentation": (76.5, 77.4),
        "dropout": (81.3, 83.1),
        "ema": (81.9, 83.1),
    }


def test_rows_add_up_and_unknown_ones_are_refused() -> None:
    both = recipes.override(BASE_RECIPE, overrides(("no-mixup", "no-erasing")))
    assert (both.augment.mixup, both.augment.erasing) == (0, 0)
    with pytest.raises(UserError, match="unknown ablation no-mixing") as caught:
        overrides(("no-mixing",))
    assert all(name in caught.value.expected for name in names())
