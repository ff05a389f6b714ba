"""The augmentation kernels: equal to the reference in Triton's interpreter and on a GPU, and what they compile to."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pipelines.augment.chain import kernels_run
from pipelines.batch import Batch, place
from pipelines.errors import UserError
from pipelines.spec import AugmentSpec
from tests.helpers.drawn_batches import drawn_batch
from tools.gpu_check.kernel_times import augment_times, place_times

triton = pytest.importorskip("triton")
kernel_counts = pytest.importorskip("tools.gpu_check.kernel_counts")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES = Path(__file__).with_name("kernel_cases.py")
MOST_REGISTERS = {"make_table": 104, "apply_filter": 64, "apply_rotate": 128, "apply_move": 96, "write_pixels": 96}
"""For a thread, at the blocks and warps that are launched: at least 16 warps then share a multiprocessor."""
BULK = "place_kernel", "make_table", "apply_filter", "write_pixels", "write_normalized"
"""Kernels that no image's geometry keeps from loading whole words."""
MOST_MEGABYTES = 600
"""Of a batch's passes together; 462 of them are the input written, and each image read once for it."""


def run_cases(**environment: str) -> None:
    """Run kernel_cases.py in a process of its own, as Triton looks at its environment once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(CASES)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_are_the_reference_in_the_interpreter() -> None:
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_kernels_are_the_reference_on_a_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")


@pytest.mark.parametrize("capability", [90, *(pytest.param(each, marks=pytest.mark.slow) for each in (75, 80, 89))])
def test_kernels_compile_to_wide_loads_and_exact_arithmetic(capability: int, tmp_path: Path, monkeypatch) -> None:
    """Ahead of time, for GPUs that need not be there: through PTX to machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorded = json.loads(kernel_counts.RECORD_FILE.read_text())
    for each in kernel_counts.launches():
        ptx, code, resources = kernel_counts.compiled(each, capability, tmp_path)
        found = kernel_counts.counts(each, code, resources)
        named, kernel = f"{each.name} for sm_{capability}: {found}", each.kernel.__name__
        assert not re.search(r"\bfma\.", ptx), f"{named} rounds once where the reference rounds twice"
        assert not re.search(r"\bdiv\.(full|approx)\.", ptx), f"{named} divides inexactly"
        assert found.stack == 0, f"{named} spills"
        assert found.registers <= MOST_REGISTERS.get(kernel, 64), named
        assert 1 not in found.stores, f"{named} stores single bytes"
        assert kernel not in BULK or 1 not in found.loads, f"{named} loads single bytes"
        if recorded["versions"]["triton"] == triton.__version__:
            assert recorded["kernels"][each.name][f"sm_{capability}"] == json.loads(json.dumps(asdict(found)))


def test_a_batch_moves_no_more_bytes_than_it_has_to() -> None:
    recorded = json.loads(kernel_counts.RECORD_FILE.read_text())
    parts = [kernel_counts.batch_bytes(params) for params in kernel_counts.batches()]
    assert recorded["megabytes_per_batch"] == kernel_counts.megabytes(parts)
    assert recorded["megabytes_per_batch"]["sum"] <= MOST_MEGABYTES


def test_kernels_run_where_they_can_and_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(place, "_launch_error", lambda device: "")
    assert kernels_run("auto", CUDA)
    assert kernels_run("on", CUDA)
    assert not kernels_run("auto", CPU)
    assert not kernels_run("off", CUDA)
    with pytest.raises(UserError, match="cannot run here") as caught:
        kernels_run("on", CPU)
    assert "this is cpu" in caught.value.found
    monkeypatch.setattr(place, "_launch_error", lambda device: "Triton found no C compiler; install one")
    assert not kernels_run("auto", CUDA)
    with pytest.raises(UserError, match="cannot run here") as caught:
        kernels_run("on", CUDA)
    assert "no C compiler" in caught.value.found
    monkeypatch.setattr(place, "find_spec", lambda name: None)
    assert not kernels_run("auto", CUDA)
    with pytest.raises(UserError, match="cannot run here"):
        kernels_run("on", CUDA)


def test_only_a_gpu_is_timed() -> None:
    with pytest.raises(UserError, match="only a CUDA device"):
        augment_times(drawn_batch(0), AugmentSpec(size=32))
    with pytest.raises(UserError, match="only a CUDA device"):
        place_times(drawn_batch(0))


@pytest.mark.gpu
def test_times_are_of_both_ways() -> None:
    batch = drawn_batch(0, rows=64, size=224)
    away = Batch(batch.images.cuda(), batch.labels.cuda(), batch.valid.cuda(), batch.params)
    for times in (augment_times(away, AugmentSpec(), runs=3), place_times(away, runs=3)):
        assert set(times) == {"reference", "kernels"}
        assert all(len(each) == 3 and min(each) > 0 for each in times.values())
