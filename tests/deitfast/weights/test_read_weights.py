"""Published layouts in and out: what is read gives the logits of the program that wrote it."""

from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from deitfast.config.recipe import ModelSpec
from deitfast.models.vit import build_model, joint
from deitfast.run_folder import RunFolder
from deitfast.weights.adapt import adapt_pretrained, load_weights, resize_positions
from deitfast.weights.export import export
from deitfast.weights.huggingface import to_timm
from deitfast.weights.load import load_model
from deitfast.weights.read import read_weights
from pipelines.errors import UserError
from tests.helpers.published_weights import hugging_face, randomized, timm_model
from tests.helpers.small_runs import run, tiny_recipe

CPU = torch.device("cpu")
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def deit(size=32, patch=8, classes=7, distilled=False, arch="deit_ti"):
    spec = ModelSpec(arch=arch, patch=patch, drop_path=0)
    return build_model(spec, size=size, classes=classes, distilled=distilled)


def assert_logits(file: Path, expected: torch.Tensor, arch=None) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            joint(load_model(file, CPU, arch=arch).model(PIXELS)), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "layout", ["official", "reference_run", "timm.pth", "timm_run", "wrapped", "safetensors", "half"]
)
def test_official_and_timm_files_give_their_networks_logits(tmp_path: Path, layout: str, distilled: bool) -> None:
    theirs = timm_model(distilled=distilled)
    state, file = theirs.state_dict(), tmp_path / "weights.pth"
    match layout:
        case "official":
            torch.save({"model": state}, file)
        case "reference_run":
            torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": Namespace(lr=5e-4)}, file)
        case "timm.pth":
            torch.save(state, file)
        case "timm_run":
            torch.save({"state_dict": state, "arch": "deit", "args": Namespace(lr=1)}, file)
        case "wrapped":
            torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, file)
        case "safetensors":
            save_file(state, file := tmp_path / "model.safetensors")
        case "half":
            halves = {name: value.half() for name, value in state.items()}
            save_file(halves, file := tmp_path / "model.safetensors")
            theirs.load_state_dict(halves)
    trained = load_model(file, CPU, arch="deit_ti")
    assert (trained.recipe.augment.size, trained.recipe.model.patch, trained.num_classes) == (32, 8, 7)
    assert trained.recipe.distilled == distilled
    with torch.no_grad():
        torch.testing.assert_close(joint(trained.model(PIXELS)), theirs(PIXELS), rtol=1e-5, atol=1e-5)


def test_averaged_weights_are_taken_where_asked(tmp_path: Path) -> None:
    plain, average = timm_model().state_dict(), randomized(timm_model(), 9).state_dict()
    torch.save({"model": plain, "model_ema": average}, tmp_path / "run.pth")
    assert torch.equal(read_weights(tmp_path / "run.pth").tensors["head.weight"], plain["head.weight"])
    assert torch.equal(read_weights(tmp_path / "run.pth", ema=True).tensors["head.weight"], average["head.weight"])
    torch.save({"model": plain}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="no averaged weights"):
        read_weights(tmp_path / "plain.pth", ema=True)


@pytest.mark.parametrize("kind", ["with_teacher", "deit", "vit"])
@pytest.mark.parametrize("form", ["save_pretrained", "in_memory"])
def test_hugging_faces_files_give_its_logits(tmp_path: Path, kind: str, form: str) -> None:
    theirs = hugging_face(kind)
    if form == "save_pretrained":
        theirs.save_pretrained(tmp_path)
        file = tmp_path
    else:
        torch.save(theirs.state_dict(), file := tmp_path / "state.pth")
    with torch.no_grad():
        assert_logits(file, theirs(PIXELS).logits)
    assert read_weights(file).kind == "Hugging Face"


def assert_hugging_faces_gradients(size_name: str, size: int, patch: int) -> None:
    theirs = hugging_face("with_teacher", size_name, size=size, patch=patch)
    ours = deit(size, patch, distilled=True, arch=f"deit_{size_name}").eval()
    ours.load_state_dict(to_timm(theirs.state_dict()))
    pixels = torch.randn(2, 3, size, size)
    answer, heads = theirs(pixels), ours(pixels)
    for head, other in zip(heads, (answer.cls_logits, answer.distillation_logits), strict=True):
        torch.testing.assert_close(head, other, rtol=1e-5, atol=1e-5)
    weights = torch.randn(2, 2, 7)
    (heads[0] * weights[0] + heads[1] * weights[1]).sum().backward()
    (answer.cls_logits * weights[0] + answer.distillation_logits * weights[1]).sum().backward()
    expected = to_timm({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        scale = max(1, expected[name].abs().max().item())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (384, 16), (32, 4)])
def test_outputs_and_gradients_are_hugging_faces(size: int, patch: int) -> None:
    assert_hugging_faces_gradients("ti", size, patch)


@pytest.mark.slow
@pytest.mark.parametrize("size_name", ["s", "b"])
@pytest.mark.parametrize(("size", "patch"), [(224, 16), (384, 16), (32, 4)])
def test_outputs_and_gradients_are_hugging_faces_for_larger_models(size_name: str, size: int, patch: int) -> None:
    assert_hugging_faces_gradients(size_name, size, patch)


def test_torchvisions_files_give_their_networks_logits(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    with torch.no_grad():
        assert_logits(tmp_path / "resnet18.pth", theirs(PIXELS), "resnet18")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match="does not tell which network"):
        load_model(tmp_path / "resnet34.pth", CPU)


def test_a_longer_network_of_resnet20s_widths_is_not_taken_for_it(tmp_path: Path) -> None:
    state = build_model(ModelSpec(arch="resnet20"), size=32, classes=7, distilled=False).state_dict()
    torch.save(state, tmp_path / "resnet20.pth")
    assert load_model(tmp_path / "resnet20.pth", CPU).recipe.model.arch == "resnet20"
    torch.save(state | {"layer1.3.conv1.weight": torch.zeros(16, 16, 3, 3)}, tmp_path / "resnet32.pth")
    with pytest.raises(UserError, match="does not tell which network"):
        load_model(tmp_path / "resnet32.pth", CPU)


def without(state: dict, *names: str) -> dict:
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: without(s, "norm.bias", "blocks.3.attn.qkv.weight"), "missing: blocks.3.attn.qkv.weight, norm.bias"),
        (lambda s: s | {"blocks.0.attn.extra": torch.ones(192)}, "unexpected: blocks.0.attn.extra"),
        (lambda s: s | {"reg_token": torch.ones(1, 4, 192)}, "register tokens"),
        (lambda s: s | {"fc_norm.weight": torch.ones(192)}, "global average pooling"),
        (lambda s: without(s, "cls_token"), "no class token"),
        (lambda s: without(s, *(name for name in s if name.startswith("blocks.11."))), "11 blocks"),
        (lambda s: s | {"head.weight": s["head.weight"] * float("nan")}, "head.weight (1,344 of 1,344)"),
        (lambda s: without(s, "head.weight", "head.bias"), "head.weight is missing"),
        (lambda s: {f"{i}.{name}": value for i in "ab" for name, value in s.items()}, "several networks"),
        (lambda s: s | {"norm.bias": torch.ones(3)}, "norm.bias 3 instead of 192"),
        (
            lambda s: {name.replace("patch_embed", "stem"): value for name, value in s.items()},
            "blocks.0.attn.proj.bias",
        ),
        (lambda s: s | {"pos_embed": torch.ones(1, 15, 192)}, "not square"),
        (lambda s: {}, "no tensors"),
    ],
)
def test_files_of_other_networks_are_refused_by_name(tmp_path: Path, change, says: str) -> None:
    torch.save({"model": change(timm_model().state_dict())}, tmp_path / "weights.pth")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "weights.pth", CPU, arch="deit_ti")
    assert says in str(caught.value)
    assert "weights.pth" in str(caught.value) or "square" in says


def test_other_networks_names_settings_and_sizes_are_refused(tmp_path: Path) -> None:
    torch.save({"model": timm_model(distilled=True).state_dict()}, file := tmp_path / "weights.pth")
    with pytest.raises(UserError, match="is not a deit_s"):
        load_model(file, CPU, arch="deit_s")
    with pytest.raises(UserError, match="no distillation token"):
        load_model(file, CPU, arch="vit_ti")
    with pytest.raises(UserError, match="--set changes the network"):
        load_model(file, CPU, changes={"augment.size": 64})
    with pytest.raises(UserError, match=r"shapes: pos_embed 1 x 18 x 192 instead of 1 x 66 x 192"):
        load_weights(deit(64, distilled=True), read_weights(file))
    assert load_model(file, CPU, changes={"augment.mean": [0.5, 0.5, 0.5]}).recipe.augment.mean == (0.5, 0.5, 0.5)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_would_run_code_or_are_cut_short_are_refused(tmp_path: Path) -> None:
    torch.save({"model": timm_model().state_dict(), "extra": Trap(tmp_path / "sprung")}, file := tmp_path / "trap.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(file)
    assert not (tmp_path / "sprung").exists()
    save_file(timm_model().state_dict(), whole := tmp_path / "whole.safetensors")
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(whole.read_bytes()[:5000])
        with pytest.raises(UserError, match="cut"):
            read_weights(tmp_path / name)
    for missing in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(UserError, match=r"(weights file not found|there are no weights)"):
            read_weights(missing)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (2, 8), (8, 8)])
@pytest.mark.parametrize("prefix", [1, 2])
def test_positions_are_resized_as_timm_does_without_antialiasing(old: int, new: int, prefix: int) -> None:
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, prefix + old * old, 12)
    expected = resample_abs_pos_embed(positions, [new, new], num_prefix_tokens=prefix, antialias=False)
    resized = resize_positions(positions, prefix, new)
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
    assert torch.equal(resized[:, :prefix], positions[:, :prefix])


def test_positions_are_resized_as_the_reference_writes_it() -> None:
    """TrainState (y, x) of the file is row prefix + y n + x; interpolation keeps y a row and x a column."""
    prefix, old, new = 2, 14, 24
    positions = torch.randn(1, prefix + old * old, 12)
    resized = resize_positions(positions, prefix, new)
    for channel in (0, 7):
        image = positions[0, prefix:, channel].view(1, 1, old, old)
        expected = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)[0, 0]
        for y, x in ((0, 23), (23, 0), (5, 11)):
            torch.testing.assert_close(resized[0, prefix + y * new + x, channel], expected[y, x], rtol=0, atol=1e-6)


def file_of(tmp_path: Path, model: torch.nn.Module, **entries) -> Path:
    torch.save({"model": model.state_dict(), **entries}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_fine_tuning_keeps_what_fits_and_draws_the_rest(tmp_path: Path) -> None:
    theirs = timm_model(distilled=True)
    weights = read_weights(file_of(tmp_path, theirs))
    same = deit(64, distilled=True)
    fitted = adapt_pretrained(same, weights, tuple("abcdefg"), assume_order=True)
    assert (fitted.new, fitted.positions) == ((), (4, 8))
    assert torch.equal(same.head_dist.weight, theirs.head_dist.weight)
    torch.testing.assert_close(same.pos_embed[:, :2], theirs.pos_embed[:, :2])
    unknown = deit(distilled=True)
    drawn = unknown.head.weight.clone()
    assert adapt_pretrained(unknown, weights, tuple("abcdefg")).new == ("head", "head_dist")  # of which classes?
    assert torch.equal(unknown.head.weight, drawn)
    other = deit(classes=11, distilled=True)
    drawn = other.head.weight.clone()
    fitted = adapt_pretrained(other, weights, tuple("abcdefghijk"))
    assert (fitted.new, fitted.positions) == (("head", "head_dist"), (4, 4))
    assert torch.equal(other.head.weight, drawn)
    assert torch.equal(other.blocks[11].attn.qkv.weight, theirs.blocks[11].attn.qkv.weight)
    with pytest.raises(UserError, match="unexpected: dist_token"):
        adapt_pretrained(deit(), weights, tuple("abcdefg"))
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight 192 x 3 x 8 x 8 instead of 192 x 3 x 4 x 4"):
        adapt_pretrained(deit(patch=4, distilled=True), weights, tuple("abcdefg"))


def test_a_token_without_a_head_gets_one_in_fine_tuning(tmp_path: Path) -> None:
    hugging_face("deit").save_pretrained(tmp_path)
    model = deit(distilled=True)
    assert adapt_pretrained(model, read_weights(tmp_path), tuple("abcdefg"), assume_order=True).new == ("head_dist",)


@pytest.fixture(scope="module")
def student(tiny_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    run(tiny_small, out, tiny_recipe("train.epochs=1", "model.token=on", "model.patch=8", "model.depth=12"))
    return out


@pytest.mark.parametrize("ema", [False, True])
def test_exports_load_into_timm(student: Path, tmp_path: Path, ema: bool) -> None:
    trained = load_model(student, CPU, ema=ema)
    with torch.no_grad():
        expected = joint(trained.model(PIXELS))
    (file,) = export(trained, tmp_path / "deit.safetensors", "timm")
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, num_classes=10).eval()
    with safe_open(file, "pt") as opened:
        theirs.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    folder = tmp_path / "folder"
    assert [path.name for path in export(trained, folder, "timm")] == ["model.safetensors", "config.json", "README.md"]
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(PIXELS), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole(PIXELS), expected, rtol=1e-5, atol=1e-5)
    fed = timm.data.resolve_model_data_config(whole)
    assert (fed["input_size"], [*fed["mean"]], fed["crop_pct"]) == ((3, 32, 32), [0.4914, 0.4822, 0.4465], 1.0)
    assert whole.pretrained_cfg["label_names"] == list("abcdefghij")
    assert not list(tmp_path.rglob("*.partial"))


def test_exports_and_runs_read_back_with_classes_and_normalization(student: Path, tmp_path: Path) -> None:
    trained = load_model(student, CPU)
    (file,) = export(trained, tmp_path / "deit.safetensors", "timm")
    for source in (file, student):
        back = load_model(source, CPU)
        assert back.classes == tuple("abcdefghij")
        assert back.recipe.augment.mean == trained.recipe.augment.mean
        assert read_weights(source).kind == "deitfast"
        with torch.no_grad():
            assert torch.equal(joint(back.model(PIXELS)), joint(trained.model(PIXELS)))
    lone = tmp_path / "lone.pt"
    lone.write_bytes(RunFolder(student).checkpoint.read_bytes())
    assert read_weights(lone).classes == ()
    averages = load_model(student, CPU, ema=True).model.state_dict()
    assert torch.equal(read_weights(lone, ema=True).tensors["head.weight"], averages["head.weight"])


def test_the_384_models_are_timms_by_name(tmp_path: Path) -> None:
    from deitfast.config import recipe as recipes
    from deitfast.weights.export import timm_config
    from deitfast.weights.load import TrainedModel

    recipe = recipes.override(recipes.load("deit_b_384_finetune"), {"model.token": "on"})
    with torch.device("meta"):
        ours = deit(384, 16, 1000, distilled=True, arch="deit_b")
        config = timm_config(TrainedModel(ours, recipe, (), 1000, 1))
        assert config["architecture"] == "deit_base_distilled_patch16_384"
        theirs = timm.create_model(config["architecture"])
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
