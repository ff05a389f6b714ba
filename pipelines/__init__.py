"""From bytes on disk to a batch on the device. Knows nothing of models; `deitfast` imports it, never the reverse.

What other programs may use is in `__all__`; `deitfast/docs/library.md` shows how. Each name is imported when it is
first used, so that `import pipelines` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.augment.chain import AugmentedBatch
    from pipelines.augment.chain import augment as augment_batch
    from pipelines.batch import Batch, Loader
    from pipelines.errors import DeitfastError, UserError
    from pipelines.loaders.open import batch_of_images, eval_loader, train_loader
    from pipelines.spec import AugmentSpec, DatasetSpec, LoaderSpec
    from pipelines.storage.dataset import Dataset

__all__ = [
    "AugmentSpec", "AugmentedBatch", "Batch", "Dataset", "DatasetSpec", "DeitfastError", "Loader", "LoaderSpec",
    "UserError", "augment_batch", "batch_of_images", "eval_loader", "train_loader",
]  # fmt: skip
_HOMES = {
    "AugmentSpec": "spec", "AugmentedBatch": "augment.chain", "Batch": "batch", "Dataset": "storage.dataset",
    "DatasetSpec": "spec", "DeitfastError": "errors", "Loader": "batch", "LoaderSpec": "spec", "UserError": "errors",
    "augment_batch": "augment.chain:augment", "batch_of_images": "loaders.open",
    "eval_loader": "loaders.open", "train_loader": "loaders.open",
}  # fmt: skip
"""Module of each public name, and the name it has there if it is another (`pipelines.augment` is a package)."""


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    module, _, own = _HOMES[name].partition(":")
    return getattr(import_module(f"pipelines.{module}"), own or name)


def __dir__() -> list[str]:
    return __all__
