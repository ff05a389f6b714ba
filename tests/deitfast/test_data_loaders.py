"""What a recipe is chosen by of a data set."""

from contextlib import closing
from pathlib import Path

from deitfast.data_loaders import typical_side
from pipelines.storage.dataset import Dataset


def test_the_typical_side_is_the_middle_one_of_the_shorter_ones(tiny_dataset: Path) -> None:
    with closing(Dataset.open(tiny_dataset)) as dataset:
        reader, found = dataset.split("train"), typical_side(dataset)
        sides = [sorted(sizes) for sizes in zip(reader.heights.tolist(), reader.widths.tolist(), strict=True)]
    shorter = sorted(short for short, _ in sides)
    assert found == shorter[(len(shorter) - 1) // 2] < sorted(long for _, long in sides)[(len(sides) - 1) // 2]
