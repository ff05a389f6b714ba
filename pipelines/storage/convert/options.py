"""What a conversion can be asked for, apart from source and output."""

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.storage.formats.format import Format, beton


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion; the command line builds it, the source and the converter read it."""

    max_side: int = 0
    """Shrink longer images to this longest side in pixels; 0: none."""
    quality: int | None = None
    """JPEG quality; None: re-encode (at 95) only what must be. See `transcode.EncodeOptions`."""
    allow_huge: bool = False
    """Read images above 179 million pixels, up to `transcode.HUGE_PIXELS`, and shrink them; `max_side` does so too."""
    form: Format = field(default_factory=beton)
    """How splits are stored."""
    val_fraction: float = 0.0
    """Share of each training class that becomes the split val; 0: the splits are the source's."""
    val_seed: int = 0
    """Seed of that draw."""
    coarse: bool = False
    """CIFAR-100's 20 coarse labels instead of the 100 fine ones."""
    labels: tuple[Path, ...] = ()
    """Tables that say the class of each image of a folder; none: its class folders do."""
    skip_bad: bool = False
    """Leave out files that are no whole images and list them in skipped.txt, rather than stop at the first."""
    workers: int = 0
    """Processes; 0: one a usable core; 1: this one."""
