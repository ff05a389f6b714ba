"""The kernels against the reference, bit for bit; test_kernels.py runs this file where kernels can run.

In Triton's interpreter (TRITON_INTERPRET=1) on small images, on a GPU on large ones as well.
"""

import os

import numpy as np
import pytest
import torch

from pipelines.augment.chain import AugmentedBatch, augment, kernels_run
from pipelines.augment.triton_ops import launch, plan
from pipelines.batch import Batch
from pipelines.rng.policies import OPERATIONS, RANDAUGMENT
from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import draw_train
from pipelines.spec import AugmentSpec
from tests.helpers.drawn_batches import batch_of, drawn_batch, empty
from tests.helpers.step_inputs import NoWaiting
from tests.pipelines.batch.test_place import gathered
from tools.parity.pictures import pictures

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
LARGE = [
    (size, patch, dtype)
    for size, patch in ((224, 16), (224, 0), (384, 16), (32, 4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not INTERPRETED
]
SEED = (3 << 40) + 11


def made(batch: Batch, spec: AugmentSpec, dtype: torch.dtype, *, train: bool = True, patch: int = 0) -> AugmentedBatch:
    away = Batch(batch.images.to(DEVICE), batch.labels.to(DEVICE), batch.valid.to(DEVICE), batch.params)
    return augment(away, spec, dtype=dtype, train=train, patch=patch, kernels="on")


def assert_same(batch: Batch, spec: AugmentSpec, dtype: torch.dtype = torch.float32, **how) -> None:
    got = made(batch, spec, dtype, **how)
    expected = augment(batch, spec, dtype=torch.float32, kernels="off", **{"train": True, **how})
    pixels = expected.pixels
    if dtype is torch.bfloat16 and INTERPRETED:  # which cuts the lower half off, where a GPU rounds
        pixels = (pixels.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert got.pixels.dtype == dtype
    off = (got.pixels.cpu() != pixels.to(dtype)).flatten(1).any(1).nonzero().flatten().tolist()
    params = batch.params
    named = [[OPERATIONS[each] for each in (*params.operation[row], *params.jitter[row]) if each] for row in off]
    assert not off, f"rows {off[:9]} differ, of operations {named[:9]}"
    assert got.pixels.shape == pixels.shape
    assert got.pixels.stride() == expected.pixels.stride()
    for name in ("labels", "mix_labels", "lam"):
        assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("name", OPERATIONS[1 : 1 + RANDAUGMENT])
def test_every_operation_on_every_picture_is_the_references(name: str) -> None:
    """Either sign, mirrored and not, from the batch itself and out of the workspace.

    Below 510 pixels Equalize does nothing, or little; at 20 px and m = 5 translated source points lie on the border.
    """
    size = 33 if name == "Equalize" else 20
    images = np.stack(list(pictures(size, size, 3).values()))
    rng, params, own = np.random.default_rng(OPERATIONS.index(name)), empty(len(images)), OPERATIONS.index(name)
    params.operation[:] = own, 0
    params.operation[::3] = OPERATIONS.index("Invert"), own
    params.magnitude[:] = rng.integers(5 * 65536, 10 * 65536 + 1, (len(images), 2))
    params.magnitude[1::3] = 5 * 65536
    params.magnitude[::2] *= -1
    params.flip[:] = rng.integers(0, 2, len(images))
    assert_same(batch_of(images, params), AugmentSpec(size=size))


@pytest.mark.parametrize(
    ("size", "patch", "dtype"),
    [
        (16, 4, torch.float32), (21, 7, torch.float32), (17, 0, torch.float32), (1, 1, torch.float32),
        (16, 4, torch.bfloat16), (16, 0, torch.float16), (16, 0, torch.bfloat16), *LARGE,
    ],
)  # fmt: skip
def test_everything_at_once_is_the_references(size: int, patch: int, dtype: torch.dtype) -> None:
    """Every slot, erased and mixed rows, partners that are no pairs."""
    spec = AugmentSpec(size=max(8, size), seed=SEED)
    assert_same(drawn_batch(size, rows=8 if INTERPRETED else 64, size=size), spec, dtype, patch=patch)


def test_an_image_may_be_cut_into_any_chunks_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (
        ("TABLES", (64, 4)),
        ("FILTERS", (64, 4)),
        ("ROTATIONS", (128, 4)),
        ("MOVES", (128, 4)),
        ("LAST", (128, 4)),
    ):
        monkeypatch.setattr(launch, name, most)
    batch = drawn_batch(4, rows=6, size=21)
    batch.params.operation[:] = [
        [OPERATIONS.index(name)] * 2 for name in ("Equalize", "Rotate", "Contrast", "ShearY", "Sharpness", "TranslateX")
    ]
    assert_same(batch, AugmentSpec(size=21, seed=SEED))


@pytest.mark.parametrize("settings", [{}, {"policy": "autoaugment"}, {"policy": "none"}, {"mixup": 0.0, "cutmix": 0.0}])
def test_what_the_recipe_draws_is_the_references(settings: dict) -> None:
    spec = AugmentSpec(size=16, seed=SEED, mix_group=4, erasing=0.5, **settings)
    samples = np.arange(8)
    rows = Rows(samples, samples * 0, samples // 4, samples * 0, samples[::-1], samples >= 0)
    params = draw_train(spec, rows, np.full(8, 20), np.full(8, 20))
    images = np.random.default_rng(2).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    assert_same(batch_of(images, params), spec, patch=8)


def test_boxes_and_shares_may_be_extreme() -> None:
    params = drawn_batch(1).params
    boxes = [(0, 0, 1, 1), (0, 31, 1, 1), (31, 0, 1, 1), (31, 31, 1, 1), (0, 0, 32, 32), (5, 0, 1, 32)]
    params.erase[:], params.jitter[:], params.operation[:] = [*boxes, *boxes[::-1]], 0, 0
    params.cutmix_bbox[:] = [*boxes, *[(0, 0, 0, 0)] * 6]
    params.lam[6:] = 0, 1, 32768, 65535, 65536, 65536
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    assert_same(batch_of(images, params), AugmentSpec(size=32, mean=(0.0, 0.5, 1.0), std=(1.0, 0.01, 0.5)))


@pytest.mark.parametrize("patch", [0, 4])
def test_evaluation_is_the_references(patch: int) -> None:
    assert_same(drawn_batch(6, size=20), AugmentSpec(size=20), train=False, patch=patch)


def test_nothing_waits_and_the_batch_stays_as_it_was() -> None:
    batch = drawn_batch(8, rows=4, size=8)
    away = Batch(batch.images.to(DEVICE), batch.labels.to(DEVICE), batch.valid.to(DEVICE), batch.params)
    images, table = batch.images.clone(), batch.params.table.copy()
    with NoWaiting():
        augment(away, AugmentSpec(size=8), dtype=torch.float32, train=True, kernels="on")
    assert torch.equal(away.images.cpu(), images)
    assert np.array_equal(batch.params.table, table)


def test_a_pass_is_planned_for_no_image_that_does_not_need_it() -> None:
    names = [
        ("none", "none"), ("Equalize", "none"), ("Invert", "Contrast"), ("Invert", "Rotate"), ("Color", "none"),
        ("Color", "Invert"), ("ShearX", "Sharpness"), ("Sharpness", "TranslateY"),
    ]  # fmt: skip
    params = empty(8)
    params.operation[:] = [[OPERATIONS.index(name) for name in row] for row in names]
    params.mix_index[:] = [1, 0, 2, 3, 5, 4, 7, 6]
    params.lam[:6] = 1000
    found = plan.plan_passes(params)
    first, second = found.slots
    assert first.tables[["row", "channel"]].tolist() == [(1, 0), (1, 1), (1, 2), (2, -1), (3, -1)]
    assert first.filters[["row", "source", "target"]].tolist() == [(5, -1, 0), (7, -1, 1)]
    assert first.moves[["row", "source", "target", "table"]].tolist() == [(6, -1, 2, 0)]
    assert second.tables[["row", "source", "table"]].tolist() == [(2, -1, 1), (5, 0, 0)]
    assert not len(second.filters)
    assert second.rotations[["row", "source", "target", "table"]].tolist() == [(3, -1, 3, 1)]
    assert second.moves[["row", "source", "target", "table"]].tolist() == [(7, 1, 4, 0)]
    assert found.images == 5
    last = found.rows[:, plan.DRAWN : plan.DRAWN + plan.WORDS].copy().view(plan.RECORD)[:, 0]
    assert last["source"].tolist() == [-1, -1, -1, 3, -1, 0, 2, 4]
    assert last["table"].tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    assert [OPERATIONS[each] for each in last["operation"]] == [*["none"] * 4, "Color", "none", "Sharpness", "none"]
    units = found.rows[: found.units, -4:].tolist()
    assert units == [[0, 1, 1, 1], [2, 2, 0, 1], [3, 3, 0, 1], [4, 5, 1, 1], [6, 6, 0, 0], [7, 7, 0, 0]]


def test_flavors_are_one_operation_with_arguments_of_their_own() -> None:
    params = empty(3)
    assert not plan.plan_passes(params).slots
    params.operation[1, 1] = OPERATIONS.index("ContrastOriginal")
    params.magnitude[1, 1] = -5 * 65536
    (slot,) = plan.plan_passes(params).slots
    (record,) = slot.tables
    assert record["operation"] == OPERATIONS.index("Contrast")
    assert record["argument"].tolist() == [5 / 10 * 1.8 + 0.1, 0]


@pytest.mark.skipif(INTERPRETED, reason="on a GPU")
def test_auto_is_the_kernels_on_a_gpu() -> None:
    assert kernels_run("auto", DEVICE)


@pytest.mark.parametrize("size", [1, 7, 32, *([] if INTERPRETED else [224])])
def test_crops_are_placed_as_torch_places_them(size: int) -> None:
    found, expected = gathered(size, kernel=True, device=DEVICE)
    assert torch.equal(found, expected)


def test_planes_that_the_loader_placed_are_taken_as_they_are() -> None:
    batch = drawn_batch(2, rows=6, size=16)
    flip = torch.from_numpy(batch.params.flip == 1).view(-1, 1, 1, 1)
    mirrored = torch.where(flip, batch.images.flip(2), batch.images)
    planes = mirrored.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    spec = AugmentSpec(size=16, seed=SEED)
    expected = made(batch, spec, torch.float32)
    for kernels in ("on", "off"):
        placed = Batch(planes.to(DEVICE), batch.labels.to(DEVICE), batch.valid.to(DEVICE), batch.params, flipped=True)
        got = augment(placed, spec, dtype=torch.float32, train=True, kernels=kernels)
        assert torch.equal(got.pixels, expected.pixels)
