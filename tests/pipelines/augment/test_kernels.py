"""The augmentation kernels: equal to the reference in Triton's interpreter and on a GPU, and what they compile to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.augment.chain import kernels_run
from pipelines.batch import Batch
from pipelines.errors import UserError
from pipelines.spec import AugmentSpec
from tests.helpers.drawn_batches import drawn_batch
from tools.gpu_check.kernel_times import augment_times

triton = pytest.importorskip("triton")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES = Path(__file__).with_name("kernel_cases.py")
TYPES = {
    **dict.fromkeys(("images", "work", "tables"), "*u8"),
    **dict.fromkeys(("mean", "scale"), "*fp32"),
    **dict.fromkeys(("slot", "rows"), "i32"),
    **{"drawn": "*i32", "arguments": "*fp64", "normal": "*i32", "seed": "i64", "out": "*bf16"},
}
SHAPE = {"SIZE": 224, "SLOTS": 2}
MOST_REGISTERS = {"make_table": 64, "apply_color": 64, "apply_affine": 80, "write_input": 80}
"""For a thread, at the blocks and warps that are launched: 24 to 32 warps then share a multiprocessor."""


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


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile_without_fused_multiply_adds_or_spills(capability: int, tmp_path: Path, monkeypatch) -> None:
    """Ahead of time, for GPUs that need not be there: through PTX to machine code."""
    from pipelines.augment.triton_ops import launch
    from pipelines.augment.triton_ops.affine import apply_affine
    from pipelines.augment.triton_ops.color import apply_color, make_table
    from pipelines.augment.triton_ops.model_input import write_input

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, (block, warps), constants in (
        (make_table, launch.TABLES, {}),
        (apply_color, launch.COLORS, {"CHUNK": launch.CHUNK}),
        (apply_affine, launch.MOVES, {"CHUNK": launch.CHUNK}),
        (write_input, launch.LAST, {"TRAIN": True, "PATCH": 16}),
        (write_input, launch.LAST, {"TRAIN": True, "PATCH": 0}),
        (write_input, launch.LAST, {"TRAIN": False, "PATCH": 16, "SLOTS": 0}),
    ):
        ptx, used = compiled(kernel, {**SHAPE, **constants, "BLOCK": block}, warps, capability, tmp_path)
        name = f"{kernel.__name__} {constants}: {used}"
        assert not re.search(r"\bfma\.", ptx), f"{name} rounds once where the reference rounds twice"
        assert not re.search(r"\bdiv\.(full|approx)\.", ptx), f"{name} divides inexactly"
        assert used["STACK"] == 0, f"{name} spills"
        assert used["REG"] <= MOST_REGISTERS[kernel.__name__], name


def compiled(kernel, constants: dict, warps: int, capability: int, folder: Path) -> tuple[str, dict[str, int]]:
    """Compile a kernel as it is launched; return its PTX, and registers and stack of its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipelines.augment.triton_ops.launch import EXACT

    signature = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**EXACT, "num_warps": warps})
    (folder / "kernel.cubin").write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True)
    return found.asm["ptx"], {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", report.stdout)}


def test_kernels_run_where_they_can_and_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels_run("auto", CUDA)
    assert kernels_run("on", CUDA)
    assert not kernels_run("auto", CPU)
    assert not kernels_run("off", CUDA)
    with pytest.raises(UserError, match="cannot run here") as caught:
        kernels_run("on", CPU)
    assert "device cpu, Triton" in caught.value.found
    monkeypatch.setattr("pipelines.augment.chain.find_spec", lambda name: None)
    assert not kernels_run("auto", CUDA)
    with pytest.raises(UserError, match="cannot run here"):
        kernels_run("on", CUDA)


def test_only_a_gpu_is_timed() -> None:
    with pytest.raises(UserError, match="only a CUDA device"):
        augment_times(drawn_batch(0), AugmentSpec(size=32))


@pytest.mark.gpu
def test_times_are_of_both_ways() -> None:
    batch = drawn_batch(0, rows=64, size=224)
    away = Batch(batch.images.cuda(), batch.labels.cuda(), batch.valid.cuda(), batch.params)
    times = augment_times(away, AugmentSpec(), runs=3)
    assert set(times) == {"reference", "kernels"}
    assert all(len(each) == 3 and min(each) > 0 for each in times.values())
