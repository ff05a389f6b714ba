"""Hugging Face's names for DeiT and ViT, turned into timm's and back.

`DeiTForImageClassificationWithTeacher` has both heads; `DeiTForImageClassification` a distillation token and the class
head alone; `ViTForImageClassification`, which the undistilled DeiTs are published as, the class token alone;
`DeiTModel` and `ViTModel` no head.
"""

import re

import torch
from torch import Tensor

OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
    "cls_classifier.weight": "head.weight",
    "cls_classifier.bias": "head.bias",
    "distillation_classifier.weight": "head_dist.weight",
    "distillation_classifier.bias": "head_dist.bias",
}
INSIDE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    # transformers 5 calls them so in memory; its files keep the names above
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Names inside a block, without .weight and .bias."""
PATCHES = "embeddings.patch_embeddings.projection.weight"
ANCHORS = (f"deit.{PATCHES}", f"vit.{PATCHES}", PATCHES)
"""The name that all of them have, with a classifier next to the body or without."""
UNUSED = re.compile(r"(pooler\.|embeddings\.mask_token$)")
"""What classification does not use: the pooler of the headless models, and the mask of masked pre-training."""
BODY = re.compile(r"(deit|vit)\.")
BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
QUERY = re.compile(r"(blocks\.\d+\.attn\.)q\.(weight|bias)")


def is_hugging_face(tensors: dict[str, Tensor]) -> bool:
    """Whether names are Hugging Face's DeiT's or ViT's."""
    return any(anchor in tensors for anchor in ANCHORS)


def to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under timm's names, query, key and value merged; names without a counterpart stay."""
    own = {name: value for name, value in tensors.items() if not UNUSED.match(_bare(name))}
    renamed = {_renamed(name): value for name, value in own.items()}
    for name in list(renamed):
        found = QUERY.fullmatch(name)
        parts = [f"{found[1]}{part}.{found[2]}" for part in "qkv"] if found else []
        if found and all(part in renamed for part in parts):
            renamed[f"{found[1]}qkv.{found[2]}"] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a DeiT's or ViT's tensors under the names of Hugging Face's files, queries, keys and values apart."""
    distilled, teacher = "dist_token" in tensors, "head_dist.weight" in tensors
    body = "deit." if distilled else "vit."
    outside = {ours: theirs for theirs, ours in OUTSIDE.items() if not theirs.startswith("c")}
    inside = {ours: theirs for theirs, ours in reversed(INSIDE.items())}
    renamed = {}
    for name, value in tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if name.startswith("head."):
            renamed[("cls_classifier." if teacher else "classifier.") + name.removeprefix("head.")] = value
        elif not block:
            renamed[("" if name.startswith("head_dist.") else body) + outside[name]] = value
        else:
            layer = f"{body}encoder.layer.{block[1]}."
            parts = zip("qkv", value.chunk(3), strict=True) if block[2] == "attn.qkv" else [("", value)]
            for part, rows in parts:
                ours = f"attn.{part}" if part else block[2]
                renamed[f"{layer}{inside[ours]}.{block[3]}"] = rows.clone() if part else rows
    return renamed


def _bare(name: str) -> str:
    return BODY.sub("", name, count=1) if BODY.match(name) else name


def _renamed(name: str) -> str:
    bare = _bare(name)
    if bare in OUTSIDE:
        return OUTSIDE[bare]
    block = BLOCK.fullmatch(bare)
    if block and block[2] in INSIDE:
        return f"blocks.{block[1]}.{INSIDE[block[2]]}.{block[3]}"
    return name
