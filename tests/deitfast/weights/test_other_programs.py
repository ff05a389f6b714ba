"""Weights as other programs publish them: their logits, their classes and their preprocessing, or a refusal by name."""

import json
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch.optim.swa_utils import AveragedModel
from transformers import DeiTConfig, DeiTModel, ViTConfig, ViTForImageClassification, ViTModel
from transformers.image_utils import PILImageResampling

from deitfast.models.vit import joint
from deitfast.weights.adapt import adapt_pretrained
from deitfast.weights.load import describe_input, load_model
from deitfast.weights.read import read_weights
from pipelines.errors import UserError
from tests.deitfast.weights.test_read_weights import CPU, PIXELS, deit
from tests.helpers.published_weights import hugging_face, randomized, timm_model

BLOCK, CHECKPOINTED = r"(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module."
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 7}


def assert_same_logits(path: Path, theirs: torch.nn.Module, pixels: torch.Tensor = PIXELS, **options) -> None:
    with torch.no_grad():
        expected, found = theirs(pixels), joint(load_model(path, CPU, **options).model(pixels))
    torch.testing.assert_close(found, getattr(expected, "logits", expected), rtol=1e-5, atol=2e-5)


# --- wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "hyper_parameters": {"lr": 1}},
        lambda s: {"state_dict": {f"net.model.module.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(3)}},
        lambda s: {"model": {"state_dict": OrderedDict(s)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        lambda s: {f"backbone.{k}": v for k, v in s.items()},
        lambda s: {"model_ema": {"module": s}},
        lambda s: {f"model.{k.replace('blocks.0.', 'blocks.0._orig_mod.')}": v for k, v in s.items()},
        lambda s: {f"_fsdp_wrapped_module.{re.sub(BLOCK, CHECKPOINTED, k)}": v for k, v in s.items()},
        lambda s: {
            "teacher": {f"backbone.{k}": v * 0 for k, v in s.items()},
            "student": {f"module.{k}": v for k, v in s.items()},
        },
    ],
)
def test_wrappers_in_any_nesting_are_taken_off(tmp_path: Path, wrap) -> None:
    theirs = timm_model()
    torch.save(wrap(theirs.state_dict()), tmp_path / "wrapped.pth")
    assert_same_logits(tmp_path / "wrapped.pth", theirs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda plain, average: {"state_dict": plain, "state_dict_ema": average},
        lambda plain, average: {"model": plain, "ema": {"module": average}},
        lambda plain, average: (
            {f"model.{k}": v for k, v in plain.items()} | {f"model_ema.{k}": v for k, v in average.items()}
        ),
        lambda plain, average: {
            "model": plain,
            "averaged": {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in average.items()},
        },
        lambda plain, average: {"model": plain, "swa": AveragedModelState(average)},
        lambda plain, average: {"ema_state_dict": {"online_model": plain, "ema_model": average}},
    ],
)
def test_plain_and_averaged_weights_are_told_apart(tmp_path: Path, wrap) -> None:
    plain, average = timm_model(), randomized(timm_model(), 9)
    torch.save(wrap(plain.state_dict(), average.state_dict()), tmp_path / "run.pth")
    assert_same_logits(tmp_path / "run.pth", plain)
    assert_same_logits(tmp_path / "run.pth", average, ema=True)


def AveragedModelState(state: dict) -> dict:  # noqa: N802
    """What torch's own average saves."""
    model = timm_model()
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


# --- backbones without a head


@pytest.mark.parametrize("kind", ["timm", "dino", "deit", "vit"])
def test_backbones_without_a_head_are_fine_tuned_and_not_evaluated(tmp_path: Path, kind: str) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 32, "patch_size": 8}
    match kind:
        case "timm":
            theirs = randomized(timm.create_model("deit_tiny_patch16_224", **{**SMALL, "num_classes": 0}))
            torch.save(theirs.state_dict(), path := tmp_path / "headless.pth")
        case "dino":
            theirs = randomized(timm.create_model("deit_tiny_patch16_224", **{**SMALL, "num_classes": 0}))
            student = {f"module.backbone.{k}": v for k, v in theirs.state_dict().items()}
            projection = {"module.head.mlp.0.weight": torch.ones(4, 192)}
            torch.save({"student": student | projection, "epoch": 3}, path := tmp_path / "dino.pth")
        case "deit":
            theirs, path = randomized(DeiTModel(DeiTConfig(**shape))), tmp_path
            theirs.save_pretrained(path)
        case _:
            theirs, path = randomized(ViTModel(ViTConfig(**shape))), tmp_path
            theirs.save_pretrained(path)
    with pytest.raises(UserError, match=r"head\.weight is missing"):
        load_model(path, CPU)
    ours = deit(distilled=kind == "deit")
    report = adapt_pretrained(ours, read_weights(path), tuple("abcdefg"))
    assert report.new[0] == "head"
    tokens = {}
    ours.norm.register_forward_hook(lambda *call: tokens.setdefault("ours", call[2]))
    with torch.no_grad():
        ours.eval()(PIXELS)
        if kind in ("timm", "dino"):
            expected = theirs.forward_features(PIXELS)[:, :1]
        else:
            for module in ours.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.eps = 1e-12
            tokens.clear()
            ours(PIXELS)
            expected = theirs(PIXELS).last_hidden_state[:, : 2 if kind == "deit" else 1]
    torch.testing.assert_close(tokens["ours"], expected, rtol=1e-4, atol=1e-4)


# --- DeiT III, DINOv2's parts, and what is built otherwise


@pytest.mark.parametrize("names", ["timm", "official"])
def test_deit_3_gives_its_logits(tmp_path: Path, names: str) -> None:
    theirs = randomized(timm.create_model("deit3_small_patch16_224", img_size=32, patch_size=8, num_classes=7))
    state = theirs.state_dict()
    assert state["pos_embed"].shape[1] == 16
    if names == "official":
        state = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}
    torch.save({"model": state}, tmp_path / "deit3.pth")
    assert_same_logits(tmp_path / "deit3.pth", theirs)
    assert read_weights(tmp_path / "deit3.pth").kind == "DeiT III"
    medium = randomized(timm.create_model("deit3_medium_patch16_224", img_size=32, patch_size=8, num_classes=7))
    torch.save({"model": medium.state_dict()}, tmp_path / "medium.pth")
    assert_same_logits(tmp_path / "medium.pth", medium)
    assert load_model(tmp_path / "medium.pth", CPU).recipe.model.width == 512


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_small_patch14_reg4_dinov2", "register tokens"),
        ("beit_base_patch16_224", "BEiT"),
        ("vit_medium_patch16_gap_240", "no class token"),
        ("deit3_large_patch16_224", "24 blocks"),
    ],
)
def test_other_transformers_are_refused_by_what_they_are(tmp_path: Path, name: str, says: str) -> None:
    with torch.device("meta"):
        shapes = {k: (v.shape, v.dtype) for k, v in timm.create_model(name).state_dict().items()}
    torch.save({k: torch.zeros(1, dtype=t).expand(s) for k, (s, t) in shapes.items()}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "other.pth", CPU)


# --- CNNs of timm


@pytest.mark.parametrize("name", ["resnet18", "regnety_160"])
def test_timms_cnns_give_their_logits(tmp_path: Path, name: str) -> None:
    theirs = randomized(timm.create_model(name, num_classes=7))
    torch.save({"model": theirs.state_dict()}, tmp_path / "teacher.pth")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pixels)
        (found,) = load_model(tmp_path / "teacher.pth", CPU).model(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# --- what lies beside the weights


def hugging_folder(
    folder: Path, names: list[str] | None = None, processor: dict | None = None, **config
) -> torch.nn.Module:
    shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 32, "patch_size": 8}
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    theirs = randomized(ViTForImageClassification(ViTConfig(**shape, num_labels=3, **labels, **config)))
    theirs.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return theirs


def test_hugging_faces_folder_tells_classes_normalization_and_epsilon(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    theirs = hugging_folder(tmp_path, ["red", "green", "blue"])
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    trained = load_model(tmp_path, CPU)
    assert trained.classes == ("red", "green", "blue")
    augment = trained.recipe.augment
    assert (augment.size, augment.mean, augment.std) == (32, (0.5,) * 3, (0.5,) * 3)
    assert (augment.eval_resize, augment.eval_interpolation) == ("squash", "bilinear")
    assert trained.model.norm.eps == 1e-12
    assert_same_logits(tmp_path, theirs)
    line = describe_input(trained)
    assert "preprocessor_config.json" in line
    assert "config.json (id2label)" in line
    assert "mean 0.5, 0.5, 0.5" in line


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"image_processor_type": "ViTImageProcessor", "size": 224}, (224, 224, "squash", "bilinear", 0.5)),
        (
            {
                "feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "do_center_crop": True,
                "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
            },
            (224, 256, "squash", "bicubic", 0.485),
        ),
        (
            {
                "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 232}, "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224}, "resample": PILImageResampling.BILINEAR,
            },
            (224, 232, "shorter", "bilinear", 0.485),
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}, (224, 256, "shorter", "bicubic", 0.485)),
        ({"size": 224, "do_normalize": False}, (224, 224, "shorter", "bilinear", 0.0)),
        ({"size": 224, "image_mean": 0.25, "image_std": 0.5}, (224, 224, "shorter", "bilinear", 0.25)),
    ],
)  # fmt: skip
def test_hugging_faces_processors_are_read(tmp_path: Path, processor: dict, expected: tuple) -> None:
    from deitfast.weights.sidecar import read_sidecar

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    told = read_sidecar(tmp_path / "model.safetensors", {}).input
    size, resized = told["size"], int(told["size"] / told["eval_crop"])
    found = (size, resized, told.get("eval_resize", "shorter"), told["eval_interpolation"], told["mean"][0])
    assert found == expected


def test_a_normalization_that_nothing_tells_is_not_said_to_be_told(tmp_path: Path) -> None:
    hugging_folder(tmp_path, ["red", "green", "blue"])
    line = describe_input(load_model(tmp_path, CPU))
    assert "config.json says, mean and std as recipe deit_ti_cifar10 says (nothing else does): 32 px" in line
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32}')
    assert "mean and std as" not in describe_input(load_model(tmp_path, CPU))


def test_numbers_as_labels_are_names(tmp_path: Path) -> None:
    hugging_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": 7, "1": 3, "2": 5}}))
    assert load_model(tmp_path, CPU).classes == ("7", "3", "5")


def test_a_processor_that_does_not_resize_is_refused(tmp_path: Path) -> None:
    hugging_folder(tmp_path, processor={"size": 32, "do_resize": False})
    with pytest.raises(UserError, match=r"(?s)preprocessing is not available.*do_resize false"):
        load_model(tmp_path, CPU)


@pytest.mark.parametrize("head", [True, False])
def test_torchvisions_vit_gives_its_logits(tmp_path: Path, head: bool) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=7
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = theirs.state_dict()
    if not head:
        state = {name: value for name, value in state.items() if not name.startswith("heads")}
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "vit.pth")
    if head:
        trained, pixels = load_model(tmp_path / "vit.pth", CPU), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(trained.model(pixels)[0], theirs(pixels), rtol=1e-4, atol=1e-4)
        return
    weights = read_weights(tmp_path / "vit.pth")
    assert (weights.arch, weights.patch, weights.size, weights.num_classes) == ("deit_ti", 16, 32, 0)
    with pytest.raises(UserError, match="has no classifier"):
        load_model(tmp_path / "vit.pth", CPU)


def test_unnamed_labels_are_not_names(tmp_path: Path) -> None:
    hugging_folder(tmp_path)
    assert load_model(tmp_path, CPU).classes == ()


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "a JSON object"),
        ("config.json", '{"id2label": ["a"]}', "an object as id2label"),
        ("config.json", '{"id2label": {"a": "b"}}', "numbers as keys"),
        ("config.json", '{"id2label": {"0": "a", "2": "b"}}', "id2label of 0 to 1"),
        ("config.json", '{"id2label": {"0": "a", "1": "b"}}', "2"),
        ("config.json", '{"model_type": "vit", "hidden_act": "relu"}', "hidden_act"),
        ("config.json", '{"num_attention_heads": 7}', "divides its width, 192"),
        ("config.json", '{"architecture": "x", "pretrained_cfg": {"mean": [1]}}', "mean"),
        ("config.json", '{"architecture": "x", "label_names": [1, 2, 3]}', "a list of class names"),
        ("preprocessor_config.json", '{"image_mean": "a"}', "a number, or three, as image_mean"),
        ("preprocessor_config.json", '{"image_std": [0.5, 0.5]}', "a number, or three, as image_mean and image_std"),
        ("preprocessor_config.json", '{"rescale_factor": 1}', "rescale_factor"),
        ("preprocessor_config.json", '{"size": {"height": 32, "width": 64}}', "square"),
        ("preprocessor_config.json", '{"image_std": [0, 1, 1]}', "std"),
    ],
)
def test_damaged_or_impossible_configurations_are_refused(tmp_path: Path, file: str, text: str, says: str) -> None:
    hugging_folder(tmp_path, processor={"size": 32})
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path, CPU)
    assert says in str(caught.value)
    assert file in str(caught.value)


def test_timms_folder_tells_classes_and_preprocessing(tmp_path: Path) -> None:
    theirs = timm_model()
    config = {
        "label_names": list("gfedcba"), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 0.95,
        "interpolation": "bilinear", "input_size": (3, 32, 32),
    }  # fmt: skip
    save_for_hf(theirs, tmp_path, model_config={"label_names": config.pop("label_names"), "pretrained_cfg": config})
    trained = load_model(tmp_path, CPU)
    augment = trained.recipe.augment
    assert trained.classes == tuple("gfedcba")
    assert (augment.mean, augment.std, augment.eval_crop) == ((0.5,) * 3, (0.25,) * 3, 0.95)
    assert (augment.eval_interpolation, augment.crop) == ("bilinear", "resized")
    assert_same_logits(tmp_path, theirs)
    assert "label_names" in describe_input(trained)


def test_a_file_elsewhere_takes_no_neighbors_configuration(tmp_path: Path) -> None:
    hugging_folder(tmp_path, ["red", "green", "blue"])
    shutil.move(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    assert load_model(tmp_path / "other.safetensors", CPU).classes == ()
    shutil.move(tmp_path / "other.safetensors", tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors", CPU).classes == ("red", "green", "blue")


@pytest.mark.parametrize(
    "meta",
    [
        "null",
        "[]",
        '{"classes":5}',
        '{"classes":["a"],"input":[1]}',
        '{"input":{"size":"x"}}',
        "{",
        '{"classes":["a"]}',
    ],
)
def test_damaged_metadata_of_ours_is_refused(tmp_path: Path, meta: str) -> None:
    save_file(torchvision.models.resnet18(num_classes=4).state_dict(), tmp_path / "x.safetensors", {"deitfast": meta})
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load_model(tmp_path / "x.safetensors", CPU)


def test_legacy_files_with_flipped_bits_are_read_or_refused(tmp_path: Path) -> None:
    state = {
        "fc.weight": torch.zeros(4, 8),
        "conv1.weight": torch.zeros(6, 3, 3, 3),
        "layer1.0.conv1.weight": torch.zeros(2),
    }
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pth").read_bytes()
    for position in range(0, len(whole), 3):
        content = bytearray(whole)
        content[position] ^= 1 << (position % 8)
        (tmp_path / "y.pth").write_bytes(content)
        try:
            read_weights(tmp_path / "y.pth")
        except UserError as error:
            assert "y.pth" in str(error)  # noqa: PT017


def test_a_head_without_a_token_of_another_epsilon_still_loads(tmp_path: Path) -> None:
    theirs = hugging_face("deit")
    theirs.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, theirs)
    (tmp_path / "model.safetensors").rename(tmp_path / "rest.safetensors")
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_logits(tmp_path, theirs)
