"""What is special about an image file as found, and what was done to it: conversion counts it, `info` shows it."""

from collections.abc import Iterable
from enum import IntFlag
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
"""EXIF's tag."""


class Kind(IntFlag):
    """What was done to an image (one of the first three) and what was special about it."""

    PASSED = 1
    REENCODED = 2
    RAW = 4
    SHRUNK = 8
    GRAY = 16
    CMYK = 32
    DEEP = 64
    PALETTE = 128
    ALPHA = 256
    ROTATED = 512
    MISNAMED = 1024
    FRAMES = 2048
    FLOAT = 4096
    LONG = 8192
    NARROW = 16384
    DISPUTED = 32768


KIND_NAMES = {
    Kind.PASSED: "passed through",
    Kind.REENCODED: "re-encoded",
    Kind.RAW: "stored raw",
    Kind.SHRUNK: "shrunk",
    Kind.GRAY: "gray",
    Kind.CMYK: "CMYK",
    Kind.DEEP: "16-bit",
    Kind.PALETTE: "palette",
    Kind.ALPHA: "transparent",
    Kind.ROTATED: "EXIF-rotated",
    Kind.MISNAMED: "named JPEG but not one",
    Kind.FRAMES: "first of several frames",
    Kind.FLOAT: "floating-point",
    Kind.LONG: "32-bit integers",
    Kind.NARROW: "few of their bits used",
    Kind.DISPUTED: "not read by every decoder",
}
"""How `DatasetSpec` and the summary call them."""
REMARKS = {
    Kind.FLOAT: "floating-point pixels: white is 1 where none is above it, else 255",
    Kind.LONG: "32-bit integers: white is the smallest of 255, 4095 and 65535 that no pixel exceeds",
    Kind.NARROW: "16 bits a channel of which at most 12 are used: in gray images white is the smaller of 255 and 4095 "
    "that no pixel exceeds; color images stay as dark as they are",
}
"""What is said once of kinds whose pixels are converted by a rule that may not be the right one."""


def count_kinds(kinds: np.ndarray) -> dict[str, int]:
    """Count the names of Kind over uint16 [n], leaving out zeros."""
    counts = {name: int(np.count_nonzero(kinds & kind)) for kind, name in KIND_NAMES.items()}
    return {name: count for name, count in counts.items() if count}


def image_attributes(image: Image.Image, name: str) -> Kind:
    """Return what is special about an image, from its header."""
    kind = Kind(0)
    mode = image.mode
    if mode in ("1", "L", "LA", "La", "F") or mode.startswith("I"):
        kind |= Kind.GRAY
    if mode == "F":
        kind |= Kind.FLOAT
    if mode == "CMYK":
        kind |= Kind.CMYK
    if mode == "I" and any(";32" in str(raw) for raw in _raw_modes(image)):
        kind |= Kind.LONG
    elif mode.startswith("I") or any(str(raw)[-4:-1] == ";16" for raw in _raw_modes(image)):
        kind |= Kind.DEEP
    if mode in ("P", "PA"):
        kind |= Kind.PALETTE
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        kind |= Kind.ALPHA
    if "exif" in image.info and _orientation(image) in range(2, 9):
        kind |= Kind.ROTATED
    if image.format not in ("JPEG", "MPO") and name.lower().endswith((".jpg", ".jpeg")):
        kind |= Kind.MISNAMED
    if image.format not in ("JPEG", "MPO") and _has_more_frames(image):
        kind |= Kind.FRAMES
    return kind


def _raw_modes(image: Any) -> Iterable[object]:
    """Return the decoder's arguments of each tile: Pillow names the file's own depth nowhere else."""
    for _, _, _, arguments in image.tile:
        yield arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")


def _has_more_frames(image: Image.Image) -> bool:
    """Say whether there are further frames, or pages of a TIFF."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # the second one is damaged, which is no reason to refuse the first
        return True


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF is no reason to refuse an image whose orientation no user uses
        return None
