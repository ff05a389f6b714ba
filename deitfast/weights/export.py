"""A trained model as a file for other programs: safetensors under timm's names, or ONNX."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from deitfast.models.vit import VisionTransformer, joint
from deitfast.weights.load import TrainedModel
from deitfast.weights.sidecar import INPUT_FIELDS, METADATA
from pipelines.errors import UserError
from pipelines.files import atomic_write, explain_os_error, write_text

FORMATS = ("timm", "onnx")
TIMM_SIZES = {"ti": "tiny", "s": "small", "b": "base"}
TRACED_BATCH = 2
"""Of the export to ONNX: torch takes a batch of 1 for a constant."""


def export(trained: TrainedModel, out: Path, form: str) -> tuple[Path, ...]:
    """Write a model in one of FORMATS and return the files written; see `export_timm` and `export_onnx`."""
    return export_onnx(trained, out) if form == "onnx" else export_timm(trained, out)


def format_of(out: Path, wish: str = "") -> str:
    """Return the format that is wished for; "": ONNX for a name ending in .onnx, else timm.

    Raises:
        UserError: there is no such format, or the name's ending promises another one.
    """
    form = wish or ("onnx" if out.suffix == ".onnx" else "timm")
    if form not in FORMATS:
        raise UserError(f"there is no format {form}", expected=", ".join(FORMATS))
    if (out.suffix, form) in ((".onnx", "timm"), (".safetensors", "onnx")):
        raise UserError(f"{out} would not be what its name says", remedy=f"leave --format {form} out, or rename it")
    return form


def export_timm(trained: TrainedModel, out: Path) -> tuple[Path, ...]:
    """Write a model under timm's names and return the files written.

    `out` ending in .safetensors is one file, whose metadata holds the configuration; any other name is a folder of
    model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

    Raises:
        UserError: the network is none of timm's DeiTs.
        DeitfastError: the disk is full or not writable.
    """
    if not isinstance(trained.model, VisionTransformer):
        raise UserError(f"{trained.recipe.model.arch} has no timm layout here", expected="a deit_* or vit_* network")
    config = timm_config(trained)
    one_file = out.suffix == ".safetensors"
    file = out if one_file else out / "model.safetensors"
    metadata = {"format": "pt", METADATA: _own(trained), "timm": json.dumps(config)}
    tensors = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    _write(file, save(tensors, metadata))
    if one_file:
        return (file,)
    write_text(out / "config.json", json.dumps(config, indent=1))
    return file, out / "config.json"


def timm_config(trained: TrainedModel) -> dict[str, Any]:
    """Return timm's config.json of a transformer: architecture, arguments, preprocessing, class names."""
    model, augment = trained.recipe.model, trained.recipe.augment
    middle = "_distilled" if trained.recipe.distilled else ""
    size = TIMM_SIZES[model.arch.partition("_")[2]]
    side = 384 if size == "base" and augment.size == 384 else 224  # timm names the base model at 384 as well
    heads = ["head", "head_dist"] if trained.recipe.distilled else "head"
    config = {
        "architecture": f"deit_{size}{middle}_patch16_{side}",
        "num_classes": trained.num_classes,
        "model_args": {"img_size": augment.size, "patch_size": model.patch},
        "pretrained_cfg": {
            "input_size": [3, augment.size, augment.size],
            "fixed_input_size": True,
            "num_classes": trained.num_classes,
            "mean": augment.mean,
            "std": augment.std,
            "interpolation": "bicubic",
            "crop_pct": 1.0 if augment.crop == "padded" else augment.eval_crop,
            "first_conv": "patch_embed.proj",
            "classifier": heads,
        },
    }
    if trained.classes:
        config["label_names"] = list(trained.classes)
    return config


def export_onnx(trained: TrainedModel, out: Path) -> tuple[Path, ...]:
    """Write a model as one ONNX file: pixels, float32 [batch, 3, S, S], to logits, float32 [batch, classes].

    The batch may be of any size. Pixels are resized, cropped and normalized as the metadata says, under the same key
    and in the same words as in an exported .safetensors. Logits are the published prediction: two heads' mean.

    Raises:
        UserError: a package that torch exports with is not installed.
        DeitfastError: the disk is full or not writable.
    """
    side = trained.recipe.augment.size
    pixels, batch = torch.zeros(TRACED_BATCH, 3, side, side), torch.export.Dim("batch")
    try:
        program = torch.onnx.export(
            Published(trained.model).eval(), (pixels,), dynamo=True, verbose=False,
            input_names=["pixels"], output_names=["logits"], dynamic_shapes=({0: batch},),
        )  # fmt: skip
    except ImportError as error:  # of either package
        raise UserError(
            "the export to ONNX needs two packages more", found=str(error), remedy="pip install onnx onnxscript"
        ) from error
    assert program is not None  # only the older exporter, which writes a file, returns nothing
    program.model.metadata_props[METADATA] = _own(trained)
    _write(out, program.model_proto.SerializeToString())
    return (out,)


class Published(nn.Module):
    """A network with its published prediction as its one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, 3, S, S] to logits [B, classes]."""
        return joint(self.model(pixels))


def _own(trained: TrainedModel) -> str:
    """Return what our own reader wants to know of a file: the classes' names and how images are fed to the network."""
    augment = trained.recipe.augment
    fed = {name: getattr(augment, name) for name in INPUT_FIELDS}
    return json.dumps({"classes": trained.classes, "input": fed})


def _write(file: Path, content: bytes) -> None:
    with explain_os_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as opened:
            opened.write(content)
