"""tools/setup: which generation of CUDA it installs for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "tools" / "setup"


def dry_run(folder: Path, driver: str, cuda: str = "") -> tuple[int, str]:
    """Run tools/setup with an nvidia-smi that prints `driver`; return exit code and message."""
    fake = folder / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\n{f'echo {driver}' if driver else 'exit 9'}\n")
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CUDA": cuda, "PYTHON": sys.executable}
    done = subprocess.run([SETUP, "--dry-run"], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("driver", "cuda", "says"),
    [
        ("580.65.06", "", "CUDA 13 because driver 580.65.06 speaks it"),
        ("590.1", "", "CUDA 13"),
        ("570.124.06", "", "CUDA 12 because driver 570.124.06 speaks it and CUDA 13 needs driver 580"),
        ("470.1", "", "driver 470.1 is too old"),
        ("", "", "CUDA 13 because no NVIDIA driver was found"),
        ("NVIDIA-SMI has failed", "", "CUDA 13 because no NVIDIA driver was found"),
        ("570.124.06", "13", "CUDA 13 as CUDA=13 asks for"),
        ("580.65.06", "12", "CUDA 12 as CUDA=12 asks for"),
    ],
)
def test_cuda_is_chosen_by_the_driver_or_as_asked(tmp_path: Path, driver: str, cuda: str, says: str) -> None:
    code, message = dry_run(tmp_path, driver, cuda)
    assert code == 0, message
    assert says in message


def test_another_cuda_is_refused(tmp_path: Path) -> None:
    code, message = dry_run(tmp_path, "580.65.06", "11")
    assert code == 1
    assert "CUDA=11: expected 12 or 13" in message
