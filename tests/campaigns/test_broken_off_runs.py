"""Runs that are killed, stopped or run out of disk or descriptors at any file event: they go on, and end the same.

pytest tests/campaigns/test_broken_off_runs.py -m slow --cases 300
"""

import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from deitfast.distill.cache import TeacherCache
from pipelines.errors import DeitfastError
from tests.helpers.small_runs import EVERY_STEP, run, weights
from tests.helpers.small_teachers import distilled, judged

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("judged")]
assert judged
EVENTS = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.truncate")
READING = ("r", "rb")
FAILED, STOPPED = 1, 130
ENDS = {"killed": (-signal.SIGKILL,), "full": (0, FAILED), "no descriptors": (0, FAILED)}
"""How a run may end that met trouble; a signal stops it, or comes too late."""
LEFT_OVER = (".partial", ".lock", "parts")


def full(draw: random.Random) -> None:
    """No file may grow beyond a size, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (draw.choice((0, 100, 10_000, 1_000_000)), resource.RLIM_INFINITY))


def no_descriptors(draw: random.Random) -> None:
    """Nothing more can be opened."""
    most = len(os.listdir("/proc/self/fd")) - draw.choice((0, 1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


TROUBLE: dict[str, Callable[[random.Random], object]] = {
    "killed": lambda draw: os.kill(os.getpid(), signal.SIGKILL),
    "SIGINT": lambda draw: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM": lambda draw: os.kill(os.getpid(), signal.SIGTERM),
    "full": full,
    "no descriptors": no_descriptors,
}


class Ended(NamedTuple):
    """How a training in a process of its own ended."""

    code: int
    """0: done; FAILED: with a message; STOPPED: asked to; below 0: by a signal; 99: by an error that is no message."""
    events: int
    """File events in its folder."""
    told: str


def trained(
    data: Path, folder: Path, *, resume: bool = False, at: int = 0, trouble: Callable[[], object] = id
) -> Ended:
    """Train in a process of its own, and meet trouble at a file event in `folder`."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            events, _, told = pipe.read().partition(" ")
        return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(events or 0), told)
    seen, code, told = 0, 99, ""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(folder) in str(arguments[0]) and (event != "open" or arguments[1] not in READING):
            seen += 1
            if seen == at:
                trouble()

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        recipe = distilled(
            EVERY_STEP, "model.depth=1", "model.width=64", "train.ema=0.5", f"distill.cache={folder / 'cache'}"
        )
        sys.addaudithook(watch)
        run(data, folder / "run", recipe, resume=resume)
        code = 0
    except DeitfastError as error:
        code, told = FAILED, str(error)
    except KeyboardInterrupt:
        code = STOPPED
    except BaseException as error:
        told = f"{type(error)}: {error}"
    os.write(writing, f"{seen} {told}".encode())
    os._exit(code)


def everything(folder: Path) -> tuple[dict[str, torch.Tensor], bytes]:
    """A run's weights, and its cache's targets."""
    cache = TeacherCache.open(folder / "cache")
    return weights(folder / "run"), b"".join(row.tobytes() for first in cache.passes for row in cache.read_pass(first))


def test_a_run_that_is_broken_off_goes_on_and_ends_the_same(
    tiny_small: Path, tmp_path: Path, cases: int, request: pytest.FixtureRequest
) -> None:
    cases = cases if request.config.getoption("--cases", default=0) else 10
    whole, ended = trained(tiny_small, tmp_path / "whole"), Counter[str]()
    assert whole.code == 0, whole.told
    assert whole.events > 50
    expected = everything(tmp_path / "whole")
    for seed in range(cases):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        name, at = draw.choice(list(TROUBLE)), draw.randint(1, whole.events)
        first = trained(tiny_small, folder, at=at, trouble=partial(TROUBLE[name], draw))
        what = f"seed {seed}, {name} at event {at} of {whole.events}: {first}"
        assert first.code in ENDS.get(name, (STOPPED, 0)), what
        assert first.code != FAILED or "hint" in first.told, what
        again = trained(tiny_small, folder, resume=True)
        assert again.code == 0, f"{what}; resumed: {again}"
        found = everything(folder)
        assert found[1] == expected[1], what
        assert all(torch.equal(value, found[0][key]) for key, value in expected[0].items()), what
        left = [path.name for path in folder.rglob("*") if path.name.endswith(LEFT_OVER)]
        assert not left, f"{what}: {left}"
        ended[f"{name} {first.code}"] += 1
        shutil.rmtree(folder)
    print(dict(ended))  # noqa: T201
