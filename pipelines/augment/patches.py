"""Cutting images into square patches (patchify)."""

from torch import Tensor


def cut_patches(pixels: Tensor, patch: int) -> Tensor:
    """Cut pixels [B, C, H, W] into patches [B, H/p * W/p, C * p * p], row by row, each in the order (C, y, x)."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    tiles = pixels.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(batch, rows * columns, channels * patch * patch)
