"""The paper's ways to distill: what each row sets, and the figures that stand beside it."""

from typing import get_args

import pytest

from deitfast.config import recipe as recipes
from deitfast.config.choices import MethodName
from deitfast.config.methods import METHODS, method_fields

BASE_RECIPE = recipes.load("deit_b_imagenet")


def test_the_table_is_the_papers() -> None:
    assert tuple(row.name for row in METHODS) == get_args(MethodName)
    assert {row.name: row.paper for row in METHODS} == {
        "no-distillation": (72.2, 79.8, 81.8, 83.1),
        "usual-distillation": (72.2, 79.8, 81.8, 83.2),
        "hard-distillation": (74.3, 80.9, 83.0, 84.0),
        "class-embedding": (73.9, 80.9, 83.0, 84.2),
        "distillation-embedding": (74.6, 81.1, 83.1, 84.4),
        "class+distillation": (74.5, 81.2, 83.4, 84.5),
    }


@pytest.mark.parametrize(
    ("name", "mode", "token", "prediction"),
    [
        ("no-distillation", "none", False, "auto"),
        ("usual-distillation", "soft", False, "auto"),
        ("hard-distillation", "hard", False, "auto"),
        ("class-embedding", "hard", True, "class"),
        ("distillation-embedding", "hard", True, "distillation"),
        ("class+distillation", "hard", True, "joint"),
    ],
)
def test_a_row_sets_what_its_name_says_whatever_the_recipe(
    name: MethodName, mode: str, token: bool, prediction: str
) -> None:
    soft = recipes.override(BASE_RECIPE, {"distill.mode": "soft", "distill.alpha": 0.9, "distill.tau": 7.0})
    for base in (BASE_RECIPE, soft):
        recipe = recipes.override(base, method_fields(name))
        assert (recipe.distill.mode, recipe.distilled, recipe.model.prediction) == (mode, token, prediction)
        if mode != "none":
            assert recipe.distill.alpha == (0.1 if mode == "soft" else 0.5)
        if mode == "soft":
            assert recipe.distill.tau == 3.0
