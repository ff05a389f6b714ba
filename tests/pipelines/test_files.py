"""Atomic writes and locks, with several writers at once."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.errors import DeitfastError, UserError
from pipelines.files import atomic_write, explain_os_error, file_lock, os_remedy, write_all


def test_a_remedy_is_of_what_the_system_refused(tmp_path: Path) -> None:
    numbers = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT, errno.EACCES)
    remedies = []
    for number in numbers:
        with pytest.raises(DeitfastError) as caught, explain_os_error(tmp_path, "go on"):
            raise OSError(number, os.strerror(number))
        remedies.append(caught.value.remedy)
    limit = "let a process open more files (`ulimit -n`)"
    moved = "the file or its folder was moved or removed: put it back"
    assert remedies == ["go on", limit, limit, "free some memory", moved, "go on"]
    assert os_remedy(OSError(errno.EDQUOT, "quota")) == "free some space"


def test_two_writers_of_one_file_leave_one_whole_file_at_every_moment(tmp_path: Path) -> None:
    file, failures, mixed = tmp_path / "x", [], []

    def write(letter: int) -> None:
        try:
            for _ in range(40):
                with atomic_write(file) as out:
                    for _ in range(10):
                        out.write(bytes([letter]) * 2000)
        except OSError as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (65, 66, 67)]
    [writer.start() for writer in writers]
    while any(writer.is_alive() for writer in writers):
        if file.exists() and not ((content := file.read_bytes()) and len(set(content)) == 1 and len(content) == 20_000):
            mixed.append(content)
    assert not failures
    assert not mixed
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_writers_file_stays(tmp_path: Path) -> None:
    program = "import os, sys; from pathlib import Path; from pipelines.files import atomic_write\n"
    program += "with atomic_write(Path(sys.argv[1])) as file: file.write(b'cut'); file.flush(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, tmp_path / "x[1]"], check=False, cwd=Path(__file__).parents[2])
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".partial"
    with atomic_write(tmp_path / "x[1]") as slow:
        assert not left.exists()
        slow.write(b"slow")
        with atomic_write(tmp_path / "x[1]") as quick:
            quick.write(b"quick")
        assert (tmp_path / "x[1]").read_bytes() == b"quick"
    assert (tmp_path / "x[1]").read_bytes() == b"slow"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves the old file or the new one, whole: a rename may reach the disk before what is renamed."""
    order, fsync, replace = [], os.fsync, Path.replace

    def synced(fd: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"{os.fstat(fd).st_size} bytes")
        fsync(fd)

    def renamed(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    assert order == ["3 bytes", "rename", "folder"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(tmp_path / "x") as file:
        file.write("new")  # pyright: ignore[reportArgumentType]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_a_lock_names_its_holder_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    here = pytest.raises(UserError, match="another run is writing here")
    with file_lock(folder, "run"), here as raised, file_lock(folder, "run"):
        pass
    assert f"process {os.getpid()} on " in raised.value.found
    assert not list(folder.iterdir())
    with file_lock(folder, "run"):
        pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    inside, most = [], []

    def work(number: int) -> None:
        for _ in range(5):
            with file_lock(tmp_path, "test", wait=True):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert most == [1] * 15


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(UserError, match=f"{folder}: cannot be the output folder: "), file_lock(folder, "run"):
            pass


def test_disk_errors_name_the_file_and_all_bytes_are_written(tmp_path: Path) -> None:
    with pytest.raises(DeitfastError, match=r"cannot write .*here\n  found: .*No such file"), explain_os_error("here"):
        (tmp_path / "missing" / "x").write_bytes(b"")
    fd = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
    write_all(fd, b"12345")
    write_all(fd, b"ab", 1)
    write_all(fd, b"6")
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == b"1ab456"
