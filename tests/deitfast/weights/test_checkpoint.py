"""Checkpoints: whole or not at all."""

import io
import resource
from typing import Any

import pytest
import torch
from torch import nn

from deitfast.run_folder import RunFolder
from deitfast.weights import checkpoint
from pipelines.errors import DeitfastError, UserError

CPU = torch.device("cpu")


def test_what_is_saved_is_loaded(tmp_path) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"epoch": 3, "model": {"weight": torch.arange(4.0)}})
    state = checkpoint.load(file, CPU)
    assert state["epoch"] == 3
    assert torch.equal(state["model"]["weight"], torch.arange(4.0))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"epoch": 1, "model": {}})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.files.os.fsync", full)
    with pytest.raises(DeitfastError, match="No space left"):
        checkpoint.save(file, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(file, CPU)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_disk_that_is_full_when_a_run_is_to_stop_is_told(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(DeitfastError, match="File too large"):
            checkpoint.save(tmp_path / "checkpoint.pt", {"epoch": 1, "model": {"weight": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("met", "told", "says"),
    [
        (OSError(28, "No space left on device"), DeitfastError, "No space left on device"),
        (KeyboardInterrupt("a second Ctrl-C"), KeyboardInterrupt, "a second Ctrl-C"),
    ],
)
def test_what_ends_writing_in_its_middle_is_told_and_leaves_the_old_checkpoint(
    tmp_path, monkeypatch, met: BaseException, told: type[BaseException], says: str
) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"epoch": 1, "model": {}})

    class Ending(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell():
                raise met
            return super().write(content)

    monkeypatch.setattr("pipelines.files.Path.open", lambda path, mode: Ending(path, "w"))
    with pytest.raises(told, match=says):
        checkpoint.save(file, {"epoch": 2, "model": {"weight": torch.zeros(1000)}})
    monkeypatch.undo()
    assert checkpoint.load(file, CPU)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_missing_damaged_and_foreign_files_are_told_apart(tmp_path) -> None:
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load(file, CPU)
    checkpoint.save(file, {"epoch": 1, "model": {"weight": torch.zeros(1000)}})
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DeitfastError, match="is damaged"):
        checkpoint.load(file, CPU)
    file.write_bytes(b"not a checkpoint at all")
    with pytest.raises(DeitfastError, match="is damaged"):
        checkpoint.load(file, CPU)
    file.write_bytes(b"")  # as a power cut leaves it on some file systems
    with pytest.raises(DeitfastError, match="is damaged"):
        checkpoint.load(file, CPU)
    torch.save({"epoch": 1}, file)
    with pytest.raises(UserError, match="another format"):
        checkpoint.load(file, CPU)


def test_a_flipped_bit_is_found(tmp_path) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"epoch": 1, "model": {"weight": torch.zeros(1000)}})
    whole = file.read_bytes()
    start = whole.index(bytes(4000))
    for position in (start, start + 3999):
        content = bytearray(whole)
        content[position] ^= 1
        file.write_bytes(content)
        with pytest.raises(DeitfastError, match=r"is damaged\n  found: .* CRC32"):
            checkpoint.load(file, CPU)


@pytest.mark.parametrize("method", [1, 8, 9, 12, 14, 93, 99])
def test_a_header_that_says_another_compression_is_damage(tmp_path, method: int) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1, "model": {"w": torch.arange(3000.0)}})
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):  # of every member, in its header and the directory
        at = content.find(signature)
        while at >= 0:
            content[at + place] = method
            at = content.find(signature, at + 4)
    path.write_bytes(content)
    with pytest.raises(DeitfastError, match="damaged"):
        checkpoint.load(path, "cpu")


def test_nobody_is_told_to_run_what_is_in_a_file(tmp_path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"epoch": CPU, "model": nn.Linear(2, 2)}, file)
    with pytest.raises(DeitfastError, match=r"found: Unsupported global: GLOBAL .*Linear") as raised:
        checkpoint.load(file, CPU)
    assert not any(word in str(raised.value) for word in ("weights_only", "safe_globals"))


def test_averaged_weights_are_given_where_there_are_any(tmp_path) -> None:
    state = {"model": nn.Linear(3, 2).state_dict(), "ema": None}
    assert checkpoint.model_weights(state, tmp_path) is state["model"]
    with pytest.raises(UserError, match="no averaged weights"):
        checkpoint.model_weights(state, tmp_path, ema=True)


@pytest.mark.parametrize(
    "change",
    [{"epoch": "1"}, {"model": [1]}, {"model": {"weight": "x"}}, {"ema": {"model": 3}}, {"optimizer": []}],
)
def test_a_checkpoint_of_other_types_is_damaged(tmp_path, change: dict) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"epoch": 1, "model": {"weight": torch.zeros(3)}, "ema": None, **change})
    with pytest.raises(DeitfastError, match="is damaged or was edited"):
        checkpoint.load(file, CPU)


def test_the_best_or_the_last_checkpoint_is_chosen(tmp_path) -> None:
    file, run = tmp_path / "checkpoint_best.pt", RunFolder(tmp_path)
    assert checkpoint.best_before(file, 3) == -1
    assert checkpoint.choose(run) == run.checkpoint
    with pytest.raises(UserError, match="no best checkpoint"):
        checkpoint.choose(run, which="best")
    checkpoint.save_best(file, 2, 0.6, {"weight": torch.ones(3)}, averaged=True)
    state = checkpoint.load(file, CPU)
    assert (state["epoch"], state["averaged"], state["top1"]) == (2, True, 0.6)
    assert checkpoint.best_before(file, 3) == 0.6
    assert checkpoint.best_before(file, 2) == -1  # a run that was resumed before it
    assert checkpoint.choose(run) == checkpoint.choose(run, which="best") == file
    assert checkpoint.choose(run, which="last") == checkpoint.choose(run, ema=True) == run.checkpoint
    with pytest.raises(UserError, match="exclude each other"):
        checkpoint.choose(run, ema=True, which="best")
