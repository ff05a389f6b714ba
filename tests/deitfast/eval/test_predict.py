"""Predictions of image files are those that evaluation makes of the same images; attention is transformers'."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from deitfast.eval.attention import attention_rollout, overlay
from deitfast.eval.predict import as_csv, as_json, list_images, open_images, read_images, top_predictions
from deitfast.models.vit import build_model
from deitfast.weights.huggingface import to_timm
from pipelines.errors import DeitfastError, UserError
from tests.helpers.command_line import call
from tests.helpers.published_weights import hugging_face, randomized
from tests.helpers.sample_images import drawn, encoded, odd_images
from tests.helpers.small_runs import CPU, tiny_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of flat colors as a folder of images, converted, and a Hugging Face model that tells them apart."""
    from deitfast.weights.load import load_model

    root = tmp_path_factory.mktemp("predict")
    theirs = hugging_face("with_teacher", classes=3)
    theirs.config.id2label = {0: "red", 1: "green", 2: "blue"}
    theirs.save_pretrained(root / "hf")
    (root / "hf" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "DeiTImageProcessor", "size": {"height": 32, "width": 32},
                    "crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )  # fmt: skip
    for split in ("train", "val"):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / "images" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = drawn(32, 32, 10 * channel + number)
                pixels[..., channel] = 255
                Image.fromarray(pixels).save(root / "images" / split / name / f"{number}.png")
    assert load_model(root / "hf", torch.device("cpu")).classes == ("red", "green", "blue")
    return root


def test_eval_matches_classes_and_writes_every_prediction(capsys, folder: Path) -> None:
    code, _, err = call(capsys, "convert", "folder", folder / "images", folder / "data")
    assert code == 0, err
    command = ("eval", "--weights", folder / "hf", "--data", folder / "data", "--device", "cpu")
    code, out, err = call(capsys, *command, "--predictions", folder / "p.csv", "--json", folder / "m.json")
    assert code == 0, err
    assert "preprocessor_config.json" in (out + err).replace("\n", "")
    rows = list(csv.DictReader(io.StringIO((folder / "p.csv").read_text())))
    images = sorted((folder / "images" / "val").rglob("*.png"))  # converted in this order, of classes by name
    assert [row["image"] for row in rows] == [f"val/{number}" for number in range(9)]
    assert [row["truth"] for row in rows] == [image.parent.name for image in images]
    code, out, err = call(capsys, "predict", folder / "hf", *images, "--csv", folder / "q.csv", "--device", "cpu")
    assert code == 0, err
    best = [
        row
        for row in csv.DictReader(io.StringIO((folder / "q.csv").read_text()))
        if (row["head"], row["rank"]) == ("joint", "1")
    ]
    assert [row["class"] for row in best] == [row["prediction"] for row in rows]
    assert [row["probability"] for row in best] == [row["probability"] for row in rows]
    report = json.loads((folder / "m.json").read_text())
    share = sum(row["truth"] == row["prediction"] for row in rows) / 9
    assert report["heads"]["joint"]["top1"] == pytest.approx(share)
    assert "matched by name" in report["class_match"]
    code, out, err = call(capsys, "predict", folder / "hf", folder / "data", "--json", folder / "q.json", "--top", 1)
    assert code == 0, err
    whole = json.loads((folder / "q.json").read_text())
    assert [image["heads"]["joint"][0]["class"] for image in whole] == [row["prediction"] for row in rows]
    assert [image["truth"] for image in whole] == [row["truth"] for row in rows]
    command = ("predict", folder / "hf", folder / "data", "--split", "train", "--json", folder / "r.json")
    code, out, err = call(capsys, *command, "--device", "cpu")
    assert code == 0, err
    assert [image["image"] for image in json.loads((folder / "r.json").read_text())] == [f"train/{n}" for n in range(9)]


def test_pages_lists_and_bad_files(capsys, folder: Path, tmp_path: Path, monkeypatch) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, data in odd_images().items():
        (mixed / name).write_bytes(data)
    (mixed / "broken.jpg").write_bytes(encoded(drawn(40, 40, 1))[:300])
    (mixed / "text.png").write_text("hello <b>")
    (mixed / "notes.txt").write_text("not listed")
    line = ("predict", folder / "hf", mixed, "--attention", "--html", tmp_path / "page.html", "--device", "cpu")
    code, out, err = call(capsys, *line)
    assert code == 0, err
    assert out.count("%") >= 3 * len(odd_images())
    assert "2 images could not be read" in out
    assert "skipped" in (out + err)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") == 3 * len(odd_images())  # the image, and what either token looks at
    assert "broken.jpg" in page
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{mixed / 'small.png'}\n\n"))
    code, out, err = call(capsys, "predict", folder / "hf", "-", "--top", 2, "--device", "cpu")
    assert code == 0, err
    assert out.splitlines()[0].startswith(f"{mixed / 'small.png'}: ")
    code, _, err = call(capsys, "predict", folder / "hf", mixed / "text.png", "--device", "cpu")
    assert (code, "none of the images can be read" in err) == (2, True)
    code, _, err = call(capsys, "predict", folder / "hf", "nowhere.png")
    assert (code, "there is no image nowhere.png" in err) == (2, True)


def test_images_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.txt", "._d.png"):
        (tmp_path / name).touch()
    assert [file.name for file in list_images([str(tmp_path), "-"], ["x.png\n", "\n"])] == ["a.JPG", "b.png", "x.png"]
    assert list_images(["-"], ["~/x.png\n"]) == [Path.home() / "x.png"]
    with pytest.raises(UserError, match="no image"):
        list_images(["-"], [])


def test_pixels_are_those_of_conversion_and_evaluation(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(drawn(50, 70, 1), "PNG"))
    recipe, bad = tiny_recipe("augment.crop=resized", "augment.eval_crop=1.0"), []
    ((names, images),) = read_images([tmp_path / "x.png", tmp_path / "gone.png"], recipe, lambda *why: bad.append(why))
    assert [name.name for name in names] == ["x.png"]
    assert bad[0][0].name == "gone.png"
    loader = open_images(images, recipe, CPU.device)
    (batch,) = loader.epoch(0)
    loader.close()
    theirs = Image.fromarray(drawn(50, 70, 1)).resize((44, 32), Image.Resampling.BICUBIC).crop((6, 0, 38, 32))
    assert np.abs(batch.images[0].numpy().astype(int) - np.asarray(theirs)).mean() < 0.2


def test_what_is_written_is_what_was_predicted() -> None:
    heads = (torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.tensor([[1.0, 2, 3], [0, 9, 0]]))
    found = top_predictions(["x", "y, z"], heads, ["a", "b", "c"], 2, ["c", "b"])
    assert [[name for name, _ in image.heads["joint"]] for image in found] == [["c", "b"], ["b", "a"]]
    by_class = top_predictions(["x", "y, z"], heads, ["a", "b", "c"], 1, prediction="class")
    assert [image.best[0] for image in (*found, *by_class)] == ["c", "b", "c", "a"]
    assert found[0].best[1] == pytest.approx(float(torch.tensor([1.0, 2, 3]).softmax(0)[2]))
    rows = list(csv.reader(io.StringIO(as_csv(found))))
    assert rows[0] == ["image", "truth", "head", "rank", "class", "probability"]
    assert len(rows) == 1 + 2 * 3 * 2
    assert rows[-1][:5] == ["y, z", "b", "joint", "2", "a"]
    assert json.loads(as_json(found))[1]["heads"]["class"][0]["class"] == "a"
    heads[1][1, 0] = float("nan")
    with pytest.raises(DeitfastError, match=r"(?s)not finite .* 1 of 2 images.*the distillation head for y, z"):
        top_predictions(["x", "y, z"], heads, ["a", "b", "c"], 2)


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    logits = torch.tensor([[1.0] * 12, [0.0] * 6 + [2.0] * 6])
    one, other = top_predictions(["x", "y"], (logits,), tuple("abcdefghijkl"), top=3)
    assert [name for name, _ in one.heads["class"]] == ["a", "b", "c"]
    assert [name for name, _ in other.heads["class"]] == ["g", "h", "i"]


def test_attention_rollout_is_that_of_transformers_attentions() -> None:
    theirs = hugging_face("with_teacher")
    theirs.set_attn_implementation("eager")
    ours = build_model(tiny_recipe("model.patch=8", "model.depth=12").model, size=32, classes=7, distilled=True).eval()
    ours.load_state_dict(to_timm(theirs.state_dict()))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = theirs(pixels, output_attentions=True).attentions
    rollout = torch.eye(18)
    for attention in attentions:
        rollout = (0.5 * attention.mean(1) + 0.5 * torch.eye(18)) @ rollout
    found = attention_rollout(ours, pixels)
    for number, name in enumerate(("class", "distillation")):
        expected = rollout[:, number, 2:]
        expected = (expected / expected.sum(1, keepdim=True)).view(2, 4, 4)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="needs a transformer"):
        attention_rollout(torch.nn.Linear(2, 2), pixels)


def test_what_is_looked_at_stays_light() -> None:
    shown = np.asarray(overlay(np.full((32, 32, 3), 200, np.uint8), torch.eye(2), side=64)).astype(int)
    assert shown[8, 8].mean() > 2 * shown[8, 56].mean()


def test_a_thousand_classes_are_restricted_to_a_subsets_by_name(capsys, tmp_path: Path) -> None:
    """Imagenette's kind: folders of synsets, a network of ImageNet's 1,000 without names."""
    theirs = randomized(timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8))
    torch.save({"model": theirs.state_dict()}, tmp_path / "net.pth")
    synsets, places = ("n01440764", "n02102040", "n03888257"), [0, 217, 701]
    for number, synset in enumerate(synsets):
        (tmp_path / "images" / "train" / synset).mkdir(parents=True)
        (tmp_path / "images" / "val" / synset).mkdir(parents=True)
        Image.fromarray(drawn(32, 32, number)).save(tmp_path / "images" / "train" / synset / "x.png")
        Image.fromarray(drawn(32, 32, 10 + number)).save(tmp_path / "images" / "val" / synset / "x.png")
    assert call(capsys, "convert", "folder", tmp_path / "images", tmp_path / "data")[0] == 0
    line = ("eval", "--weights", tmp_path / "net.pth", "--data", tmp_path / "data", "--set", "train.amp=off")
    code, out, err = call(capsys, *line, "--predictions", tmp_path / "p.csv", "--device", "cpu")
    assert code == 0, err
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    pixels = torch.stack([torch.from_numpy(drawn(32, 32, 10 + n)).permute(2, 0, 1) / 255 for n in range(3)])
    with torch.no_grad():
        expected = theirs((pixels - mean) / std)[:, places].softmax(1)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text())))
    assert [row["prediction"] for row in rows] == [synsets[place] for place in expected.argmax(1)]
    for row, probability in zip(rows, expected.max(1).values.tolist(), strict=True):
        assert float(row["probability"]) == pytest.approx(probability, rel=1e-3)
    assert "3 of 1,000" in " ".join((out + err).split())
