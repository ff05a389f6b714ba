"""Progress: what a plain line says, and time left that a resumed job does not flatter."""

import io
import logging

import pytest
from rich.console import Console

from deitfast import progress as module
from deitfast.progress import Display, duration, volume


def test_plain_lines_say_rate_text_and_time_left(monkeypatch, caplog) -> None:
    clock = iter([0.0, 0.0, 30.0, 30.0, 30.0, 60.0, 60.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module.log, "propagate", True)
    monkeypatch.setattr(module.log, "handlers", [])  # a command that ran in this process may have left its own
    with caplog.at_level(logging.INFO), Display(Console(file=io.StringIO())).bar("epoch 2/3", 390) as bar:
        bar.start(90)
        bar.reach(100, "loss 2.0")
    assert caplog.messages == ["epoch 2/3: 100 of 390, loss 2.0, 14 min 30 s left"]


def test_a_terminal_of_80_columns_shows_all_of_it() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    text = "loss 2.284, 20,234 images/s, waiting 12%, run ends in 12 h 34 min"
    with Display(console).bar("epoch 100/300", 1251) as bar:
        bar.reach(1100, text)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert text in shown
    assert "epoch 100/300" in shown
    assert "1100/1251" in shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(8.4, "8 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("size", "said"), [(512, "0.512 kB"), (1_000_000, "1 MB"), (1_500_000, "1.5 MB"), (2_560_000_000, "2.56 GB")]
)
def test_volumes_are_counted_in_thousands(size: int, said: str) -> None:
    assert volume(size) == said
