"""The host's half of augmentation in kernels: which passes a batch needs, and over which of its images.

Only what must be written in between is: the geometric operations, and Color and Sharpness where another operation
follows. An operation that changes each channel's values alone is a table of 256 values, looked up by the image's next
reader; the last pass does a Color or Sharpness that comes last while it reads. So for DeiT's recipe 360 of a
batch's 1,024 images are written once before the last pass, and the others are not.

All of it travels to the device in one copy, as records of four-byte words; `Record` names them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.torch_ops import ops
from pipelines.device import to_device
from pipelines.rng.packed_spec import UNIT
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.view_params import COLUMNS, ViewParams

RECORD = np.dtype(
    [
        ("row", "<i4"),  # of the batch
        ("operation", "<i4"),  # index into OPERATIONS, by CANONICAL; 0: none
        ("source", "<i4"),  # image of the workspace that is read; -1: the batch's own
        ("target", "<i4"),  # image of the workspace that is written
        ("table", "<i4"),  # 1: the source's values are looked up in the row's table first
        ("channel", "<i4"),  # whose table is made; -1: the same for all three
        ("unused", "<i4", (2,)),
        ("argument", "<f8", (2,)),  # as `ops.arguments` computes them
    ]
)
"""An operation on an image: 12 words. A multiple of 16 bytes, as Triton compiles again for pointers that are not."""
DRAWN = 32
"""Words of a row before its last record: `ViewParams.table`'s 31 columns and one that is unused."""
WORDS = RECORD.itemsize // 4
UNIT_WORDS = 4
"""Words behind a row's last record. Those of row u say what the u-th unit of the last pass is: row, partner, whether
it writes the partner's row as well, and whether the rows are mixed."""
ROW = DRAWN + WORDS + UNIT_WORDS
IMAGES_AT_ONCE = 64
"""The workspace grows by so many images: allocations of few different sizes are used again."""


def _canonical() -> np.ndarray:
    first = {}
    for index, name in enumerate(OPERATIONS[1:], start=1):
        first.setdefault(ops.TABLE[name].apply, index)
    return np.array([0, *(first[ops.TABLE[name].apply] for name in OPERATIONS[1:])], np.int32)


CANONICAL = _canonical()
"""For each index into OPERATIONS the first that does the same to pixels: flavors differ in their arguments alone."""


def _are(*names: str) -> np.ndarray:
    return np.isin(np.arange(len(OPERATIONS)), [OPERATIONS.index(name) for name in names])


PER_CHANNEL = _are("AutoContrast", "Equalize")
"""For each operation whether it is a table of its own for each channel."""
TABLE = PER_CHANNEL | _are("Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness")
"""... whether it changes each channel's values alone."""
FILTER = _are("Color", "Sharpness")
ROTATE = _are("Rotate")
MOVE = _are("ShearX", "ShearY", "TranslateX", "TranslateY")


class Slot(NamedTuple):
    """One slot's passes, in their order: records of RECORD, [n] on the host, int32 [n, WORDS] on the device."""

    tables: Any
    """Tables to be made; those that must look at an image first."""
    filters: Any
    """Colors and sharpnesses that another operation follows."""
    rotations: Any
    moves: Any
    """Shears and translations."""


@dataclass(frozen=True)
class Plan:
    """A batch's passes, on the host."""

    rows: np.ndarray
    """int32 [B, ROW]: the drawn parameters, each row's record for the last pass, and the units."""
    slots: list[Slot]
    units: int
    """Units of the last pass."""
    images: int
    """Images that the workspace has to hold."""


@dataclass(frozen=True)
class Sent:
    """A plan on the device, all of it parts of one copy."""

    rows: Tensor
    """int32 [B, ROW], as on the host."""
    slots: list[Slot]
    units: int
    images: int


def plan_passes(params: ViewParams) -> Plan:
    """Return the passes that a batch's drawn operations need."""
    operations, magnitudes = ops.used_slots(params)
    arguments = _arguments(operations, magnitudes)
    operations = CANONICAL[operations]
    count = len(params)
    source, table, last = np.full(count, -1, np.int32), np.zeros(count, bool), np.zeros(count, RECORD)
    last["row"] = np.arange(count)
    slots, images = [], 0
    for slot in range(operations.shape[1]):
        own, followed = operations[:, slot], operations[:, slot + 1 :].any(1)
        records = np.zeros(count, RECORD)
        for name, values in (("row", last["row"]), ("operation", own), ("source", source), ("table", table)):
            records[name] = values
        records["argument"] = arguments[:, slot]
        tables = _split_by_channel(records[TABLE[own]])
        table = table | TABLE[own]
        written = [records[FILTER[own] & followed], records[ROTATE[own]], records[MOVE[own]]]
        for some in written:
            some["target"] = images + np.arange(len(some))
            source[some["row"]], table[some["row"]] = some["target"], False
            images += len(some)
        deferred = FILTER[own] & ~followed
        for name in ("operation", "argument"):
            last[name][deferred] = records[name][deferred]
        slots.append(Slot(tables, *written))
    last["source"], last["table"] = source, table
    units = _units(params)
    rows = np.zeros((count, ROW), np.int32)
    rows[:, : sum(COLUMNS.values())] = params.table
    rows[:, DRAWN : DRAWN + WORDS] = last.view(np.int32).reshape(count, WORDS)
    rows[: len(units), DRAWN + WORDS :] = units
    return Plan(rows, slots, len(units), images)


def send(plan: Plan, device: torch.device) -> Sent:
    """Carry a plan to the device in one copy; the host does not wait for it."""
    passes = [part for slot in plan.slots for part in slot]
    flat = np.concatenate([plan.rows.ravel(), *(part.view(np.int32) for part in passes)])
    sizes = [plan.rows.size, *(len(part) * WORDS for part in passes)]
    rows, *records = to_device(torch.from_numpy(flat), device).split(sizes)
    records = [part.view(-1, WORDS) for part in records]
    slots = [Slot(*records[at : at + len(Slot._fields)]) for at in range(0, len(records), len(Slot._fields))]
    return Sent(rows.view(-1, ROW), slots, plan.units, plan.images)


def _arguments(operations: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Return each operation's two arguments, float64 [B, K, 2]."""
    arguments = np.zeros((*operations.shape, 2))
    for index in np.unique(operations[operations > 0]):
        of_it = operations == index
        arguments[of_it] = ops.arguments(OPERATIONS[index], magnitudes[of_it])
    return arguments


def _split_by_channel(records: np.ndarray) -> np.ndarray:
    """Give each channel a record of its own where it has its own table; first, as these look at the image."""
    own = PER_CHANNEL[records["operation"]]
    split, shared = records[own].repeat(3), records[~own]
    split["channel"], shared["channel"] = np.arange(len(split)) % 3, -1
    looks = shared["operation"] == OPERATIONS.index("Contrast")
    return np.concatenate([shared[looks], split, shared[~looks]])


def _units(params: ViewParams) -> np.ndarray:
    """Return what the last pass goes through, int32 [U, 4]: rows that are each other's partners together.

    Then each image is read and finished once, though it goes into two mixtures.
    """
    row, partner = np.arange(len(params)), params.mix_index
    mixed = (params.lam < UNIT) | (params.cutmix_bbox[:, 2] > 0)
    paired = mixed & mixed[partner] & (partner[partner] == row) & (partner != row)
    units = np.stack([row, np.where(mixed, partner, row), paired, mixed], axis=1).astype(np.int32)
    return units[~paired | (row < partner)]
