"""A trained model as a file for other programs: safetensors under timm's names, with what timm needs to use it."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from deitfast.interop import INPUT_FIELDS, METADATA
from deitfast.model import VisionTransformer
from deitfast.runlog import write_text
from deitfast.trained import TrainedModel
from pipelines.errors import Failure, Mistake
from pipelines.files import whole_file

FORMATS = ("timm",)
TIMM_SIZES = {"ti": "tiny", "s": "small", "b": "base"}


def export_timm(trained: TrainedModel, out: Path) -> tuple[Path, ...]:
    """Write a model under timm's names and return the files written.

    `out` ending in .safetensors is one file, whose metadata holds the configuration; any other name is a folder of
    model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

    Raises:
        Mistake: the network is none of timm's DeiTs.
        Failure: the disk is full or not writable.
    """
    if not isinstance(trained.model, VisionTransformer):
        raise Mistake(f"{trained.recipe.model.arch} has no timm layout here", expected="a deit_* or vit_* network")
    config = timm_config(trained)
    one_file = out.suffix == ".safetensors"
    file = out if one_file else out / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    augment = trained.recipe.augment
    own = {"classes": trained.classes, "input": {name: getattr(augment, name) for name in INPUT_FIELDS}}
    metadata = {"format": "pt", METADATA: json.dumps(own), "timm": json.dumps(config)}
    tensors = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    try:
        with whole_file(file) as opened:
            opened.write(save(tensors, metadata))
    except OSError as error:
        raise Failure(
            f"cannot write {file}", found=str(error), remedy="free some space, or check the rights"
        ) from error
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
        "num_classes": trained.outputs,
        "model_args": {"img_size": augment.size, "patch_size": model.patch},
        "pretrained_cfg": {
            "input_size": [3, augment.size, augment.size],
            "fixed_input_size": True,
            "num_classes": trained.outputs,
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
