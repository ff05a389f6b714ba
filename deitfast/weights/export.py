"""A trained model as files for other programs: safetensors for timm, torchvision or transformers, or ONNX."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from deitfast.config.recipe import ModelSpec
from deitfast.models.vit import VisionTransformer, transformer_shape
from deitfast.weights.card import model_card, sidecar_json
from deitfast.weights.hf_config import hf_config, hf_processor
from deitfast.weights.huggingface import from_timm
from deitfast.weights.layouts import timm_regnet
from deitfast.weights.load import TrainedModel
from deitfast.weights.onnx import export_onnx
from deitfast.weights.sidecar import CONFIG, METADATA, PROCESSOR, TIMM, describe_ours
from pipelines.errors import UserError
from pipelines.files import write_bytes, write_text

FORMATS = ("timm", "torchvision", "hf", "onnx")
TIMM_SIZES = {"ti": "tiny", "s": "small", "b": "base"}
TIMM_REGNETS = {"regnet_y_4gf": "regnety_040", "regnet_y_8gf": "regnety_080_tv", "regnet_y_16gf": "regnety_160"}
"""timm's names of the networks that it has with the same widths."""
FILE, CARD = "model.safetensors", "README.md"


def export(trained: TrainedModel, out: Path, form: str) -> tuple[Path, ...]:
    """Write a model and return the files written.

    `out` ending in .safetensors is one file, whose metadata holds the configuration; ending in .onnx it is an ONNX
    file; any other name is a folder of model.safetensors, config.json and README.md, the model card:

    - timm: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it; CNNs of 64 px or more, not resnet20.
    - torchvision (CNNs): torchvision's names.
    - hf: `transformers.AutoModelForImageClassification.from_pretrained(FOLDER)` reads it, and the image processor.

    Args:
        trained: the model.
        out: file or folder.
        form: one of FORMATS, or "": ONNX for .onnx, else timm or torchvision, as the network has it.

    Raises:
        UserError: the network cannot be written in that format.
        DeitfastError: the disk is full or not writable.
    """
    transformer = isinstance(trained.model, VisionTransformer)
    form = form or ("onnx" if out.suffix == ".onnx" else "timm" if transformer else "torchvision")
    if form == "onnx":
        return export_onnx(trained, out)
    _require_layout(trained, form)
    tensors = trained.model.state_dict()
    if form == "timm" and trained.recipe.model.arch.startswith("regnet"):
        tensors = {timm_regnet(name): value for name, value in tensors.items()}
    texts: dict[str, str] = {}
    if form == "hf":
        tensors = from_timm(tensors)
        texts = {CONFIG: sidecar_json(hf_config(trained)), PROCESSOR: sidecar_json(hf_processor(trained))}
        metadata = {"format": "pt"}
    else:
        if transformer and trained.recipe.distilled and trained.model.head_dist is None:
            raise UserError("timm has no DeiT with a distillation token and one head", expected="--format hf or onnx")
        config = timm_config(trained, timms_names=form == "timm")
        texts = {CONFIG: sidecar_json(config)}
        own = describe_ours(trained.classes, trained.recipe.augment, transformer_shape(trained.model))
        metadata = {"format": "pt", METADATA: own, TIMM: json.dumps(config)}
    one_file = out.suffix == ".safetensors"
    file = out if one_file else out / FILE
    write_bytes(file, safetensors_bytes(tensors, metadata))
    if one_file:
        return (file,)
    texts[CARD] = model_card(trained, form)
    for name, text in texts.items():
        write_text(out / name, text)
    return file, *(out / name for name in texts)


def _require_layout(trained: TrainedModel, form: str) -> None:
    """Raise a UserError where a network cannot be written in a format."""
    fits, what = ("timm", "hf"), trained.recipe.model.arch
    if not isinstance(trained.model, VisionTransformer):
        from deitfast.models.cnn import SMALL  # torchvision takes a second to import

        small = trained.recipe.augment.size < SMALL
        fits = ("torchvision",) if small or what == "resnet20" else ("torchvision", "timm")
        what += f" with the stem for inputs below {SMALL} px" if small and form == "timm" else ""
    if form not in fits:
        raise UserError(f"{what} has no {form} layout", expected=f"--format {', '.join(fits)} or onnx")


def check_format(out: Path, form: str) -> None:
    """Refuse a format that there is not, or that the name's ending contradicts, before anything is read.

    Raises:
        UserError: so.
    """
    if form and form not in FORMATS:
        raise UserError(f"there is no format {form}", expected=", ".join(FORMATS))
    if (out.suffix == ".onnx" and form not in ("", "onnx")) or (
        out.suffix == ".safetensors" and form in ("onnx", "hf")
    ):
        raise UserError(f"{out} would not be what its name says", remedy=f"leave --format {form} out, or rename it")


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a .safetensors file, the same bytes for the same content: the library orders metadata by chance.

    Format: the header's length (8 bytes, little-endian), the header (JSON, padded with spaces to a multiple of 8),
    the tensors, whose offsets count from the header's end.
    """
    plain = save({name: value.contiguous() for name, value in tensors.items()})
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[8 + length :]


def timm_config(trained: TrainedModel, *, timms_names: bool = True) -> dict[str, Any]:
    """Return timm's config.json: architecture, arguments, preprocessing, class names.

    `timms_names`: whether the tensors have timm's names, which are torchvision's for ResNets and not for RegNets.
    """
    model, augment = trained.recipe.model, trained.recipe.augment
    whole = augment.crop == "padded"
    config: dict[str, Any] = {"architecture": model.arch, "num_classes": trained.num_classes}
    cfg: dict[str, Any] = {
        "input_size": [3, augment.size, augment.size],
        "num_classes": trained.num_classes,
        "mean": augment.mean,
        "std": augment.std,
        "interpolation": augment.eval_interpolation,
        "crop_pct": 1.0 if whole else augment.eval_crop,
        "crop_mode": "squash" if augment.eval_resize == "squash" else "center",
    }
    if isinstance(trained.model, VisionTransformer):
        middle = "_distilled" if trained.recipe.distilled else ""
        size = TIMM_SIZES[model.arch.partition("_")[2]]
        side = 384 if size == "base" and augment.size == 384 else 224  # timm names the base model at 384 as well
        heads = ["head", "head_dist"] if trained.recipe.distilled else "head"
        config["architecture"] = f"deit_{size}{middle}_patch16_{side}"
        config["model_args"] = {"img_size": augment.size, "patch_size": model.patch}
        shape = trained.model.shape
        if shape != ModelSpec(arch=model.arch).shape:
            config["model_args"] |= {
                "embed_dim": shape.width,
                "depth": shape.depth,
                "num_heads": shape.heads,
                "mlp_ratio": model.mlp_ratio,
            }
        cfg |= {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": heads}
    elif model.arch.startswith("resnet"):
        cfg |= {"first_conv": "conv1", "classifier": "fc"}
    elif timms_names:
        config["architecture"] = TIMM_REGNETS[model.arch]
        cfg |= {"first_conv": "stem.conv", "classifier": "head.fc"}
    else:
        cfg |= {"first_conv": "stem.0", "classifier": "fc"}
    config["pretrained_cfg"] = cfg
    if trained.classes:
        config["label_names"] = list(trained.classes)
    return config
