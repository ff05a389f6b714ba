"""A terminal that goes away, as when ssh is cut: what runs in it saves and ends, or, if it is to stay, goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deitfast.distill.cache import TeacherCache
from deitfast.run_folder import RunFolder
from tests.helpers.small_runs import SOON, run, tiny_recipe, weights
from tests.helpers.small_teachers import distilled, judged, taught

__all__ = ["judged"]
RECIPE = tiny_recipe("loader.name=reference", "train.epochs=2", "train.ema=0", "train.checkpoint_minutes=1000")
STEPS = 5
"""Of an epoch."""
SCRIPT = """
import fcntl, signal, sys, termios, time
from pathlib import Path
sys.path[:0] = {paths!r}
from rich.console import Console
from tests.helpers.small_runs import CPU
from tests.helpers.small_teachers import distilled, judge, with_cache
from tests.deitfast.test_hangup import RECIPE
from deitfast.distill import build_cache, cache_key, precompute
from deitfast.train import loop, trainer
from deitfast.progress import Display, start_logging

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal tells its session when it goes
what, data, out, deaf = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
signal.signal(signal.SIGHUP, signal.SIG_IGN if deaf else signal.SIG_DFL)
augment = loop.augment
def slow(*arguments, **options):
    time.sleep(0.2)
    return augment(*arguments, **options)
loop.augment = build_cache.augment = slow
cache_key.load_teacher = lambda spec, classes: judge(len(classes))
console = Console(stderr=True)
start_logging(console)
if what == "train":
    trainer.train(trainer.TrainJob(RECIPE, data, out, resume=False, command=("test",)), CPU, Display(console))
else:
    precompute.teach(precompute.TeachJob(with_cache(distilled(), out), data), CPU, Display(console))
"""


def hung_up(tmp_path: Path, what: str, data: Path, out: Path, *deaf: str, **environment: str) -> float:
    """Run the script on a terminal of its own, close that in the middle; return the seconds until it had ended."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "script.py").write_text(SCRIPT.format(paths=[str(root)]))
    ours, its = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), what, str(data), str(out), *deaf],
        stdin=its, stdout=its, stderr=its, start_new_session=True, env=os.environ | {"TERM": "xterm"} | environment,
    )  # fmt: skip
    os.close(its)
    seen = b""
    while f"2/{STEPS}".encode() not in seen and b"32/" not in seen:
        seen += os.read(ours, 1 << 16)  # raises OSError if it ends before
    os.close(ours)
    began = time.monotonic()
    process.wait(10 * SOON)
    return time.monotonic() - began


def test_a_training_saves_and_says_why_it_ends(tiny_small: Path, tmp_path: Path) -> None:
    assert hung_up(tmp_path, "train", tiny_small, tmp_path / "run") < SOON
    steps = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["steps"]
    assert 2 <= steps < STEPS
    log = RunFolder(tmp_path / "run").log.read_text()
    assert f"SIGHUP: stopped at epoch 1, step {steps}. Resume: " in log
    run(tiny_small, tmp_path / "run", RECIPE, resume=True)
    run(tiny_small, tmp_path / "whole", RECIPE)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}], ids=["", "color"])
def test_a_training_that_is_to_outlive_its_terminal_does(tiny_small: Path, tmp_path: Path, environment) -> None:
    """FORCE_COLOR has bars drawn also where no terminal is left."""
    hung_up(tmp_path, "train", tiny_small, tmp_path / "run", "deaf", **environment)
    assert [row["epoch"] for row in RunFolder(tmp_path / "run").metrics()] == [1, 2]


def test_a_teacher_keeps_its_answers(tiny_small: Path, tmp_path: Path, judged) -> None:
    assert hung_up(tmp_path, "teach", tiny_small, tmp_path / "cache") < SOON
    assert 32 <= TeacherCache.open(tmp_path / "cache").count() < 160
    taught(tiny_small, tmp_path / "cache", distilled())
    taught(tiny_small, tmp_path / "whole", distilled())
    files = [(tmp_path / name / "targets.npy").read_bytes() for name in ("cache", "whole")]
    assert files[0] == files[1]
