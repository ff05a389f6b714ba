"""Worker processes that give results in order."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.workers import in_order, usable_cores


def square(number: int) -> int:
    """Run by worker processes."""
    if number == 13:
        raise UserError("unlucky", found="13")
    if number == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.005 * (number % 3))
    return number * number


def test_workers_give_results_in_order():
    assert list(in_order(square, range(12), 2)) == [number * number for number in range(12)]


def test_workers_errors_and_deaths_are_reported():
    with pytest.raises(UserError, match="unlucky") as raised:
        list(in_order(square, [1, 13, 2], 2))
    assert raised.value.found == "13"
    with pytest.raises(DeitfastError, match=r"worker process died(.|\n)*out of memory"):
        list(in_order(square, [1, 14, 2], 2))


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    """A container or a scheduler may leave a process a few of the machine's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_workers_import_no_torch():
    program = "import sys, pipelines.storage.convert.split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[1]).returncode == 0
