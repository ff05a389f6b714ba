"""What the loaders' decoders say of a JPEG that Pillow reads: conversion passes through only what all read alike.

Three things tell them apart. nvImageCodec and DALI parse headers more strictly than libjpeg does. libjpeg goes on after
damage to the compressed data with a warning, which FFCV takes for an error. And FFCV's fast inverse DCT overflows where
coefficients are out of range, which gives wrong pixels without a word. One decode by nvImageCodec with the fast DCT
shows all three; its libjpeg-turbo says its warnings on standard error and nowhere else.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from pipelines.storage.jpeg import lacks_tables, read_frame

MEAN_DIFFERENCE = 6.0
"""Most that the fast DCT may differ from Pillow on average, of 255; ImageNet: 1.2, at quality 100 up to 4."""
USUAL_SAMPLING = ((1, 1), (2, 1), (2, 2), (1, 2), (4, 1))
"""Luma's factors where chroma's are 1: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1. FFCV's libjpeg-turbo refuses others."""
MESSAGE = re.compile(
    rb"^(?:\x1b\[[0-9;]*m)*(?:Corrupt JPEG data|Premature end|Invalid SOS|Inconsistent progression"
    rb"|Warning: unknown JFIF|Unknown Adobe|Unsupported marker|Application transferred|\[(?:ERROR|WARNING)\]).*\n?",
    re.MULTILINE,
)
"""A line of libjpeg's or nvImageCodec's among what is written to standard error meanwhile."""
STYLE = re.compile(rb"\x1b\[[0-9;]*m")
_capture = threading.Lock()


def objection(data: bytes, pixels: np.ndarray) -> str:
    """Return why some loader would not read a JPEG as Pillow does, or "".

    Args:
        data: the JPEG, three components, Huffman-coded.
        pixels: what Pillow reads, uint8 [H, W, 3].
    """
    frame = read_frame(data)
    if lacks_tables(data, frame):
        return "a Huffman table is missing, for which only some decoders take the standard's"
    luma, *chroma = frame.sampling
    if luma not in USUAL_SAMPLING or any(factors != (1, 1) for factors in chroma):
        return f"unusual chroma sampling: {luma} and {chroma}"
    decoder = _fast_decoder()
    if decoder is None:
        return ""
    codec, params = decoder
    with _stderr() as messages:
        try:
            image = codec.decode(_module().CodeStream(data), params=params)
        except Exception as error:  # nvImageCodec's exceptions have no common class
            return f"nvImageCodec: {error}"
    if image is None:
        return f"nvImageCodec: {messages[0] if messages else 'cannot decode it'}"
    if messages:
        return f"libjpeg: {messages[0]}"
    found = np.asarray(image)
    if found.shape != pixels.shape:
        return f"nvImageCodec decodes {found.shape[1]} x {found.shape[0]} pixels"
    difference = np.maximum(found, pixels) - np.minimum(found, pixels)
    if (mean := float(difference.mean(dtype=np.float64))) > MEAN_DIFFERENCE:
        return f"coefficients out of range: the fast DCT's pixels differ by {mean:.1f} of 255 on average"
    return ""


def version() -> str:
    """Return the version of the decoder that judges, empty where there is none."""
    module = _module()
    return str(getattr(module, "__version__", "")) if module else ""


@cache
def _module() -> Any:
    try:
        from nvidia import nvimgcodec
    except ImportError:
        return None
    return nvimgcodec


@cache
def _fast_decoder() -> tuple[Any, Any] | None:
    module = _module()
    if module is None:
        return None
    decoder = module.Decoder(
        device_id=module.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[module.Backend(module.BackendKind.CPU_ONLY)],
        options="libjpeg_turbo_decoder:fast_idct=1",
    )
    params = module.DecodeParams(
        apply_exif_orientation=False, color_spec=module.ColorSpec.SRGB, sample_format=module.SampleFormat.I_RGB
    )
    return decoder, params


@contextmanager
def _stderr() -> Iterator[list[str]]:
    """Collect the decoders' messages on standard error while the block runs; whatever else was written goes on."""
    messages: list[str] = []
    with _capture:
        before, memory = os.dup(2), os.memfd_create("stderr")
        os.dup2(memory, 2)
        try:
            yield messages
        finally:
            os.dup2(before, 2)
            written = os.pread(memory, os.fstat(memory).st_size, 0)
            if written:
                messages += [_plain(match[0]) for match in MESSAGE.finditer(written)]
                os.write(2, MESSAGE.sub(b"", written))
            os.close(before)
            os.close(memory)


def _plain(line: bytes) -> str:
    return STYLE.sub(b"", line).decode("ascii", "replace").strip()
