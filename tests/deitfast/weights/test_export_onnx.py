"""Export to ONNX: what onnxruntime computes from the file is what the network computes."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from deitfast.models.vit import build_model, joint
from deitfast.weights.load import TrainedModel
from deitfast.weights.onnx import export_onnx
from deitfast.weights.sidecar import METADATA
from pipelines.errors import UserError
from tests.helpers.command_line import call
from tests.helpers.small_runs import tiny_recipe

CLASSES = tuple("abc")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch 2.11's exporter, of itself


def untrained(*settings: str) -> TrainedModel:
    recipe = tiny_recipe("model.patch=8", *settings)
    torch.manual_seed(0)
    model = build_model(recipe.model, size=32, classes=3, distilled=recipe.distilled)
    return TrainedModel(model.eval().requires_grad_(False), recipe, CLASSES, 3, 1)


@pytest.mark.parametrize("settings", [("model.token=on",), ("model.arch=resnet18",)])
def test_onnxruntime_computes_what_the_network_does(tmp_path: Path, settings: tuple[str, ...]) -> None:
    ours = untrained(*settings)
    (file,) = export_onnx(ours, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(file)
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(["logits"], {"pixels": pixels.numpy()})
        np.testing.assert_allclose(np.asarray(logits), joint(ours.model(pixels)), rtol=1e-4, atol=1e-5)
    said = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert said["classes"] == list(CLASSES)
    assert said["input"]["mean"] == list(ours.recipe.augment.mean)


def test_the_name_tells_the_format(capsys, tiny_small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deitfast.cli.evaluation.load_model", lambda *_, **__: untrained())
    code, out, err = call(capsys, "export", "run", "there/net.onnx")
    assert code == 0, err
    assert "wrote there/net.onnx" in out
    assert onnxruntime.InferenceSession("there/net.onnx").get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert [path.name for path in Path("there").iterdir()] == ["net.onnx"]
    code, _, err = call(capsys, "eval", "--weights", "there/net.onnx", "--data", tiny_small)
    assert (code, "net.onnx" in err) == (2, True)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*args: object, **more: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(UserError, match=r"pip install onnx onnxscript"):
        export_onnx(untrained(), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()
