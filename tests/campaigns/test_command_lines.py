"""Command lines with words dropped, doubled, swapped or replaced: each works, is refused in words or ends at Ctrl-C.

pytest tests/campaigns/test_command_lines.py -m slow --cases 5000
"""

import io
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from deitfast.cli import INTERRUPTED
from deitfast.cli.app import app
from deitfast.config.recipe import Recipe, flatten
from tests.helpers.command_line import call
from tests.helpers.small_runs import run, tiny_recipe

SECONDS = 10
"""For one line, which mostly takes less than one; trainings may go on for ever."""
SMALL = "--set model.depth=1 --set model.patch=16 --set augment.mix_group=8"
LINES = [
    line.split()
    for line in (
        "convert folder src out",
        "convert folder src out --val-fraction 0.5 --max-side 16 --quality 80 --format wds",
        "info d",
        "info r",
        "info c",
        "verify d",
        "verify c",
        f"train --data d --out out --epochs 1 --batch 16 {SMALL}",
        f"train --data d --out out --epochs 1 --batch 16 --distill hard --teacher r --cache none {SMALL}",
        f"train --data d --out out --epochs 1 --batch 16 --finetune r {SMALL}",
        "train --data d --out r --resume",
        f"teach --data d --out out --teacher r --views 1 --batch 16 {SMALL}",
        "eval r",
        "eval r --data d --json out.json --predictions out.csv --which last",
        "predict r src --top 3 --csv out.csv --html out.html",
        "predict r d --split val",
        "export r out.safetensors",
        "export r out --format timm",
        "report r",
        "report r r --out out.html",
        "recipes deit_ti_cifar10",
        "docs faq",
        "doctor",
        "study course --data d --only ViT --dry-run",
        f"bench loader --data d --batch 16 --seconds 0.01 {SMALL}",
    )
]
VALUES = [
    *("0", "-1", "1", "2", "3", "0.5", "-0.0", "nan", "inf", "-inf", "1e308", "1e20", "9" * 20, "1_0", "0x1", "", " "),
    *("x", "\u2603", "\udcff", "a\nb", "[red]", "%s", "true", "off", "auto", "none", "[1, 2]", "{}", "=", "--", "-"),
    *("/dev/null", "/dev/full", "/proc/self", "/missing/x", "~/missing", "..", "d", "r", "c", "src", "src/a/0.png"),
]


def mutated(rng: np.random.Generator) -> list[str]:
    """Return a line of `LINES` with one or two changes."""

    def one_of(items: list[Any]) -> Any:
        return items[int(rng.integers(len(items)))]

    words, group, fields = list(one_of(LINES)), typer.main.get_command(app), list(flatten(Recipe()))
    for _ in range(1 if rng.random() < 0.7 else 2):
        at = int(rng.integers(len(words)))
        match int(rng.integers(10)):
            case 0:
                del words[at]
            case 1:
                words.insert(at, words[at])
            case 2:
                other = int(rng.integers(len(words)))
                words[at], words[other] = words[other], words[at]
            case 3:
                words[at:at] = [one_of(one_of(LINES))]
            case 4 | 5:
                words[at] = one_of(VALUES)
            case 6 | 7:
                command: Any = group.commands.get(words[0])  # pyright: ignore
                options = [name for option in command.params for name in option.opts] if command else []
                words += [one_of([*options, "--help"]), *([one_of(VALUES)] if rng.random() < 0.8 else [])]
            case _:
                words += ["--set", f"{one_of(fields)}={one_of(VALUES)}"]
        words = words or ["info"]
    return words


@contextmanager
def asked_to_stop_after(seconds: int) -> Iterator[None]:
    """Press Ctrl-C if the block takes longer; raise TimeoutError if it does not end a minute later."""

    def late(*_: object) -> None:
        signal.signal(signal.SIGALRM, hung)
        signal.alarm(60)
        os.kill(os.getpid(), signal.SIGINT)

    def hung(*_: object) -> None:
        raise TimeoutError("Ctrl-C did not end it")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_a_line_works_or_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: int
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(tiny_small, kept / "d")
    for name in ("a", "b"):
        (kept / "src" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 24), (number, 90, 20)).save(kept / "src" / name / f"{number}.png")
    monkeypatch.chdir(kept)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEITFAST_DATA", raising=False)
    run(Path("d"), Path("r"), tiny_recipe("train.epochs=1", "train.ema=0", "model.depth=1"))
    teach = f"teach --data d --out c --teacher r --views 1 --batch 16 {SMALL}".split()
    assert call(capsys, *teach)[0] == 0
    inputs = {path.relative_to(kept): path.read_bytes() for top in ("d", "src") for path in (kept / top).rglob("*.*")}
    rng, tally = np.random.default_rng(cases), Counter[int]()
    for case in range(cases):
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        shutil.copytree(kept, tmp_path / "work")
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setattr("sys.stdin", io.StringIO("src/a/0.png\n"))
        words = mutated(rng)
        try:
            with asked_to_stop_after(SECONDS):
                code, _, err = call(capsys, *words)
        except BaseException as error:
            raise AssertionError(f"case {case}: {words}") from error
        assert code in (0, 1, 2, INTERRUPTED), f"case {case}: {words}: exit code {code}"
        assert "internal error" not in err, f"case {case}: {words}: {err}"
        assert code == 0 or err.strip(), f"case {case}: {words}: refused without a word"
        for path, content in inputs.items():
            assert (tmp_path / "work" / path).read_bytes() == content, f"case {case}: {words} changed {path}"
        tally[code] += 1
    assert tally[2] > cases // 10, tally
    assert tally[0] > cases // 50, tally
