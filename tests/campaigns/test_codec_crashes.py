"""Mutated JPEGs in the compiled codec, in a process of its own: no crash, and no other pixels than Pillow's."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.loaders.codecs import turbo
from pipelines.loaders.codecs.pillow import PillowCodec
from tests.helpers.stored_images import jpeg, photo

CASES = 10_000
"""Without --cases: they take some seconds."""


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip bits, cut, repeat, drop or overwrite a part; in most cases in the headers, where it hurts most."""
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if len(content) < 60:
            break
        reach = min(len(content), 700) if rng.random() < 0.6 else len(content)
        at, length = int(rng.integers(2, reach)), int(rng.integers(1, 40))
        match int(rng.integers(0, 5)):
            case 0:
                content[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                content[at : at + length] = rng.bytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length]
            case _:
                del content[max(at, 20) :]
    return bytes(content)


def campaign(cases: int, seed: int) -> None:
    rng, codec, pillow = np.random.default_rng(seed), turbo.TurboCodec(), PillowCodec()
    originals = [
        (h, w, jpeg(photo(rng, h, w), subsampling=n % 3, progressive=n % 4 == 0))
        for n, (h, w) in enumerate(rng.integers(1, 90, (40, 2)).tolist())
    ]
    file = os.memfd_create("mutated")
    crops, out = np.zeros((1, turbo.CROP_COLUMNS), np.int64), np.zeros((1, 32, 32, 3), np.uint8)
    rendered = wrong = 0
    for case in range(cases):
        height, width, original = originals[case % len(originals)]
        data = mutated(rng, original)
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        window = (int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
        os.ftruncate(file, 0)
        os.pwrite(file, data, 0)
        images = np.array([[file, 0, len(data), -1, 0, height, width, *window, 0, 1]], np.int64)
        crops[0, 3:7] = h, w, 32, 32
        if codec.render(images, crops, out, check=True)[0]:
            continue
        rendered += 1
        try:
            pixels = pillow.decode(np.frombuffer(data, np.uint8), *window)
        except (ValueError, OSError, SyntaxError):
            continue  # damage behind the window
        expected = np.empty((32, 32, 3), np.uint8)
        pillow.resize(pixels, expected)
        wrong += not np.array_equal(out[0], expected)
    sys.stdout.write(f"{cases} cases, {rendered} rendered, {wrong} with other pixels than Pillow's\n")


SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["-march=x86-64-v3"], SANITIZED], ids=["fast", "avx2", "sanitized"])
def test_no_mutated_jpeg_ends_the_process(
    extra: list[str], cases: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if turbo.unavailable() or (extra[:1] == ["-march=x86-64-v3"] and b" avx2 " not in turbo._processor()):
        pytest.skip(turbo.unavailable() or "this processor has no AVX2")
    count = cases if request.config.getoption("--cases", default=0) else CASES
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    if extra is SANITIZED:  # its library has to be loaded before any other
        found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
        if not Path(found.stdout.strip()).is_absolute():
            pytest.skip("there is no address sanitizer")
        environment |= {"CC": "gcc", "LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    code = (
        "from pipelines.loaders.codecs import turbo; from tests.campaigns.test_codec_crashes import campaign; "
        f"turbo.FLAGS = (*turbo.FLAGS, *{extra}); campaign({count}, 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(" 0 with other pixels than Pillow's"), done.stdout
