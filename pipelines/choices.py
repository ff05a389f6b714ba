"""The names that options and recipes choose from. Nothing is imported here, so that `--help` stays fast."""

from typing import Literal

SourceKind = Literal["imagenet", "cifar10", "cifar100", "folder", "wds", "huggingface", "demo", "dataset"]
"""What `convert` reads."""
StoredFormat = Literal["beton", "wds"]
"""How a converted data set is stored: one .beton file a split, or WebDataset tar shards."""
LoaderName = Literal["auto", "resident", "dali", "cpu", "ffcv", "reference"]
Kernels = Literal["auto", "on", "off"]
"""Whether augmentation runs in Triton's kernels or in batched torch; auto: the kernels on CUDA, if Triton is there."""
