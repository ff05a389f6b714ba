"""Export to ONNX: pixels to logits, any batch."""

from pathlib import Path

import torch
from torch import Tensor, nn

from deitfast.models.vit import joint, transformer_shape
from deitfast.weights.load import TrainedModel
from deitfast.weights.sidecar import METADATA, describe_ours
from pipelines.errors import UserError
from pipelines.files import write_bytes

TRACED_BATCH = 2
"""Of the export: torch takes a batch of 1 for a constant."""


def export_onnx(trained: TrainedModel, out: Path) -> tuple[Path, ...]:
    """Write a model as one ONNX file: pixels, float32 [batch, 3, S, S], to logits, float32 [batch, classes].

    The batch may be of any size. Pixels are resized, cropped and normalized as the metadata says, under the same key
    and in the same words as in an exported .safetensors. Logits are the published prediction: two heads' mean.

    Raises:
        UserError: a package that torch exports with is not installed.
        DeitfastError: the disk is full or not writable.
    """
    side = trained.recipe.augment.size
    pixels, batch = torch.zeros(TRACED_BATCH, 3, side, side), torch.export.Dim("batch")
    try:
        program = torch.onnx.export(
            Published(trained.model).eval(), (pixels,), dynamo=True, verbose=False,
            input_names=["pixels"], output_names=["logits"], dynamic_shapes=({0: batch},),
        )  # fmt: skip
    except ImportError as error:  # of either package
        raise UserError(
            "the export to ONNX needs two packages more", found=str(error), remedy="pip install onnx onnxscript"
        ) from error
    assert program is not None  # only the older exporter, which writes a file, returns nothing
    program.model.metadata_props[METADATA] = describe_ours(
        trained.classes, trained.recipe.augment, transformer_shape(trained.model)
    )
    write_bytes(out, program.model_proto.SerializeToString())
    return (out,)


class Published(nn.Module):
    """A network with its published prediction as its one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, 3, S, S] to logits [B, classes]."""
        return joint(self.model(pixels))
