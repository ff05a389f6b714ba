"""Crops placed in a batch, by torch and by the kernel, and why the kernel may not start."""

import subprocess

import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch, place
from pipelines.batch.place import explain_launch_error, kernels_missing, place_crops
from tests.helpers.drawn_batches import drawn_batch

CPU = torch.device("cpu")


def gathered(size: int, kernel: bool, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Nine rows filled from seven crops, one of them twice, and what they should be."""
    draw = torch.Generator().manual_seed(size)
    crops = torch.randint(0, 256, (7, size, size, 3), dtype=torch.uint8, generator=draw)
    moves = torch.tensor([[3, 8, 0, 0], [0, 1, 1, 0], [6, 0, 1, 0], [3, 4, 1, 0], [5, 5, 0, 0]], dtype=torch.int32)
    out = torch.full((9, 3, size, size), 77, dtype=torch.uint8, device=device)
    place_crops(crops.to(device), moves.to(device), out, kernel=kernel)
    expected = torch.full((9, 3, size, size), 77, dtype=torch.uint8)
    for crop, row, mirror, _ in moves.tolist():
        image = crops[crop].permute(2, 0, 1)
        expected[row] = image.flip(2) if mirror else image
    return out.cpu(), expected


@pytest.mark.parametrize("size", [1, 7, 8, 32])
def test_crops_become_planes_of_their_rows(size: int) -> None:
    found, expected = gathered(size, kernel=False)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 7, 32, 224])
def test_the_kernel_places_the_same_bytes(size: int) -> None:
    found, expected = gathered(size, kernel=True, device=torch.device("cuda"))
    assert torch.equal(found, expected)


def test_a_batch_gives_its_crops_back_as_they_were_cut() -> None:
    batch = drawn_batch(3)
    mirrored = torch.where(
        torch.from_numpy(batch.params.flip == 1).view(-1, 1, 1, 1), batch.images.flip(2), batch.images
    )
    assert not torch.equal(mirrored, batch.images)
    assert torch.equal(Batch(mirrored, batch.labels, batch.valid, batch.params, flipped=True).crops(), batch.images)
    assert batch.crops() is batch.images


def test_what_a_first_launch_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    no_compiler = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    assert "apt install gcc" in explain_launch_error(no_compiler)
    failed = subprocess.CalledProcessError(1, ["gcc", "main.c"])
    monkeypatch.setattr(place.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "python3-dev" in explain_launch_error(failed)
    (tmp_path / "Python.h").touch()
    assert "CalledProcessError: Command" in explain_launch_error(failed)
    assert explain_launch_error(ValueError()) == "a Triton kernel failed to start: ValueError: "


def test_a_first_launch_is_tried_once_and_its_failure_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tried = []

    def fails(crops: Tensor, moves: Tensor, out: Tensor, *, kernel: bool) -> None:
        tried.append(kernel)
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(place, "place_crops", fails)
    place._launch_error.cache_clear()
    try:
        assert "no C compiler" in place._launch_error(CPU)
        assert "no C compiler" in place._launch_error(CPU)
    finally:
        place._launch_error.cache_clear()
    assert tried == [True]
    assert "need a CUDA device" in kernels_missing(CPU)
