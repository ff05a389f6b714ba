"""Teachers: runs, files and torchvision's networks, fed as they were trained, their classes matched by name."""

from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

from deitfast.config.recipe import DistillSpec
from deitfast.distill.teacher import Teacher, load_teacher
from deitfast.models.class_names import imagenet_synsets, match_classes
from deitfast.weights import torchvision as published
from pipelines.errors import DeitfastError, UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from tests.helpers.published_weights import randomized
from tests.helpers.sample_images import MemorySource, drawn, entries
from tests.helpers.small_runs import CPU, run, tiny_recipe

SYNSETS = imagenet_synsets()
STUDENT = tiny_recipe("augment.size=224", "augment.mean=[0.485, 0.456, 0.406]", "augment.std=[0.229, 0.224, 0.225]")


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's ResNet-18 with drawn weights, as its published file has them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18-f37072fd.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def spec(teacher: str | Path, weights: str | Path = "") -> DistillSpec:
    return DistillSpec(mode="hard", teacher=str(teacher), teacher_weights=str(weights))


def test_the_synsets_are_imagenets_in_label_order() -> None:
    assert len(SYNSETS) == len(set(SYNSETS)) == 1000
    assert list(SYNSETS) == sorted(SYNSETS)
    assert (SYNSETS[0], SYNSETS[-1]) == ("n01440764", "n15075141")  # tench, toilet tissue


def test_a_published_network_says_what_torchvisions_own_does(resnet18: Path) -> None:
    loaded = load_teacher(spec("resnet18", resnet18), SYNSETS)
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(resnet18, weights_only=True))
    pixels = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.eval()(pixels)
    assert torch.allclose(Teacher(loaded, STUDENT, CPU).logits(pixels), expected, atol=1e-5)
    assert loaded.identity_mapping
    assert (loaded.size, loaded.mean) == (224, (0.485, 0.456, 0.406))


def test_a_student_of_another_size_and_normalization_is_seen_as_the_teacher_was_trained(resnet18: Path) -> None:
    loaded = load_teacher(spec("resnet18", resnet18), SYNSETS)
    recipe = tiny_recipe("augment.mean=[0.5, 0.5, 0.5]", "augment.std=[0.25, 0.25, 0.25]")
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    with torch.no_grad():
        larger = F.interpolate((images - mean) / std, size=224, mode="bicubic", antialias=True)
        (expected,) = loaded.model(larger)
    assert torch.allclose(Teacher(loaded, recipe, CPU).logits((images - 0.5) / 0.25), expected, atol=1e-4)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_a_student_of_another_size_may_come_in_half_precision(resnet18: Path, amp: torch.dtype) -> None:
    loaded = load_teacher(spec("resnet18", resnet18), SYNSETS)
    recipe = tiny_recipe("augment.mean=[0.485, 0.456, 0.406]", "augment.std=[0.229, 0.224, 0.225]")
    pixels = torch.randn(2, 3, 32, 32).to(amp)
    exact = Teacher(loaded, recipe, CPU).logits(pixels.float())
    found = Teacher(loaded, recipe, replace(CPU, amp=amp)).logits(pixels)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_some_of_the_classes_are_found_by_name_whatever_their_order(resnet18: Path) -> None:
    whole = Teacher(load_teacher(spec("resnet18", resnet18), SYNSETS), STUDENT, CPU)
    some = (SYNSETS[700], SYNSETS[3], SYNSETS[999])
    loaded = load_teacher(spec("resnet18", resnet18), some)
    assert not loaded.identity_mapping
    pixels = torch.randn(2, 3, 224, 224)
    found = Teacher(loaded, STUDENT, CPU).logits(pixels)
    assert torch.allclose(found, whole.logits(pixels)[:, [700, 3, 999]])


def test_classes_may_be_called_by_torchvisions_words(resnet18: Path) -> None:
    assert load_teacher(spec("resnet18", resnet18), ("goldfish", "tench")).class_index == (1, 0)
    with pytest.raises(UserError, match="does not know class unicorn"):
        load_teacher(spec("resnet18", resnet18), ("tench", "unicorn"))


def test_the_digest_follows_every_weight_and_the_order_of_classes(resnet18: Path, tmp_path: Path) -> None:
    loaded = load_teacher(spec("resnet18", resnet18), SYNSETS)
    known = loaded.fingerprint()
    assert known == load_teacher(spec("resnet18", resnet18), SYNSETS).fingerprint()
    state = torch.load(resnet18, weights_only=True)
    state["bn1.running_var"][5] += 1e-6  # a statistic, not a weight
    torch.save(state, tmp_path / "other.pth")
    other = load_teacher(spec("resnet18", tmp_path / "other.pth"), SYNSETS).fingerprint()
    assert {key for key in known if known[key] != other[key]} == {"teacher.digest"}
    turned = load_teacher(spec("resnet18", resnet18), SYNSETS[::-1]).fingerprint()
    assert {key for key in known if known[key] != turned[key]} == {"teacher.class_index"}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_timms_networks_teach_with_their_own_logits(tmp_path: Path, wrapper: str) -> None:
    theirs = randomized(timm.create_model("resnet18"))
    file = tmp_path / "resnet18.pth"
    torch.save({"state_dict": {f"{wrapper}{name}": value for name, value in theirs.state_dict().items()}}, file)
    loaded = load_teacher(spec("timm/resnet18", file), SYNSETS[5:3:-1])
    fed = timm.data.resolve_model_data_config(theirs)
    assert (loaded.size, loaded.mean, loaded.std) == (fed["input_size"][-1], fed["mean"], fed["std"])
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        (found,) = loaded.model(pixels)
        torch.testing.assert_close(found, theirs(pixels))
    assert loaded.class_index == (5, 4)


def test_timms_names_and_files_that_are_not_are_refused(tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(UserError, match="timm has no network called resnet19"):
        load_teacher(spec("timm/resnet19"), SYNSETS)
    with pytest.raises(UserError, match="does not hold a vit_tiny_patch16_224"):
        load_teacher(spec("timm/vit_tiny_patch16_224", resnet18), SYNSETS)


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_0"])
def test_every_classifier_of_torchvision_teaches(tmp_path: Path, name: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, weights=None, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    loaded = load_teacher(spec(name, tmp_path / "x.pth"), SYNSETS)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(pixels)[0], theirs(pixels))


def test_weights_of_another_network_are_refused(resnet18: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not hold a resnet50"):
        load_teacher(spec("resnet50", resnet18), SYNSETS)
    with pytest.raises(UserError, match="weights file not found"):
        load_teacher(spec("resnet18", tmp_path / "nowhere.pth"), SYNSETS)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_teacher(spec("resnet18", tmp_path / "text.pth"), SYNSETS)


def test_weights_of_other_classes_without_names_are_refused(tmp_path: Path) -> None:
    save_file(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    with pytest.raises(UserError, match="does not say what its 7 classes are"):
        load_teacher(spec("resnet18", tmp_path / "seven.safetensors"), ("a",) * 7)


def test_without_a_network_the_file_to_fetch_is_named(monkeypatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(DeitfastError, match="weights of regnet_y_16gf cannot be fetched") as caught:
        load_teacher(spec("regnet_y_16gf"), SYNSETS)
    assert "regnet_y_16gf-3e4a00f9.pth" in str(caught.value.expected)  # the one with 82.9 %
    assert "--teacher-weights" in str(caught.value.remedy)


def test_every_published_classifier_knows_imagenets_thousand() -> None:
    for name in ("regnet_y_16gf", "resnet50", "vit_b_16", "convnext_tiny", "efficientnet_b0"):
        assert published.is_torchvision_model(name)
        weights = published.torchvision_weights(name)
        assert len(weights.meta["categories"]) == 1000
        assert len(weights.transforms().mean) == 3
    assert published.is_torchvision_model("inception_v3")
    assert not published.is_torchvision_model("deit_ti")


def test_a_run_whose_classes_are_in_another_order_teaches_by_their_names(tmp_path: Path) -> None:
    images = [drawn(32, 32, number) for number in range(32)]
    for name, classes in {"abc": ("a", "b", "c"), "bca": ("b", "c", "a")}.items():
        splits = {"train": entries(images, classes=3, names="t#{}"), "val": entries(images[:4], classes=3)}
        convert(MemorySource("cifar10", classes=classes, splits=splits), tmp_path / name, ConvertOptions(workers=1))
    out = tmp_path / "teacher"
    run(tmp_path / "abc", out, tiny_recipe("model.arch=vit_ti", "train.epochs=1", "train.ema=0"))
    pixels, recipe = torch.randn(2, 3, 32, 32), tiny_recipe()
    own = Teacher(load_teacher(spec(out), ("a", "b", "c")), recipe, CPU).logits(pixels)
    turned = Teacher(load_teacher(spec(out), ("b", "c", "a")), recipe, CPU).logits(pixels)
    assert torch.equal(turned, own[:, [1, 2, 0]])
    row = run(tmp_path / "bca", tmp_path / "student", tiny_recipe("distill.mode=hard", f"distill.teacher={out}"))
    assert np.isfinite(row["distill"])


def test_outputs_are_matched_by_name() -> None:
    assert match_classes("t", ("a", "b", "c"), 3, ("c", "a")).index == (2, 0)
    with pytest.raises(UserError, match="t does not know class d"):
        match_classes("t", ("a", "b", "c"), 3, ("d",))
    with pytest.raises(UserError, match="t has more than one class crane"):
        match_classes("t", ("crane", "b", "crane"), 3, ("b", "crane"))


def test_a_file_beside_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--teacher-weights requires"):
        load_teacher(spec(tmp_path, "weights.pth"), SYNSETS)
