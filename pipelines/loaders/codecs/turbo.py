"""The cpu loader's codec: libjpeg-turbo and Pillow's resize in compiled code, with Pillow's pixels to the bit.

`crops.c` is compiled at first use, with the machine's C compiler and for its processor, and kept in the user's cache
folder. It is linked with the libjpeg-turbo that Pillow itself uses, so that both decode alike. Where there is no
compiler or no such library, `unavailable` says so, and the loader decodes with nvImageCodec.
"""

import ctypes
import hashlib
import io
import os
import platform
import shutil
import subprocess
import tempfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, _imaging

from pipelines.loaders.codecs.pillow import PillowCodec

SOURCES = (Path(__file__).with_name("crops.c"), *sorted(Path(__file__).parent.glob("*.h")))
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
"""-ffp-contract: Pillow's weights are computed without fused multiply-add, and so must these be."""
IMAGE_COLUMNS = 13
"""File descriptor, offset, size, CRC32 (-1: not known), mode, height, width; top, left, height, width of the window;
first crop, number of crops."""
CROP_COLUMNS = 9
"""The fields of `geometry.Crop`."""
FILTERS = ("bicubic", "bilinear")


class TurboCodec:
    """Decodes windows of JPEGs, and resizes, for one thread at a time.

    Raises:
        OSError: `unavailable()` says why.
    """

    def __init__(self, interpolation: str = "bicubic") -> None:
        self._filter = FILTERS.index(interpolation)
        self._library = library()
        self._codec = self._library.deitfast_codec_new()
        self._pillow = PillowCodec(interpolation)
        if not self._codec:
            raise OSError("libjpeg of another version")

    def __del__(self) -> None:
        if getattr(self, "_codec", None):
            self._library.deitfast_codec_free(self._codec)

    def render(self, images: np.ndarray, crops: np.ndarray, out: np.ndarray, *, check: bool) -> np.ndarray:
        """Read, check, decode and crop a chunk of images in one call that does not hold Python's lock.

        Args:
            images: int64 [n, IMAGE_COLUMNS].
            crops: int64 [m, CROP_COLUMNS].
            out: the batch, uint8 [B, S, S, 3]; black where views do not reach.
            check: compare CRC32s.

        Returns:
            int32 [n]: 0 for images whose crops are in `out`; else they are to be rendered otherwise, or cannot be.
        """
        statuses = np.empty(len(images), np.int32)
        batch = _at(out), out.shape[1]
        self._library.deitfast_render(
            self._codec, _at(images), len(images), _at(crops), *batch, self._filter, check, _at(statuses)
        )
        return statuses

    def decode(self, data: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Decode a window; see `host.Codec`. What libjpeg warns of is Pillow's to decode or to refuse."""
        try:
            full_width, full_height = Image.open(io.BytesIO(data.data)).size
        except OSError:
            full_width = full_height = 0
        window = (full_height, full_width, top, left, height, width)
        image = np.array([-1, 0, len(data), 0, 0, *window, 0, 0], np.int64)
        out = np.empty((height, width, 3), np.uint8)
        if self._library.deitfast_decode(self._codec, _at(np.ascontiguousarray(data)), _at(image), _at(out)) == 0:
            return out
        return self._pillow.decode(data, top, left, height, width)

    def resize(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Resize into `out`; see `host.Codec`."""
        pixels = pixels if pixels.strides[1:] == (3, 1) else np.ascontiguousarray(pixels)
        target = out if out.flags.c_contiguous else np.empty_like(out)
        (rows, columns), (height, width) = pixels.shape[:2], out.shape[:2]
        if self._library.deitfast_resize(
            self._codec, _at(pixels), pixels.strides[0], rows, columns, _at(target), height, width, self._filter
        ):
            raise MemoryError
        if target is not out:
            out[:] = target


def _at(array: np.ndarray) -> int:
    return array.ctypes.data


@cache
def unavailable() -> str:
    """Return the reason why the codec does not work on this machine, "" where it does; compiles it if need be."""
    try:
        library()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


@cache
def library() -> ctypes.CDLL:
    """Return the compiled codec, which has just been compared with Pillow and zlib.

    Raises:
        OSError: there is no compiler or no libjpeg-turbo, or what it makes is not what Pillow makes.
    """
    path = _build(_libjpeg())
    loaded = ctypes.CDLL(str(path))
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.deitfast_codec_new.restype = pointer
    loaded.deitfast_codec_free.argtypes = [pointer]
    loaded.deitfast_crc32.argtypes, loaded.deitfast_crc32.restype = [pointer, ctypes.c_size_t], ctypes.c_uint32
    loaded.deitfast_render.argtypes = [pointer, pointer, long, pointer, pointer, integer, integer, integer, pointer]
    loaded.deitfast_render.restype = None
    loaded.deitfast_decode.argtypes = [pointer] * 4
    loaded.deitfast_resize.argtypes = [pointer, pointer, long, integer, integer, pointer, integer, integer, integer]
    _compare_with_pillow(loaded)
    return loaded


def _libjpeg() -> Path:
    """Return the shared libjpeg-turbo that Pillow has loaded, of the ABI that `libjpeg62.h` describes."""
    _ = _imaging.__name__  # importing it has loaded the library
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        lines = []
    candidates = {line.split(maxsplit=5)[5] for line in lines if "/libjpeg" in line and ".so.62" in line}
    bundled = sorted(candidates, key=lambda path: "illow" not in path)  # other packages may bring their own
    if not bundled:
        raise OSError("Pillow was built with another libjpeg than libjpeg-turbo's shared library (libjpeg.so.62)")
    return Path(bundled[0])


def _build(libjpeg: Path) -> Path:
    """Return the compiled library, from the cache folder if it is there."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (Debian and Ubuntu: apt install gcc)")
    key = hashlib.blake2b(digest_size=8)
    command = " ".join([compiler, *FLAGS, str(libjpeg)])
    for part in (*(file.read_bytes() for file in SOURCES), command.encode(), _processor()):
        key.update(hashlib.blake2b(part).digest())
    name = f"crops-{key.hexdigest()}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deitfast"
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder)) / name
    except OSError:
        made = Path(tempfile.mkdtemp(prefix="deitfast-")) / name
    command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(made), str(libjpeg), f"-Wl,-rpath,{libjpeg.parent}", "-lm"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        shutil.rmtree(made.parent)
        raise OSError(f"{compiler} failed: {(found.stderr.strip().splitlines() or ['no message'])[0]}")
    if made.parent.parent != folder:
        return made
    made.replace(folder / name)  # several processes may compile at once: they make the same
    made.parent.rmdir()
    return folder / name


def _processor() -> bytes:
    """Return what -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})).encode()


def _compare_with_pillow(loaded: ctypes.CDLL) -> None:
    """Decode, resize and check one image as Pillow and zlib do. Raises OSError where they differ."""
    ramps = np.add.outer(np.arange(40) ** 2, np.arange(50) * 5)[:, :, None] // np.array([1, 2, 3])
    pixels = (ramps % 256).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    window = 7, 3, 21, 40
    expected, codec = PillowCodec().decode(data, *window), loaded.deitfast_codec_new()
    if not codec:
        raise OSError("libjpeg-turbo has another ABI than its name says")
    image = np.array([-1, 0, len(data), 0, 0, 40, 50, *window, 0, 0], np.int64)
    found, resized, wanted = np.empty_like(expected), *np.empty((2, 33, 19, 3), np.uint8)
    failed = loaded.deitfast_decode(codec, _at(data), _at(image), _at(found))
    failed |= loaded.deitfast_resize(codec, _at(found), 3 * 40, 21, 40, _at(resized), 33, 19, 0)
    loaded.deitfast_codec_free(codec)
    PillowCodec().resize(expected, wanted)
    same = np.array_equal(found, expected) and np.array_equal(resized, wanted)
    if failed or not same or loaded.deitfast_crc32(_at(data), len(data)) != zlib.crc32(data.data):
        raise OSError("the compiled codec does not give Pillow's pixels")
