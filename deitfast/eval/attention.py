"""What the class token and the distillation token look at: attention rollout (Abnar and Zuidema, 2020).

Each block's attention, averaged over its heads, is mixed half and half with the identity, which stands for the
residual connection; the blocks' matrices multiplied, last on the left, say how much of every patch is in a token.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deitfast.models.vit import Attention, VisionTransformer
from pipelines.errors import UserError

TOKENS = ("class", "distillation")
LARGEST_BATCH = 8
"""Images whose attention is kept at a time: at 224 px a block's is 155 KB an image, before its heads' mean 12 times."""


@torch.no_grad()
def attention_rollout(model: torch.nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Return where each of a transformer's prefix tokens looks.

    Args:
        model: a ViT or DeiT in evaluation mode.
        pixels: normalized, float [B, 3, S, S], on the model's device.

    Returns:
        For "class" and, where there is the token, "distillation": float32 [B, side, side] over the patches, each
        image's sum 1.

    Raises:
        UserError: the network has no attention.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError("--attention needs a transformer", expected="a deit_* or vit_* network")
    maps: list[Tensor] = []
    hooks = [
        block.attn.qkv.register_forward_hook(_collect(block.attn, maps))  # pyright: ignore
        for block in model.blocks
    ]
    try:
        model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    eye = torch.eye(maps[0].shape[-1], device=pixels.device)
    rollout = eye
    for attention in maps:
        rollout = (0.5 * attention + 0.5 * eye) @ rollout
    found = {}
    for number, name in enumerate(TOKENS[: model.prefix]):
        seen = rollout[:, number, model.prefix :]
        side = int(seen.shape[1] ** 0.5)
        found[name] = (seen / seen.sum(dim=1, keepdim=True)).unflatten(1, (side, side)).cpu()
    return found


def _collect(attn: Attention, maps: list[Tensor]) -> Callable[..., None]:
    """Return a hook that computes a block's attention from its queries and keys: the mean over heads, [B, N, N]."""

    def hook(_module: object, _inputs: object, qkv: Tensor) -> None:
        batch, length, width = qkv.shape
        parts = qkv.float().reshape(batch, length, 3, attn.heads, width // 3 // attn.heads)
        query, key, _ = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-2, -1) / (width // 3 // attn.heads) ** 0.5
        maps.append(scores.softmax(dim=-1).mean(dim=1))

    return hook


def overlay(image: np.ndarray, weights: Tensor, side: int = 224) -> Image.Image:
    """Draw weights [n, n] over an image, uint8 [S, S, 3]: what is looked at keeps its light, the rest grows dark."""
    light = weights / weights.max().clamp(min=1e-12)
    mask = Image.fromarray((light.numpy() * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    shown = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    shade = (0.15 + 0.85 * np.asarray(mask, np.float32)[..., None] / 255) * np.asarray(shown, np.float32)
    return Image.fromarray(shade.astype(np.uint8))
