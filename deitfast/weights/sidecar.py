"""What lies next to weights: class names, and how images are fed to the network, as its publisher wrote them.

Read are our own metadata (in a .safetensors file), Hugging Face's config.json and preprocessor_config.json, and
timm's config.json (a file, or the entry "timm" of a .safetensors file's metadata).
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deitfast.config.sections import TransformerShape
from pipelines.errors import UserError
from pipelines.spec import AugmentSpec

log = logging.getLogger(__name__)
INPUT_FIELDS = ("size", "crop", "eval_crop", "eval_resize", "eval_interpolation", "mean", "std")
"""Fields of `AugmentSpec` that evaluation needs besides the weights."""
METADATA, TIMM = "deitfast", "timm"
"""Keys of our own and of timm's entry in a .safetensors file's metadata."""
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
STANDARD_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in a folder whose config.json belongs to them."""
_AUGMENT = TypeAdapter(AugmentSpec)
PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
SQUASHING = ("ViT", "DeiT", "BEiT")
"""Hugging Face's image processors that resize without keeping the aspect ratio, by the start of their names."""


@dataclass(frozen=True)
class Sidecar:
    """What is known of a network besides its tensors."""

    classes: tuple[str, ...] = ()
    """Class names in the order of the outputs; empty: not told."""
    classes_from: str = ""
    """Where they come from."""
    input: Mapping[str, Any] = field(default_factory=dict)
    """Values of `INPUT_FIELDS`, as far as they are told."""
    input_from: str = ""
    """Where they come from."""
    arch: str = ""
    """timm's name of the network; "": not told."""
    norm_eps: float | None = None
    """Epsilon of the LayerNorms, where it is told."""
    heads: int | None = None
    """Attention heads, where they are told."""
    depth: int | None = None
    """Blocks, where they are told."""

    def named(self, num_classes: int, owner: Path) -> "Sidecar":
        """Return this for a classifier of `num_classes`.

        Raises:
            UserError: it names another number of classes.
        """
        if self.classes and num_classes and len(self.classes) != num_classes:
            raise UserError(
                f"{owner} does not belong to its {self.classes_from}",
                expected=f"{num_classes} class names, as many as the classifier has outputs",
                found=f"{len(self.classes)}",
                remedy="copy weights and configuration together again, from one place",
            )
        return self


def read_sidecar(file: Path, metadata: Mapping[str, str]) -> Sidecar:
    """Return what is told of the weights in `file`, whose own metadata is `metadata`.

    Files next to it are read where its name is one of `STANDARD_FILES`.

    Raises:
        UserError: one of them is damaged, or says something that deitfast's networks cannot be.
    """
    if METADATA in metadata:
        return _ours(_json(metadata[METADATA], file, f"{file}, metadata {METADATA!r}"), file)
    if TIMM in metadata:
        where = f"{file}, metadata {TIMM!r}"
        return _timm(_json(metadata[TIMM], file, where), where)
    side = Sidecar()
    if file.name not in STANDARD_FILES:
        return side
    config, processor = file.with_name(CONFIG), file.with_name(PROCESSOR)
    if config.is_file():
        tree = _json(_text(config), config, str(config))
        side = (
            _timm(tree, str(config)) if "pretrained_cfg" in tree or "architecture" in tree else _hugging(tree, config)
        )
    if processor.is_file():
        fed = _processor(_json(_text(processor), processor, str(processor)), processor)
        side = replace(side, input=fed, input_from=str(processor))
    return side


def describe_ours(classes: tuple[str, ...], augment: AugmentSpec, shape: TransformerShape | None) -> str:
    """Return our own metadata of weights, which `read_sidecar` reads: what a `Sidecar` holds of them."""
    told = {"classes": classes, "input": {name: getattr(augment, name) for name in INPUT_FIELDS}}
    return json.dumps(told | ({"heads": shape.heads, "depth": shape.depth} if shape else {}))


def _ours(tree: Mapping[str, Any], file: Path) -> Sidecar:
    where = f"{file}, metadata {METADATA!r}"
    classes = _names(tree.get("classes") or [], where)
    fed = tree.get("input") or {}
    if not isinstance(fed, dict):
        raise _damaged(where, "an object as input", repr(fed))
    return Sidecar(
        classes,
        where,
        _checked({k: v for k, v in fed.items() if k in INPUT_FIELDS}, where),
        where,
        heads=_count(tree, "heads"),
        depth=_count(tree, "depth"),
    )


def _count(tree: object, name: str) -> int | None:
    """Return a number of parts, from 1, if one is told under that name."""
    value = tree.get(name) if isinstance(tree, Mapping) else None
    return value if isinstance(value, int) and value > 0 else None


def _timm(tree: Mapping[str, Any], where: str) -> Sidecar:
    """Read timm's config.json: pretrained_cfg, label_names, architecture and the arguments that shapes do not tell."""
    inner = tree.get("pretrained_cfg")
    fed = {**tree, **(inner if isinstance(inner, dict) else {})}  # older ones have no level of their own
    arguments = tree.get("model_args") if isinstance(tree.get("model_args"), dict) else {}
    labels = fed.get("label_names") or []
    size = fed.get("input_size") or ()
    told: dict[str, Any] = {name: tuple(fed[name]) for name in ("mean", "std") if _is_list(fed.get(name))}
    if _is_list(size) and len(size) == 3:
        told["size"] = size[1]
    if isinstance(arguments, dict) and isinstance(arguments.get("img_size"), int):
        told["size"] = arguments["img_size"]
    if (crop := fed.get("crop_pct")) is not None:
        told["eval_crop"] = crop
    if fed.get("crop_mode") == "squash":
        told["eval_resize"] = "squash"
    elif fed.get("crop_mode") not in (None, "center"):
        log.warning("%s: crop_mode %s is not available; images are cropped at the center", where, fed["crop_mode"])
    if "interpolation" in fed:
        told["eval_interpolation"] = _interpolation(fed["interpolation"], where)
    arch = tree.get("architecture")
    return Sidecar(
        _names(labels, where),
        f"{where} (label_names)",
        _checked(told, where),
        where,
        arch if isinstance(arch, str) else "",
        heads=_count(arguments, "num_heads"),
        depth=_count(arguments, "depth"),
    )


def _hugging(tree: Mapping[str, Any], file: Path) -> Sidecar:
    """Read Hugging Face's config.json: id2label, and what shapes do not tell."""
    act = tree.get("hidden_act", "gelu")
    if act != "gelu" and tree.get("model_type") in ("vit", "deit"):
        raise UserError(f"{file}: this network cannot be computed", expected="hidden_act gelu", found=f"{act}")
    table = tree.get("id2label") or {}
    if not isinstance(table, dict):
        raise _damaged(str(file), "an object as id2label", repr(table))
    try:
        by_number = {int(key): value for key, value in table.items()}
    except ValueError as error:
        raise _damaged(str(file), "numbers as keys of id2label", str(error)) from None
    if set(by_number) != set(range(len(by_number))):
        raise _damaged(str(file), f"id2label of 0 to {len(by_number) - 1}", f"{sorted(by_number)[:5]}, ...")
    labels = [by_number[number] for number in range(len(by_number))]
    names = _names([str(label) if type(label) is int else label for label in labels], str(file))
    if names == tuple(f"LABEL_{number}" for number in range(len(names))):
        names = ()  # what transformers writes where no names were given
    eps, size = tree.get("layer_norm_eps"), tree.get("image_size")
    return Sidecar(
        names,
        f"{file} (id2label)",
        _checked({"size": size} if isinstance(size, int) else {}, str(file)),
        str(file),
        norm_eps=float(eps) if isinstance(eps, int | float) and 0 < eps < 1 else None,
        heads=_count(tree, "num_attention_heads"),
        depth=_count(tree, "num_hidden_layers"),
    )


def _processor(tree: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Read Hugging Face's preprocessor_config.json; what it leaves out is its processor's default."""
    kind = str(tree.get("image_processor_type") or tree.get("feature_extractor_type") or "")
    factor = tree.get("rescale_factor", 1 / 255)
    if tree.get("do_rescale", True) is False or not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-3:
        raise UserError(
            f"{file}: this preprocessing is not available",
            expected="pixels scaled to [0, 1] (rescale_factor 1/255)",
            found=f"do_rescale {tree.get('do_rescale')}, rescale_factor {factor}",
        )
    if tree.get("do_resize", True) is False:
        raise UserError(
            f"{file}: this preprocessing is not available", expected="images resized", found="do_resize false"
        )
    normalized = tree.get("do_normalize", True)
    defaults = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if kind.startswith("ViT"):
        defaults = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    told: dict[str, Any] = {
        "mean": _per_channel(tree.get("image_mean"), defaults[0], file) if normalized else (0.0, 0.0, 0.0),
        "std": _per_channel(tree.get("image_std"), defaults[1], file) if normalized else (1.0, 1.0, 1.0),
    }
    resample = tree.get("resample", 3 if kind.startswith("DeiT") else 2)
    told["eval_interpolation"] = _interpolation(
        PIL_FILTERS.get(resample, str(resample)) if isinstance(resample, int) else str(resample), str(file)
    )
    return _checked(told | _resizing(tree, kind, file), str(file))


def _per_channel(value: Any, default: tuple[float, ...], file: Path) -> tuple[float, ...]:
    """Return a mean or standard deviation of three channels; transformers takes one number for all of them as well."""
    values = default if value is None else tuple(value) if _is_list(value) else (value,) * 3
    if len(values) != 3 or not all(isinstance(number, int | float) for number in values):
        raise _damaged(str(file), "a number, or three, as image_mean and image_std", repr(value))
    return values


def _resizing(tree: Mapping[str, Any], kind: str, file: Path) -> dict[str, Any]:
    """Return input size, share of the crop and way of resizing of a preprocessor_config.json."""
    resized, exact = _sides(tree.get("size", 224), kind, file)
    cropped = resized
    if tree.get("do_center_crop", kind.startswith("DeiT")):
        cropped, _ = _sides(tree.get("crop_size", 224), "", file)
    share = tree.get("crop_pct")
    if isinstance(share, int | float) and 0 < share <= 1 and not exact and cropped == resized:
        return {"size": resized, "eval_crop": share}
    if cropped > resized:
        raise UserError(f"{file}: this preprocessing is not available", found=f"a crop of {cropped} from {resized} px")
    return {"size": cropped, "eval_crop": crop_share(cropped, resized), "eval_resize": "squash" if exact else "shorter"}


def crop_share(size: int, resized: int) -> float:
    """Return the share for which `int(size / share)` is `resized`, whatever floating point rounds to."""
    share = size / resized
    while int(size / share) < resized:
        share = math.nextafter(share, 0)
    return share


def _sides(size: Any, kind: str, file: Path) -> tuple[int, bool]:
    """Return one side of a size in Hugging Face's words, and whether both are resized to it, whatever the image's."""
    if isinstance(size, dict):
        if "shortest_edge" in size and isinstance(size["shortest_edge"], int):
            return size["shortest_edge"], False
        sides = {size.get("height"), size.get("width")}
        if len(sides) == 1 and isinstance(side := sides.pop(), int):
            return side, True
    if isinstance(size, int) and not isinstance(size, bool):
        return size, kind.startswith(SQUASHING)
    raise UserError(f"{file}: this preprocessing is not available", expected="a square image", found=f"size {size!r}")


def _interpolation(name: Any, where: str) -> str:
    if name in ("bicubic", "bilinear"):
        return name
    if name != "random":
        log.warning("%s: interpolation %s is not available; images are resized with bicubic", where, name)
    return "bicubic"


def _checked(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields as `AugmentSpec` takes them.

    Raises:
        UserError: it does not take them.
    """
    try:
        spec = _AUGMENT.validate_python({name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    except (ValidationError, TypeError) as error:
        told = (
            "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
            if isinstance(error, ValidationError)
            else ""
        )
        raise _damaged(where, "how images are fed to the network", told or str(error)) from None
    return {name: getattr(spec, name) for name in fields}


def _names(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, dict) and all(isinstance(number, int) for number in value.values()):
        value = sorted(value, key=value.__getitem__)  # name -> output, as some of timm's have it
    if not (_is_list(value) and all(isinstance(name, str) for name in value)):
        raise _damaged(where, "a list of class names", repr(value)[:60])
    return tuple(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _damaged(str(file), "readable text", str(error)) from None


def _json(text: str, file: Path, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, "JSON", str(error)) from None
    if not isinstance(tree, dict):
        raise _damaged(where, "a JSON object", type(tree).__name__)
    return tree


def _damaged(where: str, expected: str, found: str) -> UserError:
    return UserError(
        f"{where} is damaged or was edited",
        expected=expected,
        found=found,
        remedy="copy weights and configuration again from where they are whole",
    )
