"""Exports: the other program loads the folder, with the same logits, the same preprocessing and the same names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from deitfast.config.recipe import ModelSpec
from deitfast.models.vit import build_model, joint
from deitfast.weights.card import model_card
from deitfast.weights.export import TIMM_REGNETS, check_format, export, timm_config
from deitfast.weights.hf_config import hf_config, hf_processor
from deitfast.weights.layouts import timm_regnet
from deitfast.weights.load import TrainedModel, load_model
from pipelines.errors import UserError
from tests.helpers.published_weights import randomized
from tests.helpers.sample_images import drawn
from tests.helpers.small_runs import run, tiny_recipe

CPU = torch.device("cpu")
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FED = ("augment.mean=[0.5, 0.4, 0.3]", "augment.std=[0.2, 0.3, 0.4]", "augment.crop=resized", "augment.eval_crop=0.8")


def trained(*settings: str, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> TrainedModel:
    recipe = tiny_recipe("model.patch=8", *settings)
    model = randomized(
        build_model(recipe.model, size=recipe.augment.size, classes=3, distilled=recipe.distilled)
    ).requires_grad_(False)
    return TrainedModel(model, recipe, classes, 3)


def logits(model: torch.nn.Module, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    with torch.no_grad():
        found = model(pixels)
    return joint(found) if isinstance(found, tuple) else getattr(found, "logits", found)


@pytest.mark.parametrize("token", ["on", "off", "headless"])
def test_transformers_loads_what_is_exported(tmp_path: Path, token: str) -> None:
    ours = trained("model.token=on" if token != "off" else "model.token=off", *FED)
    if token == "headless":
        ours.model.head_dist = None
    files = export(ours, tmp_path, "hf")
    assert [file.name for file in files] == [
        "model.safetensors", "config.json", "preprocessor_config.json", "README.md",
    ]  # fmt: skip
    theirs, loading = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(theirs.eval()), logits(ours.model), rtol=1e-5, atol=2e-5)
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    back = load_model(tmp_path, CPU)
    assert back.classes == ours.classes
    torch.testing.assert_close(logits(back.model), logits(ours.model), rtol=1e-6, atol=1e-6)
    assert "library_name: transformers" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("fed", [FED, (*FED, "augment.eval_resize=squash", "augment.eval_interpolation=bilinear")])
def test_transformers_image_processor_is_evaluations(tmp_path: Path, fed: tuple[str, ...]) -> None:
    ours = trained(*fed)
    export(ours, tmp_path, "hf")
    image = Image.fromarray(drawn(60, 90, 1))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    augment = load_model(tmp_path, CPU).recipe.augment
    wanted = ("size", "mean", "std", "eval_crop", "eval_resize", "eval_interpolation")
    assert all(getattr(augment, name) == getattr(ours.recipe.augment, name) for name in wanted)
    sides = (40, 40) if augment.eval_resize == "squash" else (60, 40)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    left = (sides[0] - 32) // 2
    seen = image.resize(sides, filters[augment.eval_interpolation]).crop((left, 4, left + 32, 36))
    expected = (np.asarray(seen) / 255 - augment.mean) / augment.std
    difference = np.abs(theirs.permute(1, 2, 0).numpy() - expected)
    assert difference.max() < 0.05  # levels of 255 that its resize rounds otherwise


@pytest.mark.parametrize(("arch", "name"), [("resnet18", "resnet18"), ("regnet_y_16gf", "regnet_y_16gf")])
def test_cnns_are_torchvisions(tmp_path: Path, arch: str, name: str) -> None:
    ours = trained(f"model.arch={arch}", "augment.size=64", *FED)
    export(ours, tmp_path, "")
    pixels = torch.randn(1, 3, 64, 64)
    from safetensors.torch import load_file

    theirs = torchvision.models.get_model(name, num_classes=3).eval()
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"))
    expected = logits(ours.model, pixels)
    torch.testing.assert_close(logits(theirs, pixels), expected)
    back = load_model(tmp_path, CPU)
    assert (back.classes, back.recipe.augment.mean, back.recipe.model.arch) == (ours.classes, (0.5, 0.4, 0.3), arch)
    torch.testing.assert_close(logits(back.model, pixels), expected)
    if arch == "resnet18":
        timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(logits(timms, pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "regnet_y_4gf"])
def test_cnns_are_timms_where_that_is_asked_for(tmp_path: Path, arch: str) -> None:
    ours, pixels = trained(f"model.arch={arch}", "augment.size=64", *FED), torch.randn(2, 3, 64, 64)
    export(ours, tmp_path, "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(logits(theirs, pixels), logits(ours.model, pixels), rtol=1e-4, atol=1e-4)
    assert theirs.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    back = load_model(tmp_path, CPU)
    assert (back.classes, back.recipe.model.arch) == (ours.classes, arch)
    torch.testing.assert_close(logits(back.model, pixels), logits(ours.model, pixels))
    with pytest.raises(UserError, match="with the stem for inputs below 64 px has no timm layout"):
        export(trained(f"model.arch={arch}", "augment.size=32"), tmp_path / "small", "timm")


def test_resnet20_comes_back_and_has_no_layout_of_timms(tmp_path: Path) -> None:
    ours, pixels = trained("model.arch=resnet20", "augment.size=32", *FED), torch.randn(2, 3, 32, 32)
    export(ours, tmp_path / "x", "")
    back = load_model(tmp_path / "x", CPU)
    assert (back.classes, back.recipe.model.arch, back.recipe.augment.size) == (ours.classes, "resnet20", 32)
    torch.testing.assert_close(logits(back.model, pixels), logits(ours.model, pixels))
    with pytest.raises(UserError, match="resnet20 has no timm layout"):
        export(trained("model.arch=resnet20", "augment.size=64"), tmp_path / "large", "timm")


@pytest.mark.parametrize(("arch", "name"), TIMM_REGNETS.items())
def test_timms_regnets_have_the_names_and_shapes_of_ours(arch: str, name: str) -> None:
    with torch.device("meta"):
        ours = build_model(ModelSpec(arch=arch), size=224, classes=1000, distilled=False)
        theirs = timm.create_model(name)
    found = {timm_regnet(key): value.shape for key, value in ours.state_dict().items()}
    assert found == {key: value.shape for key, value in theirs.state_dict().items()}


def test_timms_configuration_is_evaluations(tmp_path: Path) -> None:
    ours = trained("model.token=on", *FED, "augment.eval_interpolation=bilinear")
    export(ours, tmp_path, "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    fed = timm.data.resolve_model_data_config(theirs)
    assert (tuple(fed["mean"]), tuple(fed["std"])) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (fed["interpolation"], fed["crop_pct"], fed["input_size"]) == ("bilinear", 0.8, (3, 32, 32))
    assert theirs.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    torch.testing.assert_close(logits(theirs), logits(ours.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["timm", "hf", "one file"])
def test_a_network_of_another_shape_is_read_as_it_was_written(tmp_path: Path, form: str) -> None:
    shape = ("model.width=96", "model.depth=3", "model.heads=2", "model.mlp_ratio=2.5")
    ours = trained("model.token=on", *shape, *FED)
    out = tmp_path / "model.safetensors" if form == "one file" else tmp_path
    export(ours, out, "" if form == "one file" else form)
    back = load_model(out, CPU)
    assert (back.recipe.model.arch, back.recipe.model.shape) == ("deit_ti", ours.recipe.model.shape)
    torch.testing.assert_close(logits(back.model), logits(ours.model), rtol=1e-6, atol=1e-6)
    if form == "timm":
        theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        torch.testing.assert_close(logits(theirs.eval()), logits(ours.model), rtol=1e-5, atol=1e-5)
    if form == "hf":
        theirs = AutoModelForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(theirs.eval()), logits(ours.model), rtol=1e-5, atol=2e-5)


def test_the_card_tells_what_the_run_was(tiny_small: Path, tmp_path: Path) -> None:
    run(tiny_small, tmp_path / "run", tiny_recipe("train.epochs=1"))
    out = tmp_path / "out"
    export(load_model(tmp_path / "run", CPU, which="last"), out, "hf")
    card = (out / "README.md").read_text()
    assert "deit_ti_cifar10" in card
    assert "`test`" in card  # the command line
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert f"{row['val']['class']['top1']:.2%}" in card
    assert "10 classes" in card
    tops = {"val": 0.1111, "val_ema": 0.2222}, {"val": 0.3333, "val_ema": 0.4444}  # the run went on: not of its weights
    rows = [
        {**row, "epoch": epoch, **{key: {"class": {"top1": top1}} for key, top1 in each.items()}}
        for epoch, each in enumerate(tops, start=1)
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for ema, shown in ((False, "11.11%"), (True, "22.22%")):
        card = model_card(load_model(tmp_path / "run", CPU, which="last", ema=ema), "hf")
        assert re.findall(r"\d\d\.\d\d%", card) == [shown]


def test_configurations_tell_an_image_that_is_not_cropped_and_the_norms_own_epsilon() -> None:
    ours = trained("model.token=on", "augment.crop=padded", "augment.eval_crop=0.5")
    ours.model.norm.eps = 1e-12  # pyright: ignore
    assert timm_config(ours)["pretrained_cfg"]["crop_pct"] == 1
    assert hf_processor(ours)["size"] == {"shortest_edge": 32}
    assert hf_config(ours)["layer_norm_eps"] == 1e-12


def test_formats_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no torchvision layout"):
        export(trained(), tmp_path / "x", "torchvision")
    with pytest.raises(UserError, match="has no hf layout"):
        export(trained("model.arch=resnet18"), tmp_path / "x", "hf")
    for name, form in (("x.onnx", "timm"), ("x.safetensors", "onnx"), ("x.safetensors", "hf")):
        with pytest.raises(UserError, match="would not be what its name says"):
            check_format(tmp_path / name, form)
    with pytest.raises(UserError, match="there is no format tflite"):
        check_format(tmp_path / "x", "tflite")
    assert not list(tmp_path.iterdir())


def test_the_same_model_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = """
import sys, torch
from pathlib import Path
from deitfast.weights.export import safetensors_bytes
tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
Path(sys.argv[1]).write_bytes(safetensors_bytes(tensors, {"format": "pt", "x": "1", "y": "2"}))
"""
    for name in "ab":
        subprocess.run([sys.executable, "-c", script, tmp_path / name], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    from safetensors import safe_open

    with safe_open(tmp_path / "a", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "x": "1", "y": "2"}
        assert torch.equal(opened.get_tensor("b"), torch.ones(3))
