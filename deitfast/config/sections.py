"""The sections of a recipe: every setting of network, distillation, optimizer, schedule and training."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from deitfast.config.choices import Arch, DistillMode, Prediction, WhichCheckpoint
from pipelines.choices import Kernels
from pipelines.spec import STRICT

MOST_EPOCHS, MOST_IMAGES = 100_000, 1 << 20
"""Bounds of what is counted in epochs and of what is counted in images of a batch."""
Decay = Annotated[float, Field(ge=0, lt=1)]
HEAD_WIDTH = 64
"""Width of an attention head in every ViT and DeiT."""
TRANSFORMER_FIELDS = ("token", "width", "depth", "heads", "mlp_ratio", "patch", "drop_path", "dropout")
"""Fields of a model that a CNN does not read."""
WIDTHS = {"ti": 192, "s": 384, "b": 768}
"""Widths of the transformers, by the end of their names."""


class TransformerShape(NamedTuple):
    """What a transformer is built of."""

    width: int
    depth: int
    heads: int
    hidden: int
    """Width of an MLP's hidden layer."""


@dataclass(frozen=True, config=STRICT)
class ModelSpec:
    """The network; its input size is `augment.size`."""

    arch: Arch = "deit_ti"
    """deit_* may carry a distillation token, vit_* have a class token only; the rest are torchvision's CNNs."""
    token: Literal["auto", "on", "off"] = "auto"
    """Distillation token beside the class token; auto: on where `distill` uses one (deit_* only)."""
    prediction: Prediction = "auto"
    """Head whose figures are shown and pick the best checkpoint (all heads are evaluated); auto: with a distillation
    token joint, the mean of both heads' logits, else class."""
    width: int = Field(default=0, ge=0, le=8192)
    """Width of the tokens; 0: that of `arch`, 192, 384 or 768 (transformers only)."""
    depth: int = Field(default=12, ge=1, le=256)
    """Blocks (transformers only)."""
    heads: int = Field(default=0, ge=0, le=1024)
    """Attention heads, a divisor of the width; 0: one for every 64 of it (transformers only)."""
    mlp_ratio: float = Field(default=4.0, ge=0.01, le=64)
    """Width of an MLP's hidden layer over the tokens' (transformers only)."""
    patch: int = Field(default=16, ge=1, le=4096)
    """Side of a patch in pixels (transformers only)."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the last block, rising linearly from 0 at the first (transformers only)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after the positions, the attention's projection and both layers of the MLP (transformers only)."""
    weights: str = ""
    """Run or file whose weights a run starts from, of the same shape and classes; "": drawn from `train.seed`."""
    finetune: str = ""
    """Run or file to fine-tune: positions are resized to `augment.size`, heads of other classes initialized again."""
    assume_class_order: bool = False
    """Weights to start from whose class names are not known have the data set's classes, in its order."""
    start_checkpoint: WhichCheckpoint = "auto"
    """Of a run to start from: its best or its last checkpoint; auto: the best where it was validated."""

    @property
    def shape(self) -> TransformerShape:
        """What a deit_* or vit_* is built of."""
        width = self.width or WIDTHS[self.arch.partition("_")[2]]
        heads = self.heads or max(1, width // HEAD_WIDTH)
        hidden = int(round(width * self.mlp_ratio, 6))  # as timm's, but for a ratio that was a quotient
        return TransformerShape(width, self.depth, heads, max(1, hidden))


@dataclass(frozen=True, config=STRICT)
class DistillSpec:
    """How the teacher teaches, and which head learns from it."""

    mode: DistillMode = "none"
    """hard: cross-entropy with the teacher's argmax; soft: KL divergence at temperature tau."""
    teacher: str = ""
    """Folder of the teacher's run, a file of weights, a network that torchvision has published, or timm/NAME."""
    teacher_weights: str = ""
    """File with the weights of torchvision's or timm's network; "": its published ones, fetched if need be."""
    teacher_checkpoint: WhichCheckpoint = "auto"
    """Of a run as teacher: its best or its last checkpoint; auto: the best where it was validated."""
    assume_class_order: bool = False
    """A teacher whose class names are not known has the data set's classes, in its order."""
    cache: str = "auto"
    """Folder of a teacher cache: what is in it is not asked again, and what is not is added. auto: for hard targets one
    in caches/, named by all that they depend on; none: the teacher answers in the loop, and nothing is kept."""
    targets: Literal["exact", "reused", "per_image"] = "exact"
    """exact: the teacher sees each view (DeiT); reused: `views` views, again and again; per_image: the teacher sees
    each image once, whole and unmixed, and its answers are mixed like labels (not DeiT)."""
    views: int = Field(default=0, ge=0, le=MOST_EPOCHS)
    """Views of each image that `targets = "reused"` goes round; a multiple of `augment.repeats`."""
    top_k: int = Field(default=10, ge=1, le=65_536)
    """Logits that a cache keeps of each soft target (at most all classes); of the others it knows their total."""
    top_dtype: Literal["float16", "float32"] = "float16"
    """How it keeps them."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Weight of the distillation term; the base loss has 1 - alpha."""
    tau: float = Field(default=3.0, ge=1e-3, le=1e3)
    """Temperature of soft distillation."""
    head: Literal["distillation", "class"] = "distillation"
    """Head that the distillation term is applied to; class: the class token learns from label and teacher alike."""
    normalization: Literal["batch", "batch_classes"] = "batch"
    """Divisor of the soft term: batch (the paper's formula) or batch x classes (the reference code)."""


@dataclass(frozen=True, config=STRICT)
class OptimSpec:
    """The update."""

    name: Literal["adamw", "adam", "sgd", "lamb"] = "adamw"
    """adamw; adam, whose weight decay is an L2 penalty in the gradient; sgd with Nesterov momentum: these are fused
    where the device has it; lamb, which scales an update to its tensor (DeiT III's, there with `clip` 1)."""
    lr: float = Field(default=5e-4, gt=0, le=100)
    """Peak learning rate for a global batch of `lr_batch`; scaled linearly to the run's own."""
    lr_batch: int = Field(default=512, ge=0, le=MOST_IMAGES)
    """Global batch that `lr` is meant for; 0: `lr` is not scaled."""
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    """Not applied to 1-D parameters, biases, positions and tokens."""
    decay_dist_token: bool = False
    """Decay the distillation token as the reference does; today's timm does not."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's, Adam's and LAMB's moments."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """AdamW's, Adam's and LAMB's epsilon."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's momentum."""
    clip: float = Field(default=0.0, ge=0, le=1e6)
    """Largest norm of the gradient; 0: no clipping."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from each layer to the one below it, as timm's; 1: all layers have the same rate."""
    freeze: tuple[str, ...] = ()
    """Modules that keep their weights, by name (patch_embed, blocks.0, layer1); backbone: all but the heads."""


@dataclass(frozen=True, config=STRICT)
class ScheduleSpec:
    """Learning rate against time: linear warm-up, then half a cosine over all epochs, steps down, or the peak."""

    shape: Literal["cosine", "step", "constant"] = "cosine"
    """What follows warm-up: half a cosine from the peak to `min_lr`; the peak times `step_factor` every `step_epochs`;
    or the peak (the paper's fine-tuning)."""
    step_epochs: float = Field(default=30.0, ge=0.01, le=MOST_EPOCHS)
    """Epochs between two steps down, counted from the run's start."""
    step_factor: float = Field(default=0.1, gt=0, le=1)
    """Factor of each step down."""
    warmup_epochs: float = Field(default=5.0, ge=0, le=MOST_EPOCHS)
    """Epochs of warm-up, inside the run's epochs."""
    warmup_lr: float = Field(default=1e-6, ge=0, le=100)
    """Learning rate at the first step; not scaled by the batch."""
    min_lr: float = Field(default=1e-5, ge=0, le=100)
    """Learning rate at the end of a cosine; not scaled by the batch."""
    per: Literal["step", "epoch"] = "step"
    """step: a new rate every step; epoch: the reference's, which runs epochs 0 and 1 at warmup_lr."""


@dataclass(frozen=True, config=STRICT)
class TrainSpec:
    """How long, how much at once, and in which precision."""

    epochs: int = Field(default=300, ge=1, le=MOST_EPOCHS)
    """Epochs of the run."""
    batch: int = Field(default=1024, ge=1, le=MOST_IMAGES)
    """Global batch in views, over all ranks and accumulation steps."""
    accumulate: int = Field(default=1, ge=1, le=MOST_IMAGES)
    """Parts that each rank's batch is cut into; gradients are summed over them."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """Base loss; bce: binary cross-entropy of each class by itself, the mean over the classes (DeiT III's, timm's)."""
    bce_threshold: Literal["off"] | Annotated[float, Field(ge=0, lt=1)] = "off"
    """Of bce: classes whose mixed and smoothed target is above it count fully, the others not at all, as timm's
    --bce-target-thresh (DeiT III: 0, with smoothing 0); off: the targets as they are."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of the base loss."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initialization, stochastic depth and dropout."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast dtype; auto: bf16 where the device computes in it, else fp16 on CUDA, else off."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile; graphs: with CUDA graphs, for steps that end sooner than their kernels can be started; auto: on
    CUDA only, with graphs up to 64 px on one GPU."""
    kernels: Kernels = "auto"
    """Augmentation in Triton's kernels or in batched torch, to the same bits; auto: the kernels on CUDA."""
    ema: float = Field(default=0.99996, ge=0, lt=1)
    """Decay of the averaged weights, evaluated beside the plain ones; 0: none."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training images used, the same share of every class."""
    evaluate_every: int = Field(default=1, ge=1, le=MOST_EPOCHS)
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_minutes: float = Field(default=10.0, ge=0, le=1e6)
    """Minutes between checkpoints inside an epoch; every epoch ends with one. 0: a checkpoint every step."""
