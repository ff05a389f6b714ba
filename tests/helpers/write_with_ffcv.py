"""Writes train.beton and val.beton with FFCV's own DatasetWriter, in a process of its own; see `read_with_ffcv`.

python write_with_ffcv.py FOLDER
"""

import sys
from pathlib import Path

from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.sample_images import drawn


class Drawn:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple:
        return drawn(30 + index, 40, index), index % 5


if __name__ == "__main__":
    for split, size in (("train", 40), ("val", 8)):
        fields = {
            "image": RGBImageField(write_mode="proportion", compress_probability=0.5, jpeg_quality=95),
            "label": IntField(),
        }
        DatasetWriter(f"{sys.argv[1]}/{split}.beton", fields, num_workers=2).from_indexed_dataset(
            Drawn(size), chunksize=4
        )
