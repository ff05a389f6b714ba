"""What a source of images offers to conversion: its classes, its splits, and a way to read one image."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Entry:
    """One image to convert."""

    name: str
    """Names the image in messages: "train/n01440764/n01440764_10026.JPEG" or "data_batch_1#17"."""
    label: int
    """Index into the source's classes."""
    where: Any
    """Picklable locator that the source understands."""
    size: int
    """Bytes as stored in the source (an upper bound is fine): for sizing pages and for progress."""


@dataclass(frozen=True)
class Source(ABC):
    """A set of labeled images somewhere outside. Worker processes get a copy of it with `splits` empty."""

    kind: str
    """imagenet, cifar10, cifar100, folder, wds or demo."""
    origin: str
    """Where the images come from, human-readable."""
    classes: tuple[str, ...]
    """Class names in label order."""
    splits: dict[str, list[Entry]]
    """Split names (train, val) and their images, in the order they will have in the dataset."""

    @abstractmethod
    def read(self, entry: Entry) -> bytes | np.ndarray:
        """Return the encoded file's bytes, or raw pixels as uint8 [H, W, 3].

        Raises:
            OSError, DeitfastError: the image cannot be read at all. That stops a conversion, whatever is skipped.
        """


@dataclass(frozen=True)
class InMemory(Source):
    """Images that are in memory already: `where` is the encoded file's bytes, or raw pixels."""

    def read(self, entry: Entry) -> bytes | np.ndarray:
        """Return what the entry holds."""
        return entry.where
