"""Command after command in one process: none leaves files open, threads running or memory behind.

pytest tests/campaigns/test_leaks.py -m slow --cases 500
"""

import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.helpers.command_line import call

LOADERS = ["resident", "cpu", "reference"]
WARM = 12
"""Commands after which everything that stays has been loaded once."""
MOST_KILOBYTES = 200
"""Of memory that a command may leave on average: what the allocator keeps varies; a batch has 200 KB, a model 2,000."""
SMALL = "--epochs 1 --batch 16 --set model.depth=1 --set model.patch=16 --set augment.mix_group=8"


def left_behind() -> tuple[int, int, int]:
    """Return this process's open files, threads and resident kilobytes."""
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return len(os.listdir("/proc/self/fd")), threading.active_count(), int(resident.split()[1])


@pytest.mark.slow
def test_no_command_leaves_anything_behind(
    capsys: pytest.CaptureFixture[str], tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: int
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for case in range(max(cases, 3 * WARM)):
        shutil.rmtree("r", ignore_errors=True)
        loader = LOADERS[case % len(LOADERS)]
        train = f"train --data {tiny_small} --out r --recipe deit_ti_cifar10 --loader {loader} {SMALL}"
        for line in (train, "eval r", f"predict r {tiny_small} --csv p.csv", f"verify {tiny_small}"):
            code, _, err = call(capsys, *line.split())
            assert code == 0, err
        found.append(left_behind())
    files, threads, kilobytes = zip(*found[WARM:], strict=True)
    assert max(files) == min(files), files
    assert max(threads) == min(threads), threads
    half = len(kilobytes) // 2
    growth = min(kilobytes[half:]) - min(kilobytes[:half])
    assert growth < MOST_KILOBYTES * half, kilobytes
