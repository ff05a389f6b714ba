"""The networks: ViT and DeiT, and one place that builds every architecture.

Every model takes pixels, floating point [B, 3, S, S], and returns a tuple of logits [B, classes]: the class head's
alone, or the class head's and the distillation head's, in training and in evaluation alike. Transformers take the
pixels cut into patches as well (`reads_patches`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deitfast.config.recipe import ModelSpec
from deitfast.config.sections import TransformerShape
from pipelines.augment.patches import cut_patches
from pipelines.errors import UserError


def build_model(spec: ModelSpec, *, size: int, classes: int, distilled: bool) -> nn.Module:
    """Return the network that `spec` names, freshly initialized from torch's global random generator.

    Args:
        size: side of the square input in pixels.
        classes: width of each head.
        distilled: whether there is a distillation token with a head of its own (deit_* only).

    Raises:
        UserError: a distillation token where the architecture has none, or a size that the patches do not tile.
    """
    if distilled and not spec.arch.startswith("deit_"):
        raise UserError(
            f"{spec.arch} has no distillation token",
            expected="deit_ti, deit_s or deit_b",
            remedy="take a deit_* model, or set model.token to off and distill.head to class",
        )
    if not spec.arch.startswith(("deit_", "vit_")):
        from deitfast.models.cnn import build_convnet  # torchvision takes a second to import

        return build_convnet(spec.arch, size=size, classes=classes)
    return VisionTransformer(
        size=size,
        patch=spec.patch,
        classes=classes,
        shape=spec.shape,
        distilled=distilled,
        drop_path=spec.drop_path,
        dropout=spec.dropout,
    )


def reads_patches(model: nn.Module) -> int:
    """Return the side of the patches that a model takes instead of pixels; 0 where it takes pixels only."""
    return model.patch_embed.patch if isinstance(model, VisionTransformer) else 0


def transformer_shape(model: nn.Module) -> TransformerShape | None:
    """Return what a transformer is built of; None for a CNN."""
    return model.shape if isinstance(model, VisionTransformer) else None


def joint(heads: tuple[Tensor, ...]) -> Tensor:
    """Return the published prediction: the mean of the heads' logits [B, classes]."""
    return sum(heads[1:], start=heads[0]) / len(heads)


def drop_path(branch: Tensor, probability: float, kept: Tensor | None) -> Tensor:
    """Zero the rows of a residual branch [B, N, width] that are not `kept`, bool [B]; scale the others by 1 / (1 - p).

    Stochastic depth (Huang et al., 2016), per sample as timm has it. None: the branch as it is.
    """
    if probability == 0 or kept is None:
        return branch
    return branch * (kept.to(branch.dtype) / (1 - probability)).view(-1, 1, 1)


class PatchEmbed(nn.Module):
    """The patch projection: a matrix product over patches.

    The parameter is the convolution's [width, 3, p, p] of every published checkpoint; it has PyTorch's default
    initialization. As a product its gradient is one product too, where the convolution's needs kernels of its own.
    """

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, 3, S, S], or patches [B, N, 3 p p] as `cut_patches` orders them, to tokens [B, N, width]."""
        patches = cut_patches(pixels, self.patch) if pixels.ndim == 4 else pixels
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, rows: int | None = None) -> Tensor:
        """Let the first `rows` tokens (None: all) of [B, N, width] attend to all N; return [B, rows, width]."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = attention(query[:, :, :rows], key, value)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v of [B, heads, N, d].

    PyTorch's fused attention, but for bf16 on a CPU: there plain products take a DeiT-Ti step at 32 px down to half
    its time, and at 224 px they are no slower.
    """
    if query.device.type == "cpu" and query.dtype is torch.bfloat16:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value)


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, N, width] to [B, N, width]."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(tokens)))))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, shape: TransformerShape, drop_path: float, dropout: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape.width, shape.heads, dropout)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = MLP(shape.width, shape.hidden, dropout)

    def forward(self, tokens: Tensor, rows: int | None = None, kept: Tensor | None = None) -> Tensor:
        """Map [B, N, width] to [B, N, width], or to its first `rows` tokens [B, rows, width].

        `kept`: which rows keep the block's two branches, bool [B, 2]; None: all.
        """
        attends, transforms = (None, None) if kept is None else kept.unbind(1)
        attended = self.attn(self.norm1(tokens), rows)
        tokens = tokens[:, :rows] + drop_path(attended, self.drop_path, attends)
        return tokens + drop_path(self.mlp(self.norm2(tokens)), self.drop_path, transforms)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021) and DeiT (Touvron et al., 2021); parameters named and shaped as timm's."""

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        classes: int,
        shape: TransformerShape,
        distilled: bool,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if size % patch:
            raise UserError(
                f"patches of {patch} px do not tile an image of {size} px",
                expected="augment.size a multiple of model.patch",
                remedy=f"set augment.size to {max(1, size // patch) * patch}, or model.patch to a divisor of {size}",
            )
        width, self.shape = shape.width, shape
        self.prefix = 2 if distilled else 1
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.dist_token = nn.Parameter(torch.empty(1, 1, width)) if distilled else None
        self.pos_embed = nn.Parameter(torch.empty(1, (size // patch) ** 2 + self.prefix, width))
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path * index / max(1, shape.depth - 1) for index in range(shape.depth)]
        self.blocks = nn.Sequential(*[Block(shape, rate, dropout) for rate in rates])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self.head_dist = nn.Linear(width, classes) if distilled else None
        self._initialize()

    def _initialize(self) -> None:
        """Draw as the DeiT reference does; layers not named here keep PyTorch's default (patches, LayerNorm 1/0)."""
        for table in (self.cls_token, self.dist_token, self.pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def drop_rates(self) -> list[float]:
        """Return the probability with which each residual branch is dropped in training, two for each block."""
        return [block.drop_path for block in self.blocks for _ in range(2)]  # pyright: ignore

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        """Map pixels [B, 3, S, S], or in patches [B, N, 3 p p], to the heads' logits, each [B, classes].

        `kept`: which rows keep which residual branches, bool [B, 2 x blocks] (`train.stochastic_depth.draw_kept`). An
        argument, so that what a compiled model or a CUDA graph drops is new in every step; None: all are kept.

        Raises:
            ValueError: the model trains with stochastic depth, and `kept` is missing.
        """
        if kept is None and self.training and any(self.drop_rates()):
            raise ValueError("with drop_path > 0, training takes `kept`: see train.stochastic_depth.draw_kept")
        patches = self.patch_embed(pixels)
        prefix = self.cls_token if self.dist_token is None else torch.cat((self.cls_token, self.dist_token), dim=1)
        tokens = torch.cat((prefix.expand(pixels.shape[0], -1, -1), patches), dim=1)
        tokens = self.pos_drop(tokens + self.pos_embed)
        for index, block in enumerate(self.blocks):
            # Nothing reads the patches behind the last block: it gives the prefix tokens only, 6 % less work.
            branches = None if kept is None else kept[:, 2 * index : 2 * index + 2]
            tokens = block(tokens, self.prefix if index == self.shape.depth - 1 else None, branches)
        tokens = self.norm(tokens)
        if self.head_dist is None:
            return (self.head(tokens[:, 0]),)
        return self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])
