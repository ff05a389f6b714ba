"""Words that messages have in common."""

import pytest

from pipelines.errors import pluralize


@pytest.mark.parametrize(
    ("count", "thing", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (50_000, "image", "50,000 images"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (2, "process", "2 processes"),
        (2, "epoch", "2 epochs"),
        (1.0, "epoch", "1 epoch"),
        (0.75, "epoch", "0.75 epochs"),
        (2, "batch", "2 batches"),
    ],
)
def test_numbers_of_things_in_words(count: float, thing: str, text: str) -> None:
    assert pluralize(count, thing) == text
