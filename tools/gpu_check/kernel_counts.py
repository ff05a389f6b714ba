"""What the augmentation kernels cost by count, without a GPU: instructions, registers and bytes.

`python -m tools.gpu_check.kernel_counts` compiles every kernel as it is launched at 224 px for GPUs that need not be
there, reads the machine code, counts the bytes of real batches' passes, and writes deitfast/docs/measured/kernels.json.
"""

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deitfast.environment import __version__
from pipelines.augment.triton_ops import affine, color, launch, pixels, plan
from pipelines.batch import place_kernel
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.sampler import SamplerSpec, TrainSampler
from pipelines.rng.view_params import ViewParams, draw_train
from pipelines.spec import AugmentSpec

RECORD_FILE = Path(__file__).parents[2] / "deitfast" / "docs" / "measured" / "kernels.json"
COMMAND = "python -m tools.gpu_check.kernel_counts"
CAPABILITIES = 75, 80, 89, 90
SIZE, PATCH, BATCH = 224, 16, 1024
BATCHES = 8
IMAGE = 3 * SIZE * SIZE
"""Bytes of an image's planes."""
POINTERS = {
    **dict.fromkeys(("images", "work", "tables"), "*u8"),
    **dict.fromkeys(("records", "rows", "normal", "crops", "moves"), "*i32"),
    **{"scales": "*fp32", "out": "*bf16", "seed": "i64"},
}
"""Types of the kernels' parameters; `place_kernel` writes words."""
LOADS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "": 4, "64": 8, "128": 16}
"""Bytes of a load or store by the suffix of its instruction."""


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched for DeiT's recipe."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    block: int
    warps: int

    @property
    def pixels_per_thread(self) -> int:
        """Pixels that a thread works on at once."""
        return self.block // (32 * self.warps)


@dataclass(frozen=True)
class Counts:
    """What a kernel compiles to, all of its branches together."""

    pixels_per_thread: int
    """Pixels that a thread works on at once."""
    registers: int
    stack: int
    """Bytes of stack, which is what spilled registers need."""
    instructions: int
    loads: dict[int, int]
    """Global loads by their width in bytes, those of records and tables included."""
    stores: dict[int, int]
    """Global stores by their width in bytes."""
    conversions: int
    """Between integers and float64, at a sixteenth of the rate of float32 on a data center's GPU."""
    float64: int
    """Additions, products and comparisons in float64."""


def launches() -> list[Launch]:
    """Return every kernel with the sizes that it is launched with."""
    size = {"SIZE": SIZE}
    placing = {**size, "WORDS": True}

    def chunked(most: tuple[int, int]) -> dict[str, int]:
        return {**size, "CHUNK": launch.chunk(SIZE, most[0])}

    return [
        Launch("place_kernel", place_kernel.place_kernel, placing, place_kernel.BLOCK, place_kernel.WARPS),
        Launch("make_table", color.make_table, size, *launch.TABLES),
        Launch("apply_filter", color.apply_filter, chunked(launch.FILTERS), *launch.FILTERS),
        Launch("apply_rotate", affine.apply_rotate, chunked(launch.ROTATIONS), *launch.ROTATIONS),
        Launch("apply_move", affine.apply_move, chunked(launch.MOVES), *launch.MOVES),
        Launch("write_pixels, patches", pixels.write_pixels, {**size, "PATCH": PATCH}, *launch.LAST),
        Launch("write_pixels, pixels", pixels.write_pixels, {**size, "PATCH": 0}, *launch.LAST),
        Launch("write_normalized, patches", pixels.write_normalized, {**size, "PATCH": PATCH}, *launch.LAST),
    ]


def compiled(each: Launch, capability: int, folder: Path) -> tuple[str, str, str]:
    """Compile a kernel ahead of time; return its PTX, its machine code's listing, and the listing of its resources."""
    constants = {**each.constants, "BLOCK": each.block}
    kinds = {**POINTERS, "out": "*i32"} if "crops" in each.kernel.arg_names else POINTERS
    signature = {name: "constexpr" if name in constants else kinds[name] for name in each.kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(each.kernel, signature, constants, aligned)
    options = {**launch.EXACT, "num_warps": each.warps}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code, resources = (
        subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
        for option in ("-sass", "--dump-resource-usage")
    )
    return found.asm["ptx"], code, resources


def counts(each: Launch, code: str, resources: str) -> Counts:
    """Count what a listing of machine code holds."""
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    if "EXIT" in names:  # behind the code proper there is a branch to itself, and padding
        names = [name for name in names if name != "NOP"]
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", resources)}
    heads = Counter(name.split(".")[0] for name in names)
    return Counts(
        each.pixels_per_thread,
        used["REG"],
        used["STACK"],
        len(names),
        _widths(name for name in names if name.startswith("LDG")),
        _widths(name for name in names if name.startswith("STG")),
        sum(bool(re.match(r"(I2F|F2I|F2F|FRND)\b.*F64", name)) for name in names),
        sum(heads[name] for name in ("DADD", "DMUL", "DFMA", "DSETP")),
    )


def _widths(names: Iterable[str]) -> dict[int, int]:
    """Count loads or stores by width in bytes."""
    found = Counter(next((LOADS[part] for part in name.split(".")[1:] if part in LOADS), 4) for name in names)
    return dict(sorted(found.items()))


def batches() -> list[ViewParams]:
    """Draw batches of DeiT's recipe, as training on ImageNet draws them."""
    spec = AugmentSpec(size=SIZE)
    sampler = TrainSampler(
        SamplerSpec(samples=BATCH * 64, batch=BATCH, seed=0, repeats=spec.repeats, group=spec.mix_group)
    )
    side = np.full(BATCH, 400)
    return [draw_train(spec, sampler.rows(0, step), side, side) for step in range(BATCHES)]


def batch_bytes(params: ViewParams) -> dict[str, float]:
    """Return the bytes of images, tables and input that each kernel has to load and store for a batch.

    A pixel counts once for a pass, however many of its neighbors use it; one that no output needs does not count.
    """
    found = plan.plan_passes(params)
    total: dict[str, float] = dict.fromkeys(("make_table", "apply_filter", "apply_rotate", "apply_move"), 0.0)
    for slot in found.slots:
        looks = [OPERATIONS.index(name) for name in ("AutoContrast", "Equalize", "Contrast")]
        reads = slot.tables["operation"][:, None] == looks
        total["make_table"] += float((reads * [IMAGE / 3, IMAGE / 3, IMAGE]).sum()) + 768 * len(slot.tables)
        total["apply_filter"] += 2 * IMAGE * len(slot.filters)
        for name, records in (("apply_rotate", slot.rotations), ("apply_move", slot.moves)):
            total[name] += sum(IMAGE * (1 + _share_inside(record)) for record in records)
    units = found.rows[: found.units, -plan.UNIT_WORDS :]
    images = len(units) + np.count_nonzero(units[:, 3] & (units[:, 0] != units[:, 1]))
    total["write_pixels"] = IMAGE * float(images) + 2 * IMAGE * len(params)
    return total


def megabytes(batches: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of `batch_bytes` in MB, and their sum."""
    passes = {name: round(sum(each[name] for each in batches) / len(batches) / 1e6, 1) for name in batches[0]}
    return {**passes, "sum": round(sum(passes.values()), 1)}


def _share_inside(record: np.ndarray) -> float:
    """Return the share of the output whose source point lies in the image."""
    name, (first, second) = OPERATIONS[record["operation"]], record["argument"].tolist()
    at = (np.arange(SIZE) + 0.5) / SIZE
    x, y = at[None, :], at[:, None]
    if name == "Rotate":
        x, y = (x - 0.5) * first + (y - 0.5) * second + 0.5, (y - 0.5) * first - (x - 0.5) * second + 0.5
    elif name.startswith("Shear"):
        x, y = (x + first * y, y + 0 * x) if name.endswith("X") else (x + 0 * y, y + first * x)
    else:
        x, y = (x + first, y) if name.endswith("X") else (x, y + first)
    return float(((x >= 0) & (x < 1) & (y >= 0) & (y < 1)).mean())


def record(capabilities: tuple[int, ...] = CAPABILITIES) -> dict[str, Any]:
    """Return all counts, as they are written to RECORD_FILE."""
    kernels: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        for each in launches():
            for capability in capabilities:
                _, code, resources = compiled(each, capability, Path(folder))
                kernels.setdefault(each.name, {})[f"sm_{capability}"] = asdict(counts(each, code, resources))
    return {
        "command": COMMAND,
        "machine": "any: compiled ahead of time, for GPUs that need not be there",
        "versions": {"deitfast": __version__, "triton": triton.__version__},
        "what": f"{BATCH} x 3 x {SIZE} x {SIZE}, patches of {PATCH}, bfloat16; drawn by DeiT's recipe",
        "megabytes_per_batch": megabytes([batch_bytes(params) for params in batches()]),
        "megabytes_placing": round(2 * IMAGE * BATCH / 1e6, 1),
        "kernels": kernels,
    }


def main() -> None:
    """Write RECORD_FILE."""
    RECORD_FILE.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record(), indent=1)
    RECORD_FILE.write_text(re.sub(r"\n( {4,}| {3}(?=\}))", " ", text) + "\n")  # a line for each kernel and GPU


if __name__ == "__main__":
    main()
