"""The whole way from crops and drawn parameters to the model's input, against a plain reading of the recipe."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augment.chain import AugmentedBatch, augment, mix, normalize
from pipelines.augment.torch_ops import ops
from pipelines.batch import Batch
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.view_params import ViewParams
from pipelines.spec import AugmentSpec
from tests.helpers.drawn_batches import batch_of, drawn_batch, empty
from tools.parity import plain, timm_ops
from tools.parity.pictures import pictures

SPEC = AugmentSpec(size=32, seed=(3 << 40) + 11)


def taken(batch: Batch, rows: np.ndarray) -> Batch:
    """The batch's rows in another order, with partners renumbered to match."""
    params = ViewParams(batch.params.table[rows])
    new_row = np.argsort(rows)
    params.mix_index[:] = new_row[params.mix_index]
    return Batch(batch.images[rows], batch.labels[rows], batch.valid[rows], params)


def train(batch: Batch, spec: AugmentSpec = SPEC, dtype: torch.dtype = torch.float32) -> AugmentedBatch:
    return augment(batch, spec, dtype=dtype, train=True)


def assert_plain(batch: Batch, spec: AugmentSpec = SPEC) -> None:
    got = train(batch, spec).pixels.permute(0, 2, 3, 1).numpy()
    within = 1e-5 if timm_ops.ROUNDING == 0 else 1 / 255 / min(spec.std)
    np.testing.assert_allclose(got, plain.augmented(batch, spec), rtol=0, atol=within)


@pytest.mark.parametrize("seed", range(4))
def test_chain_is_the_recipe_read_plainly(seed):
    assert_plain(drawn_batch(seed))


@pytest.mark.parametrize("size", [1, 2, 3, 17, 33])
def test_chain_is_the_recipe_at_any_size(size):
    assert_plain(drawn_batch(7, rows=24, size=size))


@pytest.mark.parametrize("kind", sorted(pictures(1, 1)))
def test_chain_is_the_recipe_on_any_image(kind):
    batch = drawn_batch(3)
    image = pictures(32, 32, 4)[kind]
    assert_plain(batch_of(np.stack([image] * 12), batch.params))


def test_boxes_and_shares_may_be_extreme():
    """Boxes of one pixel in every corner, of one line, and of everything; shares of nothing, next to it, and one."""
    params = drawn_batch(1).params
    boxes = [(0, 0, 1, 1), (0, 31, 1, 1), (31, 0, 1, 1), (31, 31, 1, 1), (0, 0, 32, 32), (5, 0, 1, 32)]
    params.erase[:] = [*boxes, *boxes[::-1]]
    params.cutmix_bbox[:] = [*boxes, *[(0, 0, 0, 0)] * 6]
    params.lam[6:] = 0, 1, 32768, 65535, 65536, 65536
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    assert_plain(batch_of(images, params))
    assert_plain(batch_of(images, params), AugmentSpec(size=32, mean=(0.0, 0.5, 1.0), std=(1.0, 0.01, 0.5)))


@pytest.mark.parametrize("name", ops.TABLE)
@pytest.mark.parametrize(
    ("indices", "magnitudes", "slot"),
    [("operation", "magnitude", 0), ("operation", "magnitude", 1), *(("jitter", "factor", slot) for slot in range(3))],
)
def test_an_operation_inside_the_chain_is_the_operation_alone(name, indices, magnitudes, slot):
    params = empty(3)
    params[indices][:, slot] = OPERATIONS.index(name), 0, OPERATIONS.index(name)
    params[magnitudes][:, slot] = 9 * 65536, 9 * 65536, -8 * 65536
    images = np.random.default_rng(1).integers(0, 200, (3, 32, 32, 3), dtype=np.uint8)
    alone = torch.from_numpy(images.copy())
    ops.apply(name, alone, torch.tensor([0, 2]), torch.from_numpy(ops.arguments(name, np.array([9.0, -8.0]))))
    got = train(batch_of(images, params)).pixels
    assert torch.equal(got, normalize(alone, SPEC).permute(0, 3, 1, 2))
    assert torch.equal(alone[1], torch.from_numpy(images[1]))


def test_jitter_works_in_its_order():
    """Brightness then contrast is not contrast then brightness: the order is the table's."""
    params = empty(2)
    brightness, contrast = OPERATIONS.index("JitterBrightness"), OPERATIONS.index("JitterContrast")
    params.jitter[:] = [(brightness, contrast, 0), (contrast, brightness, 0)]
    params.factor[:, :2] = [(2 * 65536, 32768), (32768, 2 * 65536)]
    images = np.tile(np.array([40, 200], np.uint8).reshape(1, 1, 2, 1), (2, 32, 16, 3))
    got = train(batch_of(images, params)).pixels[:, :, 0, :2].permute(0, 2, 1)
    expected = torch.tensor([[(80 + 168) // 2, (255 + 168) // 2], [80 * 2, 255]])  # the mean is 168, or 120
    assert torch.equal(got, normalize(expected.unsqueeze(-1).expand(2, 2, 3), SPEC))


def test_the_second_operation_sees_the_first():
    """Invert then SolarizeAdd is not SolarizeAdd then Invert."""
    params = empty(2)
    first, second = OPERATIONS.index("Invert"), OPERATIONS.index("SolarizeAdd")
    params.operation[:] = [(first, second), (second, first)]
    params.magnitude[:] = 9 * 65536
    got = train(batch_of(np.full((2, 32, 32, 3), 200, np.uint8), params)).pixels[:, 0, 0, 0]
    expected = normalize(torch.tensor([55 + 99, 255 - 200], dtype=torch.uint8).view(2, 1, 1, 1), SPEC)[:, 0, 0, 0]
    assert torch.equal(got, expected)


def test_input_has_the_asked_dtype_channels_last_and_targets():
    batch = drawn_batch(5)
    images, table = batch.images.clone(), batch.params.table.copy()
    got = train(batch, dtype=torch.bfloat16)
    assert got.pixels.shape == (12, 3, 32, 32)
    assert got.pixels.dtype == torch.bfloat16
    assert got.pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.pixels, train(batch).pixels.to(torch.bfloat16)), "cast before it was mixed"
    assert torch.equal(got.mix_labels, batch.labels[batch.params.mix_index])
    assert np.array_equal(got.lam.numpy(), batch.params.lam / 65536)
    assert got.valid is batch.valid
    assert got.params is batch.params
    assert torch.equal(batch.images, images), "the loader's images were written to"
    assert np.array_equal(batch.params.table, table)


def test_a_batch_that_the_loader_has_mirrored_is_not_mirrored_again():
    batch = drawn_batch(5)
    mirrored = batch.images.clone()
    mirrored[batch.params.flip == 1] = mirrored[batch.params.flip == 1].flip(2)
    assert 0 < batch.params.flip.sum() < 12
    assert torch.equal(train(replace(batch, images=mirrored, flipped=True)).pixels, train(batch).pixels)


def test_evaluation_only_normalizes():
    batch = drawn_batch(6)
    got = augment(batch, SPEC, dtype=torch.float32, train=False)
    expected = (batch.images.numpy() / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    np.testing.assert_allclose(got.pixels.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=1e-6)
    assert torch.equal(got.lam, torch.ones(12))
    assert torch.equal(got.mix_labels, batch.labels)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9))
def test_rows_may_stand_in_any_order(seed, rows):
    batch = drawn_batch(seed, rows)
    order = np.random.default_rng(seed).permutation(rows)
    whole, again, shuffled = train(batch), train(batch), train(taken(batch, order))
    assert torch.equal(whole.pixels, again.pixels)
    assert torch.equal(whole.pixels[order], shuffled.pixels)
    assert torch.equal(whole.mix_labels[order], shuffled.mix_labels)
    assert torch.equal(whole.lam[order], shuffled.lam)


def erased_whole(rows: int, seed: int, size: int = 32) -> torch.Tensor:
    """Noise over the whole of every row, as the chain gives it: [rows, 3, size, size]."""
    params = empty(rows)
    params.sample[:] = np.arange(rows)
    params.erase[:] = 0, 0, size, size
    images = np.zeros((rows, size, size, 3), np.uint8)
    return train(batch_of(images, params), AugmentSpec(size=size, seed=seed)).pixels


def test_noise_is_standard_normal_and_independent():
    pixels = erased_whole(40, seed=1).double()
    n = pixels.numel()
    assert abs(pixels.mean()) < 5 / n**0.5
    assert abs(pixels.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((pixels.abs() < 1).double().mean() - 0.682689) < 5 * (0.217 / n) ** 0.5
    for a, b in (
        (pixels[:, 0], pixels[:, 1]),
        (pixels[:-1], pixels[1:]),
        (pixels[..., :-1], pixels[..., 1:]),
        (pixels[..., :-1, :], pixels[..., 1:, :]),
    ):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_noise_belongs_to_seed_sample_view_and_pixel_alone():
    whole = erased_whole(3, seed=1)
    assert torch.equal(whole[:2], erased_whole(2, seed=1)), "the batch's size matters"
    assert not torch.equal(whole, erased_whole(3, seed=1 + 2**32)), "the seed's high word does not matter"
    params = empty(2)
    params.sample[:] = 2
    params.view[:] = 0, 1
    params.erase[:] = 5, 9, 7, 4
    got = train(batch_of(np.zeros((2, 32, 32, 3), np.uint8), params), AugmentSpec(size=32, seed=1)).pixels
    box = (slice(None), slice(5, 12), slice(9, 13))
    assert torch.equal(got[0][box], whole[2][box]), "the box matters"
    assert not torch.equal(got[1][box], whole[2][box]), "the view does not matter"
    black = got[0, :, 0, 0].view(3, 1, 1)
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[box[1:]] = False
    assert (got[0] == black)[:, outside].all()


def test_cutmix_share_is_what_the_box_leaves():
    """With the share that the recipe corrects to, the mean of a mixed pair of flat images says how much is whose."""
    pixels = torch.stack([torch.zeros(16, 16, 3), torch.ones(16, 16, 3)])
    box = torch.tensor([[2, 3, 8, 4]] * 2)
    share = torch.tensor([1 - 32 / 256] * 2)
    mix(pixels, torch.tensor([1, 0]), share, box)
    assert pixels.mean((1, 2, 3)).tolist() == [32 / 256, 1 - 32 / 256]
    assert pixels[0, 2:10, 3:7].min() == 1


def test_nothing_waits_for_the_device():
    """A meta tensor has no values, so that whatever would have to read one on the host raises."""
    batch = drawn_batch(8, rows=80)
    for name in ("operation", "jitter"):
        assert set(batch.params[name].ravel()) == set(range(len(OPERATIONS)))
    away = Batch(batch.images.to("meta"), batch.labels.to("meta"), batch.valid.to("meta"), batch.params)
    got = train(away, dtype=torch.bfloat16)
    assert got.pixels.shape == (80, 3, 32, 32)
    assert got.pixels.device == got.mix_labels.device == got.lam.device == torch.device("meta")


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    batch = drawn_batch(9, rows=64, size=224)
    spec = AugmentSpec(size=224, seed=2)
    away = Batch(batch.images.cuda(), batch.labels.cuda(), batch.valid.cuda(), batch.params)
    torch.testing.assert_close(train(away, spec).pixels.cpu(), train(batch, spec).pixels, rtol=0, atol=1e-5)
