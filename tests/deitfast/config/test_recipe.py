"""Recipes: what is refused, and that what is written is what is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from pipelines.errors import UserError


@pytest.mark.parametrize("name", recipes.names())
def test_built_in_recipes_load_and_say_what_to_expect(name: str) -> None:
    assert recipes.load(name).name == name
    assert "deitfast train" in recipes.head(name)


def test_the_384_recipe_is_the_papers_fine_tuning() -> None:
    found = recipes.differences(recipes.load("deit_b_imagenet"), recipes.load("deit_b_384_finetune"))
    assert {key: now for key, (_, now) in found.items()} == {
        "name": "deit_b_384_finetune",
        "augment.size": 384,
        "optim.lr": 5e-6,
        "optim.weight_decay": 1e-8,
        "schedule.shape": "constant",
        "train.epochs": 30,
        "train.batch": 512,
    }


@pytest.mark.parametrize("size", ["ti", "s", "b"])
def test_a_vit_recipe_is_the_deit_recipe_without_a_token(size: str) -> None:
    found = recipes.differences(recipes.load(f"deit_{size}_imagenet"), recipes.load(f"vit_{size}_imagenet"))
    assert set(found) == {"name", "model.arch"}


def test_a_file_holds_what_differs_from_the_recipe_it_extends(tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "deit_ti_cifar10"\nname = "mine"\n[augment]\nerasing = 0.0\n[distill]\nmode = "hard"')
    found = recipes.differences(recipes.load("deit_ti_cifar10"), recipes.load(str(file)))
    assert {key: now for key, (_, now) in found.items()} == {
        "name": "mine",
        "augment.erasing": 0.0,
        "distill.mode": "hard",
    }
    assert "extends" not in recipes.dump(recipes.load(str(file)))
    for base in ("deit_s_imagenet", "nowhere", "mine", 3):
        file.write_text(f"extends = {base!r}")
        with pytest.raises(UserError, match=f"cannot extend {base}") as caught:
            recipes.load(str(file))
        assert "deit_ti_imagenet" in caught.value.expected
    file.write_text('extends = "deit_ti_cifar10"\n[augment]\nsise = 32')
    with pytest.raises(UserError, match=r"unknown field augment\.sise"):
        recipes.load(str(file))


@given(size=st.sampled_from([32, 64, 224]), erasing=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_dump_reads_back_to_an_equal_recipe(tmp_path_factory, size: int, erasing: float, seed: int) -> None:
    recipe = recipes.override(Recipe(), {"augment.size": size, "augment.erasing": erasing, "train.seed": seed})
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(recipes.dump(recipe))
    assert recipes.load(str(file)) == recipe
    assert recipes.load(str(file)).digest == recipe.digest


@pytest.mark.parametrize("key", recipes.flatten(Recipe()))
def test_every_field_is_in_the_digest_and_among_the_differences(key: str) -> None:
    section, _, field = key.rpartition(".")
    base, other = Recipe(), Recipe()
    object.__setattr__(getattr(other, section) if section else other, field, "another")  # past the checks of values
    assert other.digest != base.digest
    assert set(recipes.differences(base, other)) == {key}


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("augment.sizes=3", "unknown field augment.sizes (did you mean augment.size?)"),
        ("nonsense.size=3", "unknown field nonsense.size"),
        ("augment.size=big", "augment.size"),
        ("augment.size=100", "must be a multiple of model.patch 16"),
        ("augment.scale=[0.9, 0.1]", "augment.scale must be two numbers in rising order"),
        ("augment.std=[0.2, 0.0, 0.2]", "augment.std"),
        ("train.batch=100", "must be a multiple of augment.mix_group 64"),
        ("train.accumulate=3", "must be a multiple of train.accumulate 3"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=true", "train.epochs must not be true"),
        ("augment.mixup=1e20", "augment.mixup must be less than or equal to 1000"),
        ("augment.mixup=nan", "augment.mixup must be a finite number"),
        ("optim.betas=[0.9, 1.0]", "optim.betas[1]"),
        ("model.arch=alexnet", "model.arch"),
        ("augment=3", "augment is a section"),
        ("augment.size", "has no value"),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.override(Recipe(), recipes.parse_settings([setting]))
    assert named in str(caught.value)


def test_all_mistakes_are_told_at_once_and_none_that_a_bad_field_may_have_caused() -> None:
    settings = ["train.epcohs=3", "augment.size=100", "train.batch=many", "optim.lr=inf", "model.token=maybe"]
    with pytest.raises(UserError) as caught:
        recipes.override(Recipe(), recipes.parse_settings(settings))
    told = caught.value.problem.splitlines()
    assert told[0] == "invalid recipe:"
    named = ("train.epcohs", "augment.size 100", "train.batch", "optim.lr", "model.token")
    assert all(any(name in line for line in told) for name in named)
    assert len(told) == 1 + len(named)  # nothing on mix_group and accumulate: the batch is not known


@pytest.mark.parametrize(
    "key", [key for key, value in recipes.flatten(Recipe()).items() if type(value) in (int, float)]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, -1e300])
def test_every_number_has_finite_bounds(key: str, value: float) -> None:
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        recipes.override(Recipe(), {key: value})


def test_a_field_of_text_takes_it_as_it_stands() -> None:
    assert recipes.parse_settings(["model.weights=5", "name=true", "train.batch=5", "train.seed = 7"]) == {
        "model.weights": "5",
        "name": "true",
        "train.batch": 5,
        "train.seed": 7,
    }


def test_distillation_needs_a_head_to_listen() -> None:
    with pytest.raises(UserError, match="no distillation token"):
        recipes.override(Recipe(), {"model.arch": "vit_ti", "distill.mode": "hard"})
    through_class = recipes.override(
        Recipe(), {"model.arch": "vit_ti", "distill.mode": "hard", "distill.head": "class"}
    )
    assert not through_class.distilled
    with pytest.raises(UserError, match=r'set distill.head = "class"'):
        recipes.override(recipes.load("resnet18_cifar10"), {"distill.mode": "hard"})
    assert not recipes.override(
        recipes.load("resnet18_cifar10"), {"distill.mode": "hard", "distill.head": "class"}
    ).distilled


@pytest.mark.parametrize("prediction", ["distillation", "joint"])
def test_a_prediction_needs_its_head(prediction: str) -> None:
    with pytest.raises(UserError, match=r"model\.prediction .* requires a distillation token"):
        recipes.override(Recipe(), {"model.prediction": prediction})
    for token in ({"model.token": "on"}, {"distill.mode": "hard"}):
        assert recipes.override(Recipe(), {"model.prediction": prediction, **token}).distilled


def test_files_with_errors_are_refused_by_name(tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[augment\nsize = 3")
    with pytest.raises(UserError, match="is not TOML"):
        recipes.load(str(file))
    file.write_text("[augment]\nsise = 32")
    with pytest.raises(UserError, match=r"unknown field augment\.sise"):
        recipes.load(str(file))
    with pytest.raises(UserError, match="recipe not found: missing"):
        recipes.load("missing")


@pytest.mark.parametrize(
    ("arch", "dataset", "side", "expected"),
    [
        ("deit_ti", "imagenet", 375, "deit_ti_imagenet"),
        ("deit_b", "folder", 500, "deit_ti_imagenet"),
        ("vit_s", "cifar100", 32, "deit_ti_cifar10"),
        ("deit_ti", "cifar100", 32, "deit_ti_cifar100"),
        ("deit_s", "imagenet", 375, "deit_s_imagenet"),
        ("regnet_y_16gf", "imagenet", 375, "regnet_y_16gf_imagenet"),
        ("deit_ti", "demo", 48, "deit_ti_demo"),
        ("resnet50", "folder", 64, "resnet18_cifar10"),
    ],
)
def test_a_recipe_is_chosen_for_network_and_data(arch, dataset: str, side: int, expected: str) -> None:
    chosen = recipes.choose(arch, dataset, side)
    assert (chosen.name, chosen.model.arch) == (expected, arch)
