"""The operations against timm, torchvision and Pillow, pixel for pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipelines.augment.torch_ops import ops
from pipelines.augment.torch_ops.affine import FILL
from pipelines.rng.policies import AUTOAUGMENT, OPERATIONS, RANDAUGMENT
from tools.parity import timm_ops
from tools.parity.pictures import pictures

MAGNITUDES = np.array([0.0, 1 / 3, 2.5, 5.0, 7.4999, 9.0, 9.99, 10.0])
SIGNED = np.round(np.concatenate([MAGNITUDES, -MAGNITUDES]) * 65536) / 65536
SIZES = [(32, 32), (29, 20), (1, 9), (9, 1), (2, 3), (3, 3), (1, 1)]  # at 20 px and m = 5 borders are hit exactly


def apply(name: str, images: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    batch = torch.from_numpy(images.copy())
    ops.apply(name, batch, torch.arange(len(images)), torch.from_numpy(ops.arguments(name, magnitudes)))
    return batch.numpy()


def assert_timms(name: str, images: np.ndarray, magnitudes: np.ndarray) -> None:
    expected = np.stack([timm_ops.apply(name, i, m) for i, m in zip(images, magnitudes, strict=True)])
    worst = np.abs(apply(name, images, magnitudes).astype(int) - expected).reshape(len(images), -1).max(1)
    assert worst.max() <= timm_ops.ROUNDING, f"{name} at m = {magnitudes[worst.argmax()]}: off by {worst.max()}"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ops.TABLE)
def test_operation_is_timms(name, size):
    images = np.repeat(np.stack(list(pictures(*size).values())), len(SIGNED), axis=0)
    assert_timms(name, images, np.tile(SIGNED, len(images) // len(SIGNED)))


@pytest.mark.parametrize("name", ops.TABLE)
def test_operation_is_timms_at_224(name):
    images = pictures(224, 224)
    assert_timms(name, np.stack([images["photograph"], images["noise"]] * 2), np.array([9.0, -9.0, -8.437, 9.731]))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(ops.TABLE)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    magnitude=st.integers(-10 * 65536, 10 * 65536),
    seed=st.integers(0, 1000),
)
def test_operation_is_timms_anywhere(name, size, magnitude, seed):
    images = np.stack(list(pictures(size[0], size[1], seed).values()))
    assert_timms(name, images, np.full(len(images), magnitude / 65536))


def test_table_is_the_recipes():
    """Names in their order: the index into OPERATIONS is what tables of drawn views hold."""
    assert tuple(ops.TABLE) == OPERATIONS[1:]
    assert set(OPERATIONS[1:]) == set(timm_ops.NAMES)
    assert OPERATIONS[1 : 1 + RANDAUGMENT] == tuple(timm_ops.OURS[drawn.name] for drawn in timm_ops.RANDAUGMENT.ops)
    assert timm_ops.FILL == FILL


def test_sub_policies_are_timms():
    theirs = [
        [(timm_ops.OURS[step.name], step.prob, step.magnitude) for step in sub] for sub in timm_ops.AUTOAUGMENT.policy
    ]
    assert [list(sub_policy) for sub_policy in AUTOAUGMENT] == theirs


@pytest.mark.parametrize("name", sorted(set(ops.TABLE) - {"Rotate"}))
def test_arguments_are_timms(name):
    """At magnitudes that every step of an integer argument lies between, and at either side of each."""
    magnitudes = np.concatenate([np.arange(-10 * 65536, 10 * 65536 + 1, 641), np.arange(-2560, 2561) * 256]) / 65536
    expected = [(timm_ops.arguments(name, magnitude) or (0,))[0] for magnitude in magnitudes.tolist()]
    assert ops.arguments(name, magnitudes)[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Posterize", 1), ("Solarize", 26), ("SolarizeAdd", 99), ("Color", 1.81), ("ShearX", 0.27),
        ("TranslateY", 0.405),
        ("PosterizeOriginal", 7), ("SolarizeOriginal", 230), ("ColorOriginal", 1.72), ("JitterContrast", 9),
    ],
)  # fmt: skip
def test_arguments_at_the_papers_magnitude(name, expected):
    assert ops.arguments(name, np.array([9.0]))[0, 0] == pytest.approx(expected, abs=1e-12)


def test_rotation_turns_against_the_clock():
    """A positive angle brings the top to the left, as Image.rotate does."""
    image = np.zeros((1, 33, 33, 3), np.uint8)
    image[:, :4] = 255
    turned = apply("Rotate", image, np.array([10.0]))[0, ..., 0].astype(int)
    assert turned[8, 2] == 255
    assert turned[8, 30] == 0


def test_posterize_to_no_bits_is_black_where_pillow_refuses():
    image = pictures(8, 8)["noise"]
    assert not apply("Posterize", image[None], np.array([10.0])).any()
    with pytest.raises(ValueError, match="bits must be between"):
        ImageOps.posterize(Image.fromarray(image), 0)


@pytest.mark.parametrize("name", ops.TABLE)
def test_only_the_named_rows_change_and_pieces_do_not_matter(name, monkeypatch):
    images = np.stack(list(pictures(20, 20).values()))
    rows = torch.tensor([6, 0, 3])
    arguments = torch.from_numpy(ops.arguments(name, np.array([9.0, -8.0, 10.0])))
    whole, pieces = torch.from_numpy(images.copy()), torch.from_numpy(images.copy())
    ops.apply(name, whole, rows, arguments)
    monkeypatch.setattr(ops, "PIXELS_AT_ONCE_CPU", 1)
    ops.apply(name, pieces, rows, arguments)
    others = [1, 2, 4, 5, 7, 8]
    assert np.array_equal(whole.numpy()[others], images[others])
    assert not np.array_equal(whole.numpy()[rows], images[rows])
    assert torch.equal(whole, pieces)
