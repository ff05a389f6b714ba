"""Image by image, a batch wants what its rows say."""

import numpy as np
import pytest

from pipelines.loaders.geometry import Geometry, by_image
from pipelines.rng.sampler import Rows


@pytest.mark.parametrize("count", [0, 1, 40])
def test_every_valid_row_is_cut_once_from_the_smallest_window_that_holds_its_images_views(count: int) -> None:
    rng = np.random.default_rng(count)
    geometry = Geometry(*(rng.integers(1, 300, (count, width)) for width in (4, 2, 2)))
    samples, valid, nothing = rng.integers(0, 15, count), rng.random(count) < 0.8, np.zeros(count, int)
    images = by_image(Rows(samples, nothing, nothing, nothing, nothing, valid), geometry)
    assert [image.sample for image in images] == sorted(set(samples[valid].tolist()))
    assert sorted(crop.row for image in images for crop in image.crops) == np.flatnonzero(valid).tolist()
    for image in images:
        rows = [crop.row for crop in image.crops]
        assert set(samples[rows].tolist()) == {image.sample}
        windows = geometry.crop_box[rows]
        top, left = windows[:, :2].min(0)
        bottom, right = (windows[:, :2] + windows[:, 2:]).max(0)
        assert image.window == (top, left, bottom - top, right - left)
        for _, *numbers in image.crops:
            assert all(type(number) is int for number in numbers)
        cut = np.array(image.crops)[:, 1:]
        assert (cut[:, :4] == windows - [top, left, 0, 0]).all()
        assert (cut[:, 4:] == np.column_stack([geometry.resized[rows], geometry.offset[rows]])).all()
