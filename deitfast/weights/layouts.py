"""Whose names the tensors of a network have, and the same tensors under the names that deitfast's models have.

Transformers are given timm's names, CNNs torchvision's. DeiT III's networks become DeiT's: a layer scale gamma on a
branch y = W x + b is the same function as W' = diag(gamma) W, b' = gamma b, and positions without one for the class
token are positions with a zero for it. Nothing of the function changes.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from deitfast.weights.huggingface import ANCHORS as HUGGING_FACE
from deitfast.weights.huggingface import is_hugging_face, to_timm
from deitfast.weights.state_dict import listed
from pipelines.errors import UserError

VIT = "patch_embed.proj.weight"
RESNET, REGNET = "layer1.0.conv1.weight", "trunk_output.block1.block1-0.f.a.0.weight"
TIMM_REGNET = "s1.b1.conv1.conv.weight"
TORCHVISION_VIT = "conv_proj.weight"
ANCHORS = (VIT, TORCHVISION_VIT, RESNET, REGNET, TIMM_REGNET, *HUGGING_FACE)
"""One name of every network that can be read."""
SCALED = {"1": "attn.proj", "2": "mlp.fc2"}
"""The layer that each of a block's layer scales follows."""
LAYER_SCALE = re.compile(r"(blocks\.\d+\.)(?:gamma_|ls)([12])(?:\.gamma)?")
UNUSED = re.compile(r"(mask_token|decoder_\w+|decoder)(\.|$)|pre_logits\.(weight|bias)$|(head\.(mlp|last_layer))\.")
"""Parts of self-supervised training that no classifier uses: BEiT's and DINOv2's mask, MAE's decoder, DINO's head."""
FOREIGN = {
    "reg_token": "register tokens (DINOv2 with registers)",
    "register_tokens": "register tokens (DINOv2 with registers)",
    "norm_pre.weight": "a norm before the blocks (CLIP)",
    "blocks.0.attn.relative_position_bias_table": "relative positions (BEiT)",
    "blocks.0.attn.rel_pos.relative_position_bias_table": "relative positions (BEiT)",
    "rel_pos_bias.relative_position_bias_table": "relative positions (BEiT)",
    "blocks.0.attn.q_norm.weight": "normalized queries and keys",
    "blocks.0.attn.q_bias": "an attention without a key bias (BEiT)",
    "blocks.0.mlp.w12.weight": "gated MLPs (SwiGLU)",
    "blocks.0.mlp.fc1_g.weight": "gated MLPs (SwiGLU)",
    "patch_embed.backbone.conv1.weight": "a convolutional stem (hybrid)",
    "blocks.0.norm3.weight": "blocks with three norms",
    "patch_embed.norm.weight": "a norm after the patches",
    "patch_embed.proj.0.weight": "a convolutional stem",
    "fc_norm.weight": "a classifier on the mean of the patches (global average pooling)",
}
"""What tells a network that is built otherwise, in words."""
HUGGING = "Hugging Face"


class Layout(NamedTuple):
    """A network's tensors under our names."""

    kind: str
    """Whose names the file has, human-readable."""
    tensors: dict[str, Tensor]


def recognize(tensors: dict[str, Tensor], owner: object) -> Layout:
    """Return whose names these are, and the tensors under the names that our models have.

    Raises:
        UserError: they are of no network that deitfast can build; the message says what tells so.
    """
    if is_hugging_face(tensors):
        return Layout(HUGGING, _checked_vit(to_timm(tensors), owner))
    if VIT in tensors:
        kind = "DeiT III" if any(map(LAYER_SCALE.fullmatch, tensors)) else "DeiT and timm"
        return Layout(kind, _checked_vit(_without_layer_scale(tensors, owner), owner))
    if TORCHVISION_VIT in tensors:
        renamed = {_timm_vit(name): value for name, value in tensors.items()}
        return Layout("torchvision", _checked_vit(renamed, owner))
    if TIMM_REGNET in tensors:
        return Layout("timm", {_torchvision_regnet(name): value for name, value in tensors.items()})
    if REGNET in tensors or (RESNET in tensors and "conv1.weight" in tensors):
        return Layout("torchvision", tensors)
    raise UserError(
        f"{owner} holds no network that deitfast knows",
        expected="names as in the official DeiT files, timm, Hugging Face's DeiT and ViT, or torchvision's CNNs",
        found=listed(sorted(tensors)) or "no tensors",
    )


def _checked_vit(tensors: dict[str, Tensor], owner: object) -> dict[str, Tensor]:
    """Return a transformer's tensors without what only its training used.

    Raises:
        UserError: it is built otherwise than ViT and DeiT.
    """
    kept = {name: value for name, value in tensors.items() if not UNUSED.match(name)}
    depth = len({name.split(".")[1] for name in kept if name.startswith("blocks.")})
    patches = kept[VIT]
    found = next((what for name, what in FOREIGN.items() if name in kept), "")
    if not found and "cls_token" not in kept:
        found = "no class token"
    if not found and "pos_embed" not in kept:
        found = "no position embeddings of its own"
    if not found and not depth:
        found = "no blocks"
    if not found and (patches.ndim != 4 or patches.shape[1] != 3):
        found = f"patches of shape {' x '.join(map(str, patches.shape[1:]))}, not of pictures with three colors"
    if not found and kept["pos_embed"].ndim != 3:
        found = f"position embeddings of {kept['pos_embed'].ndim} dimensions"
    if found:
        raise UserError(
            f"{owner} holds a transformer that deitfast cannot build",
            expected="ViT or DeiT: blocks, a class token, learned positions",
            found=found,
            remedy="as a teacher it may work through timm: --teacher timm/NAME --teacher-weights FILE",
        )
    return kept


def _without_layer_scale(tensors: dict[str, Tensor], owner: object) -> dict[str, Tensor]:
    """Return DeiT III's tensors as DeiT's: layer scale multiplied into the layer before, positions with a class."""
    scales = {name: found for name in tensors if (found := LAYER_SCALE.fullmatch(name))}
    plain = {name: value for name, value in tensors.items() if name not in scales}
    for name, found in scales.items():
        gamma, layer = tensors[name].float(), found[1] + SCALED[found[2]]
        for part in ("weight", "bias"):
            old = plain.get(f"{layer}.{part}")
            if old is None or old.shape[:1] != gamma.shape:
                raise UserError(f"{owner}: {name} is not the layer scale of {layer}.{part}")
            plain[f"{layer}.{part}"] = old.float() * gamma.view(-1, *[1] * (old.ndim - 1))
    positions = plain.get("pos_embed")
    if positions is not None and positions.ndim == 3 and "cls_token" in plain and _is_square(positions.shape[1]):
        plain["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
    return plain


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number  # and then neither number - 1 nor number - 2 is one


_TORCHVISION_VIT_RULES = (
    (r"class_token$", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding$", "pos_embed"),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.(?:head|0)\.", "head."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+\.)ln_", r"\1norm"),
    (r"(blocks\.\d+\.)self_attention\.in_proj_", r"\1attn.qkv."),
    (r"(blocks\.\d+\.)self_attention\.out_proj\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)mlp\.(?:0|linear_1)\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)mlp\.(?:3|linear_2)\.", r"\1mlp.fc2."),
)


def _timm_vit(name: str) -> str:
    """Return timm's name for one of torchvision's ViT."""
    for pattern, target in _TORCHVISION_VIT_RULES:
        name = re.sub(f"^{pattern}", target, name)
    return name


_TIMM_REGNET_RULES = (
    (r"trunk_output\.block(\d)\.block\d-(\d+)\.", lambda found: f"s{found[1]}.b{int(found[2]) + 1}."),
    (r"stem\.0\.", "stem.conv."),
    (r"stem\.1\.", "stem.bn."),
    (r"fc\.", "head.fc."),
    (r"(s\d\.b\d+\.)proj\.0\.", r"\1downsample.conv."),
    (r"(s\d\.b\d+\.)proj\.1\.", r"\1downsample.bn."),
    (r"(s\d\.b\d+\.)f\.a\.", r"\1conv1."),
    (r"(s\d\.b\d+\.)f\.b\.", r"\1conv2."),
    (r"(s\d\.b\d+\.)f\.c\.", r"\1conv3."),
    (r"(s\d\.b\d+\.conv\d\.)0\.", r"\1conv."),
    (r"(s\d\.b\d+\.conv\d\.)1\.", r"\1bn."),
    (r"(s\d\.b\d+\.)f\.se\.", r"\1se."),
)


def timm_regnet(name: str) -> str:
    """Return timm's name for one of torchvision's RegNet."""
    for pattern, target in _TIMM_REGNET_RULES:
        name = re.sub(f"^{pattern}", target, name)
    return name


_REGNET_RULES = (
    (r"stem\.conv\.", "stem.0."),
    (r"stem\.bn\.", "stem.1."),
    (r"head\.fc\.", "fc."),
    (r"s(\d)\.b(\d+)\.downsample\.conv\.", r"s\1.b\2.proj.0."),
    (r"s(\d)\.b(\d+)\.downsample\.bn\.", r"s\1.b\2.proj.1."),
    (r"s(\d)\.b(\d+)\.conv1\.conv\.", r"s\1.b\2.f.a.0."),
    (r"s(\d)\.b(\d+)\.conv1\.bn\.", r"s\1.b\2.f.a.1."),
    (r"s(\d)\.b(\d+)\.conv2\.conv\.", r"s\1.b\2.f.b.0."),
    (r"s(\d)\.b(\d+)\.conv2\.bn\.", r"s\1.b\2.f.b.1."),
    (r"s(\d)\.b(\d+)\.conv3\.conv\.", r"s\1.b\2.f.c.0."),
    (r"s(\d)\.b(\d+)\.conv3\.bn\.", r"s\1.b\2.f.c.1."),
    (r"s(\d)\.b(\d+)\.se\.", r"s\1.b\2.f.se."),
)


def _torchvision_regnet(name: str) -> str:
    """Return torchvision's name for one of timm's RegNet: s2.b1 (stages and blocks from 1) is block2.block2-0."""
    for pattern, target in _REGNET_RULES:
        name = re.sub(f"^{pattern}", target, name)
    block = re.match(r"s(\d)\.b(\d+)\.", name)
    if not block:
        return name
    return f"trunk_output.block{block[1]}.block{block[1]}-{int(block[2]) - 1}." + name[block.end() :]
