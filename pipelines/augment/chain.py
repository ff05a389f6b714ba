"""Augmentation of a batch on its device, with the parameters that were drawn for it.

The order is the recipe's: flip, two operations of RandAugment or AutoAugment (or else the three of color jitter),
normalize, erase, mix. All random numbers have been drawn on the host (`rng.view_params`); one copy carries them to the
device, and the host does not wait for it.

There are two implementations with the same bits: batched torch, which runs anywhere and is the reference, and Triton
kernels (`pipelines.augment.triton_ops.launch`), a few passes on a GPU.

`augment` is a function of its arguments alone. It works on the current CUDA stream and may be called in any thread, so
also where batches are produced, on a side stream next to the training step: the consumer's stream must then wait for
an event recorded after it, and `record_stream` the tensors that it uses.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.patches import cut_patches
from pipelines.augment.torch_ops import ops
from pipelines.augment.torch_ops.erase import erase
from pipelines.batch import Batch
from pipelines.batch.place import kernels_missing, place_crops
from pipelines.choices import Kernels
from pipelines.device import to_device
from pipelines.errors import UserError
from pipelines.rng.packed_spec import UNIT
from pipelines.rng.policies import OPERATIONS
from pipelines.rng.view_params import COLUMNS, SLICES, ViewParams
from pipelines.spec import AugmentSpec


@dataclass(frozen=True)
class AugmentedBatch:
    """A batch after augmentation: pixels, the labels of the mixture and its weights, ready for a model and a loss."""

    pixels: Tensor
    """[B, 3, S, S] in the model's dtype, normalized, channels-last in memory; or patches [B, (S/p)^2, 3 p p]."""
    labels: Tensor
    """int64 [B]: each row's own label."""
    mix_labels: Tensor
    """int64 [B]: the label of the row that it is mixed with."""
    lam: Tensor
    """float32 [B]: weight of `labels` in the target; `mix_labels` have the rest."""
    valid: Tensor
    """bool [B]: False for rows that do not count, see `Batch`."""
    params: ViewParams
    """What was drawn for each row, on the host; its samples and views identify the rows."""
    skipped: int = 0
    """Rows whose image cannot be read, see `Batch`."""


def augment(
    batch: Batch,
    spec: AugmentSpec,
    *,
    dtype: torch.dtype,
    train: bool,
    patch: int = 0,
    kernels: Kernels = "auto",
) -> AugmentedBatch:
    """Return a batch after augmentation; `batch` itself is not written to.

    Everything up to the mixture is computed in uint8 or float32, and cast at the end.

    Args:
        batch: crops, labels and drawn parameters.
        spec: the recipe's augmentation; gives the normalization and the seed of erasing's noise.
        dtype: of the pixels.
        train: False normalizes and does nothing else, whatever was drawn.
        patch: side p of square patches to cut the pixels into, [B, (S/p)^2, 3 p p] in the order of `cut_patches`;
            0: pixels [B, 3, S, S].
        kernels: which implementation; the result is the same.

    Raises:
        UserError: kernels are on where they cannot run.
    """
    if kernels_run(kernels, batch.images.device):
        return _in_kernels(batch, spec, dtype, train, patch)
    if not train:
        own = torch.ones_like(batch.labels, dtype=torch.float32)
        return _input(batch, normalize(batch.images, spec), dtype, patch, batch.labels, own)
    drawn = _send(batch.params, batch.images.device)
    mirrored = (drawn.columns["flip"] == 1) & (not batch.flipped)
    images = torch.where(_per_image(mirrored), batch.images.flip(2), batch.images)
    for slot in drawn.slots:
        for name, rows, arguments in slot:
            ops.apply(name, images, rows, arguments)
    pixels = normalize(images, spec)
    columns = drawn.columns
    if drawn.erased:
        erase(pixels, columns["erase"], columns["sample"], columns["view"], spec, drawn.erased)
    lam = columns["lam"].float() / UNIT
    if drawn.mixed:
        mix(pixels, columns["mix_index"], lam, columns["cutmix_bbox"])
    return _input(batch, pixels, dtype, patch, batch.labels[columns["mix_index"]], lam)


def kernels_run(kernels: Kernels, device: torch.device) -> bool:
    """Return whether the kernels run on a device, for `train.kernels`.

    Raises:
        UserError: `kernels` is on, and they cannot.
    """
    if kernels == "off" or (kernels == "auto" and device.type != "cuda"):
        return False
    missing = kernels_missing(device)
    if missing and kernels == "on":
        raise UserError(
            "train.kernels is on, but the augmentation kernels cannot run here",
            expected="a CUDA device, Triton, and what it compiles with",
            found=missing,
            remedy="set train.kernels to auto: without the kernels the results are the same",
        )
    return not missing


def _in_kernels(batch: Batch, spec: AugmentSpec, dtype: torch.dtype, train: bool, patch: int) -> AugmentedBatch:
    from pipelines.augment.triton_ops import launch, plan  # Triton is only there where PyTorch has it

    device = batch.images.device
    sent = plan.send(plan.plan_passes(batch.params), device) if train else None
    images = _planes(batch, train, device)
    scales = _normalization(spec.mean, spec.std, device)
    pixels = launch.write_batch(images, sent, scales, seed=spec.seed, patch=patch, dtype=dtype)
    if sent is None:
        lam = torch.ones_like(batch.labels, dtype=torch.float32)
        return AugmentedBatch(pixels, batch.labels, batch.labels, lam, batch.valid, batch.params, batch.skipped)
    partners, lam = sent.rows[:, SLICES["mix_index"].start].long(), sent.rows[:, SLICES["lam"].start].float() / UNIT
    mix_labels = batch.labels[partners]
    return AugmentedBatch(pixels, batch.labels, mix_labels, lam, batch.valid, batch.params, batch.skipped)


def _planes(batch: Batch, train: bool, device: torch.device) -> Tensor:
    """Return the images as planes, uint8 [B, 3, S, S], in training mirrored; the batch's own memory if it is so."""
    planes = batch.images.permute(0, 3, 1, 2)
    if planes.is_contiguous() and (batch.flipped or not train):
        return planes
    moves = np.zeros((len(planes), 4), np.int32)
    moves[:, :2] = np.arange(len(planes))[:, None]
    moves[:, 2] = batch.params.flip if train and not batch.flipped else 0
    out = torch.empty_like(planes, memory_format=torch.contiguous_format)
    place_crops(batch.images.contiguous(), to_device(torch.from_numpy(moves), device), out, kernel=True)
    return out


def normalize(images: Tensor, spec: AugmentSpec) -> Tensor:
    """(pixel / 255 - mean) / std as float32 [B, S, S, 3] from uint8 [B, S, S, 3].

    Computed as (pixel - 255 mean) (1 / (255 std)): a product costs a GPU one instruction, an exact quotient sixteen.
    """
    mean, scale = _normalization(spec.mean, spec.std, images.device)
    return (images - mean).mul_(scale)


def mix(pixels: Tensor, partners: Tensor, lam: Tensor, boxes: Tensor) -> None:
    """Mix each row with its partner's pixels from before mixing, in place.

    MixUp: own x lam + partner x (1 - lam). CutMix, where a row has a box: the partner inside it, own outside.

    Args:
        pixels: float32 [B, S, S, 3].
        partners: row of the partner, int64 [B].
        lam: a row's own lam, float32 [B].
        boxes: top, left, height, width of what CutMix takes from the partner: int64 [B, 4]; height 0 for MixUp.
    """
    top, left, height, width = (_per_image(edge) for edge in boxes.unbind(1))
    at = torch.arange(pixels.shape[1], device=pixels.device)
    y, x = at.view(-1, 1, 1), at.view(1, -1, 1)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    theirs = torch.where(height > 0, inside.float(), 1 - _per_image(lam))
    # two products and a sum, as timm mixes: torch.lerp rounds once or twice, as the device happens to
    mixed_in = pixels.index_select(0, partners).mul_(theirs)
    pixels.mul_(1 - theirs).add_(mixed_in)


@dataclass(frozen=True)
class _Drawn:
    """Drawn parameters on the device, and what the host needs of them to launch operations without waiting."""

    columns: dict[str, Tensor]
    """Every column of COLUMNS, int64 [B] or [B, width]."""
    slots: list[list[tuple[str, Tensor, Tensor]]]
    """For each slot: operation, its rows int64 [K], their arguments float64 [K, 2]."""
    erased: int
    """Pixels to erase."""
    mixed: bool
    """Whether any row is mixed."""


def _send(params: ViewParams, device: torch.device) -> _Drawn:
    """Group the rows by operation, compute the arguments on the host, and copy both to the device at once.

    They are copied as float64 [B, 31 + 3 per slot that any row uses]: float64 holds every int32 exactly.
    """
    operations, magnitudes = ops.used_slots(params)
    count = operations.shape[1]
    extra = np.zeros((len(params), count, 3))
    groups = [_group(operations[:, slot], magnitudes[:, slot], extra[:, slot]) for slot in range(count)]
    host = torch.from_numpy(np.concatenate([params.table, extra.reshape(len(params), -1)], axis=1))
    carried = to_device(host, device)
    width = params.table.shape[1]
    table, orders = carried[:, :width].long(), carried[:, width:].unflatten(1, (count, 3))
    slots = []
    for slot, group in enumerate(groups):
        rows, arguments = orders[:, slot, 0].long(), orders[:, slot, 1:]
        slots.append([(name, rows[some], arguments[some]) for name, some in group])
    columns = {name: table[:, SLICES[name]].squeeze(1) for name in COLUMNS}  # squeeze: [B, 1] is [B], as on the host
    erased = int((params.erase[:, 2] * params.erase[:, 3]).sum())
    mixed = bool((params.lam < UNIT).any() or params.cutmix_bbox.any())
    return _Drawn(columns, slots, erased, mixed)


def _group(operations: np.ndarray, magnitudes: np.ndarray, lines: np.ndarray) -> list[tuple[str, slice]]:
    """Sort a slot's rows by operation; write row and arguments into `lines` [B, 3]; name each operation's lines."""
    order = np.argsort(operations, kind="stable")
    lines[:, 0] = order
    ends = np.searchsorted(operations[order], np.arange(len(OPERATIONS)), side="right")
    groups = []
    for index, name in enumerate(OPERATIONS[1:], start=1):
        some = slice(int(ends[index - 1]), int(ends[index]))
        if some.start < some.stop:
            lines[some, 1:] = ops.arguments(name, magnitudes[order[some]])
            groups.append((name, some))
    return groups


def _input(
    batch: Batch, pixels: Tensor, dtype: torch.dtype, patch: int, mix_labels: Tensor, lam: Tensor
) -> AugmentedBatch:
    """NHWC pixels as an NCHW view in `dtype`, which is channels-last, or cut into patches."""
    cast = pixels.to(dtype).permute(0, 3, 1, 2)
    cut = cut_patches(cast, patch) if patch else cast
    return AugmentedBatch(cut, batch.labels, mix_labels, lam, batch.valid, batch.params, batch.skipped)


def _per_image(values: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


@lru_cache(maxsize=8)
def _normalization(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean in pixel values and 1 / (255 std), float32 [2, 3]; kept on the device, as copying them would wait."""
    both = [[255 * value for value in mean], [1 / (255 * value) for value in std]]
    return torch.tensor(both, dtype=torch.float32, device=device)
