"""The drawn set: deterministic, balanced, odd in size, and not to be told apart by color."""

import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipelines.storage.sources.demo import CLASSES, SIDES, draw, open_demo
from pipelines.storage.sources.factory import open_source


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image)


def test_default_set() -> None:
    source = open_source("demo", None)
    assert (source.kind, source.classes) == ("demo", CLASSES)
    assert len(CLASSES) == 10
    assert list(CLASSES) == sorted(CLASSES)
    assert {split: len(entries) for split, entries in source.splits.items()} == {"train": 4000, "val": 1000}
    for entries in source.splits.values():
        assert set(np.bincount([entry.label for entry in entries]).tolist()) == {len(entries) // 10}
        assert len({entry.name for entry in entries}) == len(entries)
    source.close()


def test_one_training_label_in_five_is_wrong_and_no_validation_label() -> None:
    source = open_demo(1000, 100)
    shown = {split: np.arange(len(entries)) % 10 for split, entries in source.splits.items()}
    labels = {split: np.array([entry.label for entry in entries]) for split, entries in source.splits.items()}
    assert (labels["val"] == shown["val"]).all()
    wrong = labels["train"] != shown["train"]
    assert wrong.mean() == 0.2
    pairs = set(zip(shown["train"][wrong].tolist(), labels["train"][wrong].tolist(), strict=True))
    assert len(pairs) == 90  # every class is taken for every other one
    for entry in source.splits["train"]:
        assert entry.name.split("/")[1] == CLASSES[entry.label]


def test_images_are_functions_of_seed_split_and_index() -> None:
    small, large, other = open_demo(20, 20), open_demo(40, 20), open_demo(20, 20, seed=1)
    first = [small.read(entry) for entry in small.splits["train"]]
    assert first == [large.read(entry) for entry in pickle.loads(pickle.dumps(large)).splits["train"][:20]]
    everything = [
        source.read(entry) for source in (small, other) for split in source.splits.values() for entry in split
    ]
    assert len(set(everything)) == 80


def test_sizes_are_odd_and_stated_bounds_hold() -> None:
    source = open_demo(300, 0)
    shapes = []
    for entry in source.splits["train"]:
        data = source.read(entry)
        assert len(data) <= entry.size
        shapes.append(pixels(bytes(data)).shape[:2])
    sides = np.array(shapes)
    assert sides.min() == SIDES[0]
    assert sides.max() == SIDES[1]
    assert (sides % 2).mean() > 0.3
    assert (sides[:, 0] != sides[:, 1]).mean() > 0.7
    assert (sides.max(1) / sides.min(1)).max() < 1.25  # a square crop keeps most of any image


def resampled(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images as uint8 [N, 32, 32, 3], and what they show."""
    source = open_demo(number, number)
    entries = source.splits[split]
    images = [Image.open(BytesIO(bytes(source.read(entry)))).resize((32, 32)) for entry in entries]
    return np.stack([np.asarray(image) for image in images]), np.arange(number) % 10


def nearest_mean(train: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> float:
    """Accuracy of the nearest class mean, features scaled to unit variance."""
    mean, std = train.mean(0), train.std(0)
    train, val = (train - mean) / std, (val - mean) / std
    centers = np.stack([train[labels == label].mean(0) for label in range(10)])
    return float((((val[:, None] - centers) ** 2).sum(2).argmin(1) == val_labels).mean())


def test_color_says_nothing_and_structure_does() -> None:
    train, labels = resampled("train", 500)
    val, val_labels = resampled("val", 300)
    by_color = nearest_mean(train.mean((1, 2)), labels, val.mean((1, 2)), val_labels)
    assert by_color < 0.2  # chance is .1

    def structure(images: np.ndarray) -> np.ndarray:
        """Log power over spatial frequency rings of the gray image: blind to place, turn and color."""
        gray = images.mean(3)
        gray = (gray - gray.mean((1, 2), keepdims=True)) / gray.std((1, 2), keepdims=True)
        power = np.abs(np.fft.fft2(gray)) ** 2
        rings = np.hypot(*np.meshgrid(np.fft.fftfreq(32, 1 / 32), np.fft.fftfreq(32, 1 / 32))).astype(int)
        return np.log(np.stack([power[:, rings == ring].mean(1) for ring in range(1, 16)], axis=1))

    assert nearest_mean(structure(train), labels, structure(val), val_labels) > 0.3


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_can_be_seen(class_name: str) -> None:
    for number in range(5):
        image = draw(class_name, np.random.default_rng(number))
        assert image.dtype == np.uint8
        assert image.astype(float).std() > 15
