"""The hardware decoder's share: how it is chosen, and how it is remembered."""

import threading
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


RATES = {0.0: 500, 0.3: 800, 0.5: 1000, 0.65: 990, 0.8: 975, 0.9: 960, 1.0: 700}
ENDLESS = 1e9


def test_without_a_share_that_is_fast_enough_the_highest_near_the_best_rate_is_taken() -> None:
    assert set(RATES) == set(SHARES)
    assert decoder_share("a GPU", RATES.__getitem__, ENDLESS) == 0.8


@pytest.mark.parametrize(("needed", "share", "measured"), [(500, 1.0, 1), (540, 0.9, 7), (700, 0.9, 7), (745, 0.8, 7)])
def test_the_highest_share_that_is_fast_enough_is_taken(needed: float, share: float, measured: int) -> None:
    """1.3 times what the step consumes is enough; what is decoded on the multiprocessors slows the step down."""
    calls = []
    assert decoder_share("a GPU", lambda share: calls.append(share) or RATES[share], needed) == share
    assert len(calls) == measured


def test_a_gpu_without_the_decoder_is_measured_twice() -> None:
    calls = []
    assert decoder_share("a T4", lambda share: calls.append(share) or 1000 + 10 * share, ENDLESS) == 1.0
    assert sorted(calls) == [0.0, 1.0]


def test_one_rank_of_a_machine_measures_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("LOCAL_RANK", "3")
    shares = []
    other = threading.Thread(target=lambda: shares.append(decoder_share("a GPU", never, ENDLESS)))
    other.start()
    calibration._remember("a GPU", 0.3)  # as rank 0 does
    other.join(20)
    assert shares == [0.3]
    monkeypatch.setattr(calibration, "PATIENCE_SECONDS", 0.05)
    assert decoder_share("a GPU that rank 0 never measured", never, ENDLESS) == calibration.DEFAULT


def test_a_share_is_measured_once_in_a_process_and_once_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder_share("a GPU", lambda share: share, ENDLESS) == 1.0
    assert decoder_share("another", lambda share: 2 - share, ENDLESS) == 0.0
    assert decoder_share("a GPU", never, ENDLESS) == 1.0
    monkeypatch.setattr(calibration, "_found", {})
    assert decoder_share("a GPU", never, ENDLESS) == 1.0
    assert decoder_share("another", never, ENDLESS) == 0.0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a GPU": "much"}', '{"a GPU": 7}', "\x00"])
def test_a_damaged_file_is_measured_over(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert decoder_share("a GPU", lambda share: 2 - share, ENDLESS) == 0.0
    monkeypatch.setattr(calibration, "_found", {})
    assert decoder_share("a GPU", never, ENDLESS) == 0.0


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert decoder_share("a GPU", lambda share: share, ENDLESS) == 1.0
    assert decoder_share("a GPU", never, ENDLESS) == 1.0
