"""The hardware decoder's share: how it is chosen, and how it is remembered."""

from pathlib import Path

import pytest

from pipelines.loaders.dali import calibration
from pipelines.loaders.dali.calibration import SHARES, cache_file, decoder_share


@pytest.fixture(autouse=True)
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with an empty cache folder, and as a process that has measured nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_found", {})


def never(share: float) -> float:
    raise AssertionError("measured again")


def test_the_highest_share_near_the_best_rate_is_taken() -> None:
    rates = {0.0: 500, 0.3: 800, 0.5: 1000, 0.65: 990, 0.8: 975, 0.9: 960, 1.0: 700}
    assert tuple(rates) == SHARES
    assert decoder_share("a GPU", rates.__getitem__) == 0.8


def test_a_share_is_measured_once_in_a_process_and_once_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder_share("a GPU", lambda share: share) == 1.0
    assert decoder_share("another", lambda share: 2 - share) == 0.0
    assert decoder_share("a GPU", never) == 1.0
    monkeypatch.setattr(calibration, "_found", {})
    assert decoder_share("a GPU", never) == 1.0
    assert decoder_share("another", never) == 0.0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a GPU": "much"}', '{"a GPU": 7}', "\x00"])
def test_a_damaged_file_is_measured_over(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert decoder_share("a GPU", lambda share: 2 - share) == 0.0
    monkeypatch.setattr(calibration, "_found", {})
    assert decoder_share("a GPU", never) == 0.0


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert decoder_share("a GPU", lambda share: share) == 1.0
    assert decoder_share("a GPU", never) == 1.0
