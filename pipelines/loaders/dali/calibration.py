"""The hardware JPEG decoder's share of the images: measured once, and remembered for the machine."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.files import atomic_write
from pipelines.workers import local_rank

log = logging.getLogger(__name__)
SHARES = (1.0, 0.0, 0.9, 0.8, 0.65, 0.5, 0.3)
"""Shares that are measured, in this order: if the first two are equally fast, the GPU has no such decoder."""
DEFAULT = 0.65
"""The share of ranks that wait in vain for the first rank's measurement."""
HEADROOM = 1.3
"""A rate this many times the step's consumption is enough: batches never make the step wait."""
NEAR = 0.03
"""Rates are equal within this: measurements scatter by so much."""
POLL_SECONDS, PATIENCE_SECONDS = 0.5, 60.0
"""How often, and for how long, the other ranks of a machine look for the first one's result."""
FILE = "hw_decoder_load.json"
_found: dict[str, float] = {}
"""What this process has measured: the file may not be writable."""


def decoder_share(key: str, measure: Callable[[float], float], needed: float) -> float:
    """Return the share of JPEGs to give the GPU's own decoder, in [0, 1].

    Whatever the decoder does not take is decoded on the multiprocessors, which the step needs. So it is the highest
    share whose rate is `HEADROOM` times what the step consumes; if none is that fast, the highest near the best rate.
    Processes that share a machine would disturb each other's measurement: the first one measures for all.

    Args:
        key: names machine, library, data and `needed`, as far as the best share depends on them.
        measure: views/s at a share; called only if nothing is remembered under `key`.
        needed: views/s that the step consumes at most.
    """
    if (known := _known(key)) is not None:
        return known
    if local_rank() > 0:
        return _wait_for_first_rank(key)
    rates: dict[float, float] = {}
    for share in SHARES:
        rates[share] = measure(share)
        if rates[share] >= HEADROOM * needed and share == max(SHARES):
            break
        if len(rates) == 2 and min(rates.values()) >= (1 - NEAR) * max(rates.values()):
            break
    enough = min(HEADROOM * needed, (1 - NEAR) * max(rates.values()))
    chosen = max(share for share, rate in rates.items() if rate >= enough)
    tried = ", ".join(f"{share:g}: {rate:,.0f}" for share, rate in sorted(rates.items()))
    log.info("hardware JPEG decoder: %g of the images (measured, in views/s: %s)", chosen, tried)
    _found[key] = chosen
    _remember(key, chosen)
    return chosen


def _known(key: str) -> float | None:
    return _found.get(key, _remembered().get(key))


def _wait_for_first_rank(key: str) -> float:
    """Return what the first rank of this machine has measured; `DEFAULT` if that takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (known := _known(key)) is None:
        if time.monotonic() > deadline:
            log.info("hardware JPEG decoder: %g of the images (the first rank left no measurement)", DEFAULT)
            return _found.setdefault(key, DEFAULT)
        time.sleep(POLL_SECONDS)
    return known


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
        with atomic_write(path) as file:  # runs may write at once: the last one stays
            file.write(json.dumps(_remembered() | {key: share}, indent=1).encode())
    except (OSError, RuntimeError) as error:
        log.info("the hardware decoder's share is not remembered: %s", error)
