"""Images, drawn: one of every kind that some operation treats in its own way."""

import numpy as np
from PIL import Image


def pictures(height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw one image of every kind, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * x * y + 1), x - y], -1) * 90 + 120
    noise = rng.integers(0, 256, (height, width, 3))
    images = {
        "noise": noise,
        "waves": np.clip(waves + rng.normal(0, 6, waves.shape) + 70 * (rng.random((height, width, 1)) < 0.05), 0, 255),
        "flat": np.full((height, width, 3), (37, 0, 255)),
        "two values": np.where(noise < 128, 90, 91),
        "narrow": noise % 40 + 100,
        "black and white": noise // 128 * 255,
        "gray": np.repeat(noise[..., :1], 3, -1),
        "one pixel off": np.full((height, width, 3), 200),
        "photograph": photograph(rng, height, width),
    }
    images["one pixel off"][0, 0] = 3, 250, 199
    return {kind: image.astype(np.uint8) for kind, image in images.items()}


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw something with the spectrum of a photograph: octaves of noise, each half as strong as the one before."""
    total = np.full((height, width, 3), 128.0)
    for octave in range(1, 7):
        noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        total += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) - 128) * 0.5**octave * 1.6
    return total.clip(0, 255).astype(np.uint8)
