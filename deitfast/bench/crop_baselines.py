"""Decoding and resizing by other libraries: the same crops on one thread, their pixels held against Pillow's."""

import io
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from deitfast.bench.baseline_loaders import CROPS_ONLY, SkipError, module, package_version
from deitfast.bench.record import OURS, Baseline
from deitfast.bench.timing import HOST, BenchCase, TimingOptions, measure
from deitfast.bench.workbench import Workbench
from deitfast.environment import __version__
from pipelines.loaders.batch_plan import CHUNK
from pipelines.loaders.codecs.pillow import PillowCodec
from pipelines.loaders.factory import available
from pipelines.loaders.geometry import CropTable, Geometry
from pipelines.loaders.host import Codec, HostLoader, TurboLoader, decode_window, image_table, resize_crop
from pipelines.storage.reader import RAW


@dataclass
class SameCrops:
    """One batch's crops, one of each image: what every library is to make of the stored JPEGs."""

    loader: HostLoader
    table: CropTable
    out: np.ndarray
    """uint8 [B, S, S, 3]: where the crops go."""
    files: list[np.ndarray]
    """The stored JPEGs, uint8 [n]."""
    boxes: list[tuple[int, int, int, int, int]]
    """Of each file: the row of `out`; top, left, height and width of its window."""
    stack: ExitStack = field(repr=False)

    @property
    def side(self) -> int:
        """Height and width of a crop."""
        return self.out.shape[1]


def same_crops(bench: Workbench, stack: ExitStack) -> SameCrops:
    """Return the crops of the first batch, each of another image.

    Raises:
        SkipError: there is nothing to compare.
    """
    if bench.recipe.augment.crop != "resized":
        raise SkipError(CROPS_ONLY)
    if (bench.reader.modes == RAW).any():
        raise SkipError("these images are stored as raw pixels")
    if reason := available()["cpu"]:
        raise SkipError(reason)
    once = stack.enter_context(closing(bench.changed(["loader.name=cpu", "augment.repeats=1"])))
    loader = once.loader
    assert isinstance(loader, HostLoader)
    rows, params = loader.plan.draw(0, 0)
    table = CropTable.of(rows, Geometry.of(params))
    crops = zip(table.samples.tolist(), table.windows.tolist(), table.crops[table.first_crop, 0].tolist(), strict=True)
    boxes = [(sample, (row, *window)) for sample, window, row in crops]
    files = [loader.plan.reader.sample(sample) for sample, _ in boxes]
    out = np.zeros((len(rows.samples), *2 * (once.recipe.augment.size,), 3), np.uint8)
    return SameCrops(loader, table, out, files, [box for _, box in boxes], stack)


Render = Callable[[], object]
"""Writes all crops to their rows of `out`."""


def ours(work: SameCrops) -> Render:
    """The cpu loader's codec, CRC32s compared."""
    loader, plan = work.loader, work.loader.plan
    codec: Any = loader.new_codec()
    if isinstance(loader, TurboLoader):
        sources = image_table(plan.reader, work.table)
        parts = [sources[start : start + 4 * CHUNK] for start in range(0, len(sources), 4 * CHUNK)]
        return lambda: [codec.render(part, work.table.crops, work.out, check=plan.spec.check) for part in parts]
    return one_by_one(work, codec)


def one_by_one(work: SameCrops, codec: Codec) -> Render:
    """A codec that is called for each image and each view."""
    images, plan = work.table.images(), work.loader.plan

    def render() -> None:
        for sample, window, crops in images:
            resize_crop(codec, decode_window(plan, codec, sample, *window), crops[0], work.out)

    return render


def pillow(work: SameCrops) -> Render:
    """Pillow as timm and torchvision call it."""

    def render() -> None:
        for data, (row, top, left, height, width) in zip(work.files, work.boxes, strict=True):
            image = Image.open(io.BytesIO(data.tobytes())).convert("RGB").crop((left, top, left + width, top + height))
            work.out[row] = np.asarray(image.resize((work.side, work.side), Image.Resampling.BICUBIC))

    return render


def torchvision(work: SameCrops) -> Render:
    """torchvision's decoder and its v2 transform on tensors, antialiased bicubic."""
    decode, transforms = getattr(module("torchvision.io"), "decode_image", None), module("torchvision.transforms.v2")
    if decode is None:
        raise SkipError("torchvision decodes no images any more")
    work.stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore", DeprecationWarning)  # of the decoder, since torchvision 0.29
    bicubic, size = transforms.InterpolationMode.BICUBIC, [work.side, work.side]
    files = [torch.from_numpy(data.copy()) for data in work.files]
    out = torch.from_numpy(work.out)

    def render() -> None:
        for data, (row, *box) in zip(files, work.boxes, strict=True):
            image = decode(data, mode="RGB")
            crop = transforms.functional.resized_crop(image, *box, size, interpolation=bicubic, antialias=True)
            out[row] = crop.permute(1, 2, 0)

    return render


def opencv(work: SameCrops, *, fast: bool = False) -> Render:
    """libjpeg-turbo's own interface by simplejpeg, and OpenCV's area filter; or whatever both do fastest."""
    decode, cv2 = module("simplejpeg").decode_jpeg, module("cv2")
    work.stack.callback(cv2.setNumThreads, cv2.getNumThreads())
    cv2.setNumThreads(0)
    how, size = cv2.INTER_LINEAR if fast else cv2.INTER_AREA, (work.side, work.side)

    def render() -> None:
        for data, (row, top, left, height, width) in zip(work.files, work.boxes, strict=True):
            image = decode(data, "RGB", fastdct=fast, fastupsample=fast)
            cv2.resize(image[top : top + height, left : left + width], size, dst=work.out[row], interpolation=how)

    return render


def ffcv(work: SameCrops) -> Render:
    """FFCV's decoder and resize, as its random resized crop calls them."""
    with module("pipelines.loaders.ffcv").quiet():
        compiled = module("ffcv.libffcv")
    reader = work.loader.plan.reader
    sizes = [(int(reader.heights[sample]), int(reader.widths[sample])) for sample in work.table.samples]
    whole = np.empty(3 * max(height * width for height, width in sizes), np.uint8)

    def render() -> None:
        for data, (height, width), (row, y, x, h, w) in zip(work.files, sizes, work.boxes, strict=True):
            image = whole[: 3 * height * width].reshape(height, width, 3)
            compiled.imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
            compiled.resize_crop(image, y, y + h, x, x + w, work.out[row])

    return render


def spdl(work: SameCrops) -> Render:
    """SPDL's image path: FFmpeg's decoder with a filter that crops and resizes."""
    io_ = module("spdl.io")
    try:
        io_.demux_image(work.files[0].tobytes())
    except RuntimeError as missing:
        raise SkipError("SPDL finds no FFmpeg (Debian and Ubuntu: libavdevice, libavfilter)") from missing
    config = io_.decode_config(decoder_options={"threads": "1"})
    scale = f"scale={work.side}:{work.side}:flags=bicubic,format=rgb24"

    def render() -> None:
        for data, (row, top, left, height, width) in zip(work.files, work.boxes, strict=True):
            packets = io_.demux_image(data.tobytes())
            crop = f"crop={width}:{height}:{left}:{top}:exact=1,{scale}"
            frames = io_.decode_packets(packets, filter_desc=crop, decode_config=config)
            work.out[row] = io_.to_numpy(io_.convert_frames(frames)).reshape(work.side, work.side, 3)

    return render


def dali(work: SameCrops) -> Render:
    """DALI's region decoder and antialiased bicubic, on the CPU, one thread."""
    package, fn, types = module("nvidia.dali"), module("nvidia.dali.fn"), module("nvidia.dali.types")
    boxes = np.array([box[1:] for box in work.boxes], np.int32)
    feeds = (work.files, list(boxes[:, :2]), list(boxes[:, 2:]))

    @package.pipeline_def(batch_size=len(work.files), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        files, corner, size = fn.external_source(source=lambda: feeds, num_outputs=3)
        images = fn.decoders.image_slice(
            files, start=corner, shape=size, axis_names="HW", output_type=types.RGB, adjust_orientation=False
        )
        return fn.resize(
            images, size=[work.side, work.side], interp_type=types.INTERP_CUBIC, antialias=True, mode="stretch"
        )

    built = pipeline()
    built.build()
    rows = [box[0] for box in work.boxes]

    def render() -> None:
        work.out[rows] = built.run()[0].as_array()

    return render


def difference(work: SameCrops, render: Render) -> float:
    """Return the mean difference of the crops from the reference loader's, in levels of 255.

    That is Pillow's, width first, as Pillow has always resized before version 13, which may begin with the height.
    """
    one_by_one(work, PillowCodec())()
    expected = work.out.copy()
    work.out[:] = 0
    render()
    return float(np.abs(work.out.astype(np.int16) - expected).mean())


@dataclass(frozen=True)
class Peer:
    """A library, and how to make the crops with it."""

    distribution: str
    """The start of its name: DALI's ends in the version of CUDA."""
    what: str
    open: Callable[[SameCrops], Render]
    """Raises `SkipError` or ModuleNotFoundError where it cannot be measured."""


PEERS = {
    "Pillow": Peer("pillow", "decoded whole, cropped, bicubic", pillow),
    "torchvision v2": Peer("torchvision", "decode_image, resized_crop, antialiased bicubic", torchvision),
    "simplejpeg + OpenCV": Peer("simplejpeg", "decoded whole, INTER_AREA", opencv),
    "simplejpeg + OpenCV, fastest": Peer("simplejpeg", "fast DCT and upsampling, bilinear", partial(opencv, fast=True)),
    "FFCV": Peer("ffcv", "its decoder and INTER_AREA, without its loader", ffcv),
    "SPDL": Peer("spdl", "FFmpeg decodes, crops, resizes bicubic", spdl),
    "DALI on the CPU": Peer("nvidia-dali", "decodes the region, antialiased bicubic", dali),
}


def compare_crops(bench: Workbench, timing: TimingOptions) -> tuple[Baseline, ...]:
    """Measure ours and every library that is installed round by round, all on one thread."""
    with ExitStack() as stack:
        try:
            work = same_crops(bench, stack)
        except SkipError as reason:
            return tuple(Baseline(name, "crops", None, str(reason)) for name in PEERS)
        torch.set_num_threads(1)  # `benchmark` sets it back
        renders = {OURS: ours(work)}
        found = {OURS: Baseline(OURS, "crops", None, version=f"deitfast {__version__}")}
        for name, peer in PEERS.items():
            try:
                renders[name] = peer.open(work)
                found[name] = Baseline(name, "crops", None, version=package_version(peer.distribution))
            except SkipError as reason:
                found[name] = Baseline(name, "crops", None, str(reason))
            except ModuleNotFoundError as missing:
                found[name] = Baseline(name, "crops", None, f"{missing.name} is not installed")
        what = {OURS: f"the cpu loader's {type(work.loader.new_codec()).__name__}, CRC32 compared"}
        what |= {name: peer.what for name, peer in PEERS.items()}
        differences = {name: difference(work, render) for name, render in renders.items()}
        cases = [BenchCase(name, what[name], None, len(work.out), render, True) for name, render in renders.items()]
        for each in measure(cases, HOST, timing):
            found[each.name] = replace(found[each.name], measured=each, difference=differences[each.name])
        return tuple(found.values())
