"""The hardware JPEG decoder's share of the work: tried out once, and remembered for the machine."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from pipelines.files import atomic_write

log = logging.getLogger(__name__)
SHARES = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
"""What is tried. Below its best share the decoder idles; above it, the rest of the GPU waits for it."""
NEAR = 0.03
"""A rate this close to the best is as good: measurements scatter by so much."""
FILE = "hw_decoder_load.json"
_found: dict[str, float] = {}
"""What this process has measured: the file may not be writable."""


def decoder_share(key: str, measure: Callable[[float], float]) -> float:
    """Return the share of JPEGs to give the GPU's own decoder, in [0, 1].

    Of the shares that come near the best rate it is the highest: the step computes on what the decoder leaves it.

    Args:
        key: names machine, library and data, as far as the best share depends on them.
        measure: images/s at a share; called only if nothing is remembered under `key`.
    """
    if (known := _found.get(key, _remembered().get(key))) is not None:
        return known
    rates = {share: measure(share) for share in SHARES}
    best = max(rates.values())
    chosen = max(share for share, rate in rates.items() if rate >= (1 - NEAR) * best)
    tried = ", ".join(f"{share:g}: {rate:,.0f}" for share, rate in rates.items())
    log.info("hardware JPEG decoder: %g of the images (tried, in images/s: %s)", chosen, tried)
    _found[key] = chosen
    _remember(key, chosen)
    return chosen


def cache_file() -> Path:
    """Return where shares are remembered: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deitfast" / FILE


def _remembered() -> dict[str, float]:
    """Return what the file says; nothing where it is missing, unreadable or damaged."""
    try:
        tree = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    entries = tree.items() if isinstance(tree, dict) else ()
    return {key: float(share) for key, share in entries if isinstance(share, int | float) and 0 <= share <= 1}


def _remember(key: str, share: float) -> None:
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:  # ranks may write at once: the last one stays, and all say much the same
            file.write(json.dumps(_remembered() | {key: share}, indent=1).encode())
    except (OSError, RuntimeError) as error:
        log.info("the hardware decoder's share is not remembered: %s", error)
