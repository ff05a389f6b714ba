"""The names that options and recipes choose from. Nothing is imported here, so that `--help` stays fast."""

from typing import Literal

Arch = Literal[
    "deit_ti", "deit_s", "deit_b", "vit_ti", "vit_s", "vit_b",
    "resnet18", "resnet20", "resnet50", "regnet_y_4gf", "regnet_y_8gf", "regnet_y_16gf",
]  # fmt: skip
DistillMode = Literal["none", "soft", "hard"]
MethodName = Literal[
    "no-distillation", "usual-distillation", "hard-distillation", "class-embedding", "distillation-embedding",
    "class+distillation",
]  # fmt: skip
"""The rows of the DeiT paper's table 3, in its words."""
Prediction = Literal["auto", "class", "distillation", "joint"]
"""Heads whose prediction may be the model's: one of the two, or the mean of their logits."""
WhichCheckpoint = Literal["auto", "best", "last"]
"""Of a run's checkpoints: that of the best validation top-1, or the last one; auto: the best where there is one."""
