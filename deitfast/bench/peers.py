"""What others offer for the same work, measured beside ours on the same files and cores."""

from dataclasses import dataclass
from importlib import metadata

from deitfast.bench.peer import Opener
from deitfast.bench.peer_loaders import dali_stock, ffcv_stock, timm_dataloader
from deitfast.bench.peer_steps import teacher_in_the_loop, timm_step


@dataclass(frozen=True)
class Rival:
    """A peer and the distribution that it comes from."""

    distribution: str
    """The beginning of its name: DALI's ends in the version of CUDA."""
    open: Opener

    def version(self) -> str:
        """Return the distribution's whole name and its version."""
        named = (found for found in metadata.distributions() if found.name.startswith(self.distribution))
        return next((f"{found.name} {found.version}" for found in named), "")


DATALOADER = "DataLoader, PIL, timm's DeiT transform"
LOADERS = {
    DATALOADER: Rival("timm", timm_dataloader),
    "FFCV's stock pipeline": Rival("ffcv", ffcv_stock),
    "DALI's stock pipeline": Rival("nvidia-dali", dali_stock),
}
STEPS = {
    "timm's step": Rival("timm", timm_step),
    "a teacher in the loop": Rival("torchvision", teacher_in_the_loop),
}
