"""Everything random about a view of an image, drawn on the host as a function of (seed, sample, view).

The integers come from `pipelines.rng.draws`, which any loader may run itself; here they are drawn for a whole batch at
once. Mixing alone depends on the rows' groups instead, so that partners share one mode, lambda and box.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.errors import DeitfastError
from pipelines.rng import draws
from pipelines.rng.packed_spec import RESIZED, UNIT, PackedSpec, Tables, pack, tables_for
from pipelines.rng.sampler import Rows
from pipelines.spec import AugmentSpec

COLUMNS = {
    "sample": 1,  # index in the split
    "view": 1,  # number of the view
    "crop_box": 4,  # top, left, height, width in the stored image
    "resized": 2,  # height, width that the window is resized to
    "offset": 2,  # top, left of the S x S output in the resized window; black outside it
    "flip": 1,  # 1: mirror the output left to right
    "operation": 2,  # indices into OPERATIONS; 0: none
    "magnitude": 2,  # m x 65536, negative where the drawn sign is
    "erase": 4,  # top, left, height, width in the output; height 0: none
    "mix_index": 1,  # row of the batch that this row is mixed with
    "lam": 1,  # weight of this row's own image x 65536, after CutMix's correction to the clipped box
    "cutmix_bbox": 4,  # CutMix's top, left, height, width in the output; height 0: MixUp (or nothing, at lam 65536)
    "jitter": 3,  # color jitter's operations in their order, indices into OPERATIONS; 0: none
    "factor": 3,  # their factors x 65536
}
"""Name and width of every column of `ViewParams.table`, in order."""


def _slices() -> dict[str, slice]:
    ends = np.cumsum(list(COLUMNS.values())).tolist()
    return {name: slice(end - width, end) for (name, width), end in zip(COLUMNS.items(), ends, strict=True)}


SLICES = _slices()
"""Where each column lies in the table, for those who have the table alone (as a tensor on a device, say)."""


class _Column:
    """A named column, [B] or [B, width], as a view of the table."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, params: "ViewParams", owner: type) -> np.ndarray:
        return params[self.name]


@dataclass(frozen=True)
class ViewParams:
    """The drawn parameters of a batch: one int32 table, so that one small copy carries them to a device."""

    table: np.ndarray
    """int32 [B, 31]; its columns are COLUMNS, each of which is also an attribute: a view of the table."""

    sample = _Column()
    view = _Column()
    crop_box = _Column()
    resized = _Column()
    offset = _Column()
    flip = _Column()
    operation = _Column()
    magnitude = _Column()
    erase = _Column()
    mix_index = _Column()
    lam = _Column()
    cutmix_bbox = _Column()
    jitter = _Column()
    factor = _Column()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column by its name: int32 [B], or [B, width] where COLUMNS says more than 1."""
        column = self.table[:, SLICES[name]]
        return column[:, 0] if COLUMNS[name] == 1 else column


def draw_train(spec: AugmentSpec, rows: Rows, heights: np.ndarray, widths: np.ndarray) -> ViewParams:
    """Draw all of a training batch's parameters.

    Args:
        spec: what is drawn.
        rows: the batch's rows.
        heights: int [B], height of each row's stored image in pixels.
        widths: int [B], width.
    """
    packed, tables = pack(spec), tables_for(spec)
    params = _start(rows)
    _put_crop_boxes(params, packed, tables, rows, heights, widths)
    sample, view = rows.samples, rows.views
    params.flip[:] = draws.flip(sample, view, packed)
    for slot in range(2):
        kind, magnitude = draws.operation(sample, view, slot, packed, tables)
        params.operation[:, slot], params.magnitude[:, slot] = kind, magnitude
    if packed.jitter_count:
        params.table[:, SLICES["jitter"].start : SLICES["factor"].stop] = _columns(draws.jitter(sample, view, packed))
    _put_erasing(params, packed, tables, rows)
    _put_mixing(params, packed, tables, rows)
    return params


def draw_eval(spec: AugmentSpec, rows: Rows, heights: np.ndarray, widths: np.ndarray) -> ViewParams:
    """Return an evaluation batch's parameters: the recipe's center, nothing else; arguments as `draw_train`'s."""
    params = _start(rows)
    _put_crop_boxes(params, pack(spec, train=False), tables_for(spec), rows, heights, widths)
    return params


def _start(rows: Rows) -> ViewParams:
    """Return parameters that name their rows and do nothing to them."""
    params = ViewParams(np.zeros((len(rows.samples), sum(COLUMNS.values())), np.int32))
    params.sample[:], params.view[:], params.mix_index[:] = rows.samples, rows.views, rows.partners
    params.lam[:] = UNIT
    return params


def _put_crop_boxes(
    params: ViewParams, spec: PackedSpec, tables: Tables, rows: Rows, heights: np.ndarray, widths: np.ndarray
) -> None:
    sample, view = rows.samples, rows.views
    height, width = heights.astype(np.int64), widths.astype(np.int64)
    sides = np.concatenate((height, width, [1]))
    if sides.min() < 1 or sides.max() > draws.MAX_SIDE:
        raise DeitfastError(
            "the size of a stored image is out of range",
            expected=f"sides of 1 to {draws.MAX_SIDE} pixels",
            found=f"{sides.min()} to {sides.max()}",
            remedy="run deitfast verify on the data set and convert it again",
        )
    geometry = params.table[:, SLICES["crop_box"].start : SLICES["offset"].stop]
    if spec.crop != RESIZED:
        geometry[:] = _columns(draws.placed_crop(sample, view, height, width, spec))
        return

    def attempt(block: int | np.ndarray, some: np.ndarray) -> tuple[np.ndarray, ...]:
        return draws.crop_try(sample[some], view[some], block, height[some], width[some], spec, tables)

    found = _first_fit(attempt, 0, np.arange(len(params)), params.crop_box)
    lost = np.flatnonzero(~found)
    params.crop_box[lost] = _columns(draws.crop_fallback(height[lost], width[lost], spec))
    params.resized[:] = spec.size


def _put_erasing(params: ViewParams, spec: PackedSpec, tables: Tables, rows: Rows) -> None:
    sample, view = rows.samples, rows.views

    def attempt(block: int | np.ndarray, some: np.ndarray) -> tuple[np.ndarray, ...]:
        return draws.erase_try(sample[some], view[some], block, spec, tables)

    erased = np.flatnonzero(draws.erased(sample, view, spec))
    boxes = np.zeros((len(erased), 4), np.int64)
    _first_fit(attempt, 1, erased, boxes)
    boxes[(boxes[:, 2:] == 0).any(1)] = 0  # a side rounded to nothing
    params.erase[erased] = boxes


def _put_mixing(params: ViewParams, spec: PackedSpec, tables: Tables, rows: Rows) -> None:
    """Draw once for each run of rows of one group, and give it to all of them."""
    changes = (np.diff(rows.groups) != 0) | (np.diff(rows.passes) != 0)
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))[: len(params)]
    lengths = np.diff(np.append(starts, len(params)))
    drawn = _columns(draws.mix(rows.groups[starts], rows.passes[starts], spec, tables))
    params.table[:, SLICES["lam"].start : SLICES["cutmix_bbox"].stop] = np.repeat(drawn, lengths, axis=0)


def _first_fit(
    attempt: Callable[[int | np.ndarray, np.ndarray], tuple[np.ndarray, ...]],
    first_block: int,
    rows: np.ndarray,
    out: np.ndarray,
) -> np.ndarray:
    """Write each row's first box that fits, of ten tries, to `out`, [n, 4]; return which rows found one, bool [n].

    Most rows succeed at once, so the first try is made for all and the other nine together for the few that are left:
    the same boxes as trying one after the other, at a fifth of the time.
    """
    fits, *box = attempt(first_block, rows)
    found = fits.astype(np.bool_)
    out[found] = _columns(box)[found]
    left = np.flatnonzero(~found)
    if left.size:
        blocks = np.arange(first_block + 1, first_block + draws.TRIES)[:, None]
        fits, *box = attempt(blocks, rows[left])
        first = fits.argmax(0)
        chosen = np.stack(box, -1)[first, np.arange(left.size)]
        found[left] = fits.any(0)
        out[left] = chosen * found[left, None]
    return found


def _columns(values: tuple[np.ndarray, ...] | list[np.ndarray]) -> np.ndarray:
    """Return [n] arrays side by side: [n, len(values)]."""
    return np.stack(np.broadcast_arrays(*values), 1)
