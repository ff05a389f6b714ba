"""Predictions for image files: read, decoded and cropped by the loaders that evaluation uses, a batch at a time."""

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deitfast.config.recipe import Recipe
from deitfast.eval.evaluate import HEADS, final_head
from deitfast.models.vit import joint
from pipelines.batch import Loader
from pipelines.errors import DeitfastError, UserError
from pipelines.loaders.factory import choose, open_loader
from pipelines.rng.sampler import EvalSampler
from pipelines.storage.reader import ByteRange, compare_crc
from pipelines.storage.sources.image_folder import IMAGE_SUFFIXES
from pipelines.storage.transcode import BadImageError, EncodedImage, EncodeOptions, transcode
from pipelines.workers import usable_cores

BATCH = 64
"""Images of a batch, at most."""
CHUNK = 4 * BATCH
"""Images that are read and kept in memory at a time."""


@dataclass(frozen=True)
class ImagePrediction:
    """What a model says of one image."""

    name: str
    """The file, or the split and the image's place in it."""
    heads: dict[str, list[tuple[str, float]]]
    """For every head the most probable classes and their probabilities, the most probable first."""
    truth: str | None = None
    """The image's class, where it is known."""
    final: str = "class"
    """Head whose prediction is the model's."""

    @property
    def best(self) -> tuple[str, float]:
        """The model's prediction."""
        return self.heads[self.final][0]


def list_images(paths: Iterable[str], listed: Iterable[str]) -> list[Path]:
    """Return the image files that are meant by `paths`, in order.

    Args:
        paths: files as they are; folders, all images below them by their names' endings, sorted; "-": `listed`.
        listed: further files, a line each; empty lines are left out.

    Raises:
        UserError: a path leads nowhere, or there is no image at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if str(path) == "-":
            found += [Path(line).expanduser() for line in map(str.strip, listed) if line]
        elif path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            found += [file for file in below if file.is_file() and not file.name.startswith("._")]
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no image {path}", expected="image files, folders of images, or - for a list")
    if not found:
        raise UserError("no image to predict", expected=f"files that end in {', '.join(IMAGE_SUFFIXES[:4])}, ...")
    return found


def read_images(
    files: Sequence[Path], recipe: Recipe, on_bad: Callable[[Path, str], object]
) -> Iterator[tuple[list[Path], "ImagesInMemory"]]:
    """Yield image files as they would be stored, `CHUNK` at a time and in order.

    Args:
        files: any number of image files of any format and size.
        recipe: `loader.workers` threads read them.
        on_bad: called with a file that is not a whole image, which is left out, and the reason.
    """
    with ThreadPoolExecutor(recipe.loader.workers or usable_cores()) as pool:
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            names, images = [], []
            for file, read in zip(chunk, pool.map(_read, chunk), strict=True):
                if isinstance(read, str):
                    on_bad(file, read)
                else:
                    names.append(file)
                    images.append(read)
            if images:
                yield names, ImagesInMemory(images)


def open_images(images: "ImagesInMemory", recipe: Recipe, device: torch.device) -> Loader:
    """Return the loader that gives every image once, resized and cropped as the recipe says; close it."""
    spec = recipe.loader
    if spec.name in ("auto", "dali"):  # there is no file of a data set for DALI to map
        spec = replace(spec, name=choose(images, torch.device("cpu")))  # pyright: ignore[reportArgumentType]
    sampler = EvalSampler(images.num_samples, min(BATCH, images.num_samples))
    return open_loader(images, recipe.augment, spec, sampler, train=False, device=device)


def _read(file: Path) -> EncodedImage | str:
    """Return a file as conversion would store it, or the reason why it cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd but readable files
            return transcode(file.read_bytes(), file.name, EncodeOptions())
    except BadImageError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


class ImagesInMemory:
    """A split that is held in memory: a `pipelines.storage.reader.Reader`. All labels are 0."""

    def __init__(self, images: Sequence[EncodedImage]) -> None:
        self.path = Path("images in memory")
        self.num_samples = len(images)
        self.labels = np.zeros(len(images), np.int64)
        self.heights = np.array([image.height for image in images], np.int32)
        self.widths = np.array([image.width for image in images], np.int32)
        self.modes = np.array([image.mode for image in images], np.uint8)
        self.sizes = np.array([len(image.data) for image in images], np.int64)
        self.has_crcs = True
        self.crcs = np.array([image.crc32 for image in images], np.uint32)
        self.file_size, self.index_crc32 = int(self.sizes.sum()), 0
        self._images = images

    def sample(self, index: int) -> np.ndarray:
        """Return one image's bytes, read-only uint8 [size]."""
        return np.frombuffer(self._images[index].data, np.uint8)

    def read_verified(self, index: int) -> np.ndarray:
        """Return `sample(index)` once its CRC32 is right."""
        return compare_crc(self, index, self.sample(index))

    def location(self, index: int) -> ByteRange:
        """Return where an image would be stored."""
        return ByteRange(self.path, 0, int(self.sizes[index]))

    def stored_in(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return that no image is in a file."""
        return np.full(len(samples), -1), np.zeros(len(samples), np.int64)

    def close(self) -> None:
        """Nothing is open."""


def top_predictions(
    names: Sequence[str],
    heads: tuple[Tensor, ...],
    classes: Sequence[str],
    top: int,
    truths: Sequence[str] | None = None,
    prediction: str = "auto",
) -> list[ImagePrediction]:
    """Return the most probable classes of every image under every head, and under two heads' mean.

    Args:
        names: of the images.
        heads: logits, float [N, C] each.
        classes: names of the C classes.
        top: how many classes of each image.
        truths: the images' classes, where they are known.
        prediction: `model.prediction` of the recipe.

    Raises:
        DeitfastError: logits are not finite; the message names the first image.
    """
    all_heads = dict(zip(HEADS, heads, strict=False)) | ({"joint": joint(heads)} if len(heads) > 1 else {})
    best: dict[str, list[list[tuple[str, float]]]] = {}
    for head, logits in all_heads.items():
        bad = (~logits.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise DeitfastError(
                f"the model's logits are not finite (NaN or infinite) for {len(bad):,} of {len(names):,} images",
                found=f"the {head} head for {names[bad[0]]}",
                remedy="take weights from before training diverged",
            )
        # stable: of equal logits the lower class comes first, as in `Metrics`; topk takes any of them
        values, places = (
            each[:, :top] for each in logits.double().softmax(1).sort(dim=1, descending=True, stable=True)
        )
        rows = zip(places.tolist(), values.tolist(), strict=True)
        best[head] = [[(str(classes[i]), float(v)) for i, v in zip(*row, strict=True)] for row in rows]
    truth, final = truths or [None] * len(names), final_head(best, prediction)
    return [
        ImagePrediction(name, {head: rows[number] for head, rows in best.items()}, truth[number], final)
        for number, name in enumerate(names)
    ]


def as_csv(found: Sequence[ImagePrediction]) -> str:
    """Return a line for every image, head and rank: image, truth, head, rank, class, probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "truth", "head", "rank", "class", "probability"])
    for image in found:
        for head, ranked in image.heads.items():
            for rank, (name, probability) in enumerate(ranked, start=1):
                writer.writerow([image.name, image.truth or "", head, rank, name, f"{probability:.6g}"])
    return text.getvalue()


def as_json(found: Sequence[ImagePrediction]) -> str:
    """Return a list with an object for every image: image, truth (where known), heads."""
    rows = []
    for image in found:
        heads = {
            head: [{"class": name, "probability": probability} for name, probability in ranked]
            for head, ranked in image.heads.items()
        }
        rows.append({"image": image.name, "heads": heads} | ({"truth": image.truth} if image.truth else {}))
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
