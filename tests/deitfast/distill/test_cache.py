"""The cache's files: what goes in comes out, whichever process wrote it, and nothing damaged or foreign is read."""

import dataclasses
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_files import PARTS, TARGETS, is_present
from deitfast.distill.cache_manifest import (
    ABSENT,
    FORMAT,
    MANIFEST,
    Manifest,
    TargetSpec,
    read_manifest,
    require_same,
    write_manifest,
)
from pipelines.errors import DeitfastError, UserError

HARD, SOFT = TargetSpec("hard"), TargetSpec("soft", 3, "float16", 3.0)
VIEWS, SAMPLES, REPEATS = 6, 20, 3


def manifest(spec: TargetSpec = HARD, **changes) -> Manifest:
    made = Manifest(
        FORMAT,
        spec,
        classes=1000,
        views=VIEWS,
        samples=SAMPLES,
        targets_per_view=18,
        repeats=REPEATS,
        identity={"data": "abc"},
        made_with={"torch": "2"},
    )
    return dataclasses.replace(made, **changes)


def drawn_targets(spec: TargetSpec, seed: int = 0) -> np.ndarray:
    """A whole cache's targets [VIEWS, SAMPLES]; the last two images of each view are left out, as by a pass's end."""
    rng = np.random.default_rng(seed)
    table = np.zeros((VIEWS, SAMPLES), spec.record)
    labels = rng.integers(0, 1000, (VIEWS, SAMPLES, max(spec.k, 1)))
    if spec.kind == "hard":
        table[:] = labels[..., 0]
        table[:, 18:] = ABSENT
        return table
    table["label"], table["logit"] = labels, rng.normal(size=labels.shape)
    table["lse"], table["lse_tau"] = rng.normal(size=(2, VIEWS, SAMPLES))
    table[:, 18:] = 0
    table["label"][:, 18:] = ABSENT
    return table


def fill(cache: TeacherCache, table: np.ndarray, order: np.ndarray, flushes: int = 4) -> None:
    """Add the cells that are answered, in this order, in several parts."""
    cells = np.argwhere(is_present(table))[order]
    for some in np.array_split(cells, flushes):
        for number in np.unique(some[:, 0] // REPEATS):  # a batch's views are of one pass
            views, samples = some[some[:, 0] // REPEATS == number].T
            cache.write(views, samples, table[views, samples])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("spec", [HARD, SOFT], ids=["hard", "soft"])
def test_what_was_added_is_read_before_and_after_completion(tmp_path: Path, spec: TargetSpec) -> None:
    table = drawn_targets(spec)
    cache = TeacherCache.create(tmp_path / "cache", manifest(spec))
    order = np.arange(6 * 18)
    fill(cache, table, order[:50])
    reopened = TeacherCache.open(tmp_path / "cache")
    there = np.zeros((VIEWS, SAMPLES), bool)
    there[tuple(np.argwhere(is_present(table))[:50].T)] = True
    for first in (0, 3):
        rows = reopened.read_pass(first)
        own = slice(first, first + REPEATS)
        assert (is_present(rows) == there[own]).all()
        assert (rows[there[own]] == table[own][there[own]]).all()
    assert (reopened.count(), reopened.finish(), reopened.complete) == (50, False, False)
    fill(reopened, table, order[50:])
    assert reopened.finish()
    done = TeacherCache.open(tmp_path / "cache")
    assert done.complete
    assert done.count() == 6 * 18
    assert not (tmp_path / "cache" / PARTS).exists()
    for first in (0, 3):
        rows = done.read_pass(first)
        assert rows.tobytes() == table[first : first + REPEATS].tobytes()
    loaded = np.load(tmp_path / "cache" / TARGETS)  # numpy reads it, and would write the same bytes
    np.save(tmp_path / "numpy.npy", table)
    assert (tmp_path / "numpy.npy").read_bytes() == (tmp_path / "cache" / TARGETS).read_bytes()
    assert loaded.tobytes() == table.tobytes()
    assert list(done.check()) == [(3, ""), (6, "")]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flushes=st.integers(1, 12))
def test_the_finished_cache_does_not_depend_on_who_wrote_when(tmp_path_factory, seed: int, flushes: int) -> None:
    folder, table = tmp_path_factory.mktemp("caches"), drawn_targets(HARD)
    first = TeacherCache.create(folder / "a", manifest())
    fill(first, table, np.arange(6 * 18))
    assert first.finish()
    one = TeacherCache.create(folder / "b", manifest())
    other = TeacherCache.open(folder / "b")
    order = np.random.default_rng(seed).permutation(6 * 18)
    fill(one, table, order[:40], flushes)
    fill(other, table, order[20:], flushes)  # both have answered some
    assert other.finish()
    assert contents(folder / "a") == contents(folder / "b")


def test_who_was_slower_goes_on_with_what_the_other_has_finished(tmp_path: Path) -> None:
    """Two trainings that fill one cache: the second one still has targets to write when the first completes it."""
    folder, table = tmp_path / "cache", drawn_targets(HARD)
    fast, slow = TeacherCache.create(folder, manifest()), TeacherCache.create(folder, manifest())
    slow.read_pass(0)
    fill(fast, table, np.arange(6 * 18))
    assert fast.finish()
    fill(slow, table, np.arange(40))
    assert slow.read_pass(0).tobytes() == table[:REPEATS].tobytes()
    late = [TeacherCache(folder, manifest()) for _ in range(3)]  # as opened before the end
    assert late[0].read_pass(3).tobytes() == table[3:].tobytes()
    assert late[1].count() == 6 * 18
    assert late[2].finish()
    assert all(each.complete for each in late)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, TARGETS]


TURNS, PATIENCE = 25, 20.0


def race(folder: Path, barrier, seed: int) -> None:
    for turn in range(TURNS):
        own = folder.with_name(f"{folder.name}-{turn}")
        barrier.wait(PATIENCE)
        cache = TeacherCache.create(own, manifest())
        fill(cache, drawn_targets(HARD), np.random.default_rng(seed + turn).permutation(6 * 18))
        assert cache.count() == 6 * 18
        assert cache.finish()
        assert cache.read_pass(3).tobytes() == drawn_targets(HARD)[3:].tobytes()


def test_any_number_of_processes_fill_and_finish_one_cache_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    racers = [context.Process(target=race, args=(tmp_path / "cache", barrier, seed)) for seed in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(3 * PATIENCE)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    complete(tmp_path / "alone")
    for turn in range(TURNS):
        assert contents(tmp_path / f"cache-{turn}") == contents(tmp_path / "alone")


def test_sizes_are_two_bytes_a_view_and_what_the_records_take(tmp_path: Path) -> None:
    imagenet = manifest(views=300, samples=1_281_167)
    assert imagenet.bytes == 768_700_200
    assert SOFT.record.itemsize == 3 * 4 + 8


def complete(folder: Path, **changes) -> TeacherCache:
    cache = TeacherCache.create(folder, manifest(**changes))
    fill(cache, drawn_targets(cache.manifest.targets), np.arange(6 * 18))
    assert cache.finish()
    return cache


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_the_targets_is_found_and_its_view_named(tmp_path: Path) -> None:
    complete(tmp_path / "cache")
    header = 128
    flip(tmp_path / "cache" / TARGETS, header + 2 * SAMPLES * 4 + 7)
    cache = TeacherCache.open(tmp_path / "cache")
    cache.read_pass(0)
    with pytest.raises(DeitfastError, match=r"targets\.npy: damaged") as caught:
        cache.read_pass(3)
    assert "of view 4" in str(caught.value)
    assert [done for done, problem in cache.check() if problem] == [6]


def test_no_flipped_bit_of_the_header_is_anything_but_damage(tmp_path: Path) -> None:
    complete(tmp_path / "cache")
    path = tmp_path / "cache" / TARGETS
    whole = path.read_bytes()
    for place in range(128):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(DeitfastError, match=r"targets\.npy: damaged"):
                TeacherCache.open(tmp_path / "cache")


def test_a_table_that_is_cut_replaced_or_removed_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    """It is read and not mapped: no signal ends the process."""
    cache = complete(tmp_path / "cache")
    path = tmp_path / "cache" / TARGETS
    cache.read_pass(0)
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(DeitfastError, match=r"targets\.npy: damaged"):
        cache.read_pass(3)
    path.unlink()
    with pytest.raises(DeitfastError, match=r"targets\.npy: damaged"):
        cache.read_pass(3)


def test_too_little_memory_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 12.0 GiB")

    for name, patched in {"table": "fromfile", "parts": "zeros"}.items():
        cache = complete(tmp_path / name) if name == "table" else TeacherCache.create(tmp_path / name, manifest())
        monkeypatch.setattr(f"deitfast.distill.cache_files.np.{patched}", exhausted)
        with pytest.raises(DeitfastError, match=f"not enough memory to read {tmp_path / name}"):
            cache.read_pass(0)
        monkeypatch.undo()


def test_parts_left_by_a_kill_after_the_manifest_go(tmp_path: Path) -> None:
    cache = complete(tmp_path / "cache")
    (tmp_path / "cache" / PARTS).mkdir()
    (tmp_path / "cache" / PARTS / "00000-left.part").write_bytes(b"left")
    cache.remove_leftovers()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [MANIFEST, TARGETS]


def test_a_cache_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    complete(tmp_path / "cache")
    path = tmp_path / "cache" / MANIFEST
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(UserError, match="another version of deitfast") as caught:
        TeacherCache.open(tmp_path / "cache")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", [3, 60, 130, -2])
def test_any_flipped_byte_of_a_part_is_found_and_the_part_named(tmp_path: Path, place: int) -> None:
    cache = TeacherCache.create(tmp_path / "cache", manifest())
    fill(cache, drawn_targets(HARD), np.arange(50), flushes=1)
    part = next((tmp_path / "cache" / PARTS).iterdir())
    flip(part, place)
    with pytest.raises(DeitfastError, match=part.name):
        TeacherCache.open(tmp_path / "cache").read_pass(0)


@pytest.mark.parametrize("left", [0, 3, 100])
def test_a_part_or_table_cut_short_is_found(tmp_path: Path, left: int) -> None:
    cache = TeacherCache.create(tmp_path / "part", manifest())
    fill(cache, drawn_targets(HARD), np.arange(50), flushes=1)
    part = next((tmp_path / "part" / PARTS).iterdir())
    part.write_bytes(part.read_bytes()[:left])
    with pytest.raises(DeitfastError, match=part.name):
        cache.read_pass(0)
    complete(tmp_path / "table")
    path = tmp_path / "table" / TARGETS
    whole = path.read_bytes()
    for kept in (left, 120 + left):
        path.write_bytes(whole[:kept])
        with pytest.raises(DeitfastError, match=r"targets\.npy: damaged"):
            TeacherCache.open(tmp_path / "table")


def test_another_caches_targets_are_not_taken(tmp_path: Path) -> None:
    complete(tmp_path / "one")
    cache = TeacherCache.create(tmp_path / "other", manifest())
    fill(cache, drawn_targets(HARD, seed=1), np.arange(6 * 18))
    assert cache.finish()
    (tmp_path / "one" / TARGETS).write_bytes((tmp_path / "other" / TARGETS).read_bytes())
    with pytest.raises(DeitfastError, match="CRC32"):
        TeacherCache.open(tmp_path / "one").read_pass(0)
    complete(tmp_path / "soft", spec=SOFT)
    (tmp_path / "one" / TARGETS).write_bytes((tmp_path / "soft" / TARGETS).read_bytes())
    with pytest.raises(DeitfastError, match="another cache's"):
        TeacherCache.open(tmp_path / "one")


def test_a_part_of_another_shape_is_refused(tmp_path: Path) -> None:
    wide = TeacherCache.create(tmp_path / "wide", manifest(samples=50, targets_per_view=48))
    wide.write(np.array([0]), np.array([40]), np.array([1]))
    TeacherCache.create(tmp_path / "cache", manifest())
    part = next((tmp_path / "wide" / PARTS).iterdir())
    part.rename(tmp_path / "cache" / PARTS / part.name)
    with pytest.raises(DeitfastError, match="of 20 images"):
        TeacherCache.open(tmp_path / "cache").read_pass(0)


@pytest.mark.parametrize("edit", [('"views": 6', '"views": 9'), ('"abc"', '"abd"'), ("{", ""), ('"hard"', '"soft"')])
def test_a_manifest_that_was_changed_is_refused(tmp_path: Path, edit: tuple[str, str]) -> None:
    complete(tmp_path / "cache")
    path = tmp_path / "cache" / MANIFEST
    path.write_text(path.read_text().replace(*edit, 1))
    with pytest.raises(DeitfastError, match=r"manifest\.json: damaged"):
        TeacherCache.open(tmp_path / "cache")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="is not empty and not a teacher cache"):
        TeacherCache.create(tmp_path, manifest())
    with pytest.raises(UserError, match="there is no teacher cache"):
        TeacherCache.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_cache_whose_creation_was_killed_is_created_anew(tmp_path: Path) -> None:
    (tmp_path / "cache" / PARTS).mkdir(parents=True)
    (tmp_path / "cache" / f"{MANIFEST}.partial").write_bytes(b"{")
    complete(tmp_path / "cache")
    assert read_manifest(tmp_path / "cache").crc32


def test_a_kill_between_table_and_manifest_costs_nothing(tmp_path: Path, monkeypatch) -> None:
    cache = TeacherCache.create(tmp_path / "cache", manifest())
    fill(cache, drawn_targets(HARD), np.arange(6 * 18))
    monkeypatch.setattr("deitfast.distill.cache.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.finish()
    monkeypatch.undo()
    again = TeacherCache.open(tmp_path / "cache")
    assert not again.complete
    assert again.finish()
    complete(tmp_path / "other")
    assert contents(tmp_path / "cache") == contents(tmp_path / "other")


def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path: Path, monkeypatch) -> None:
    cache = TeacherCache.create(tmp_path / "cache", manifest())
    fill(cache, drawn_targets(HARD), np.arange(50))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.files.os.fsync", full)
    with pytest.raises(DeitfastError, match="cannot write the teacher cache") as caught:
        fill(cache, drawn_targets(HARD), np.arange(50, 108))
    assert "No space left" in str(caught.value)
    monkeypatch.undo()
    assert TeacherCache.open(tmp_path / "cache").count() == 50


def test_views_that_are_no_whole_passes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a cache of 7 views"):
        TeacherCache.create(tmp_path / "cache", manifest(views=7))
    with pytest.raises(UserError, match="a cache of 65538 views"):
        TeacherCache.create(tmp_path / "cache", manifest(views=65538))


def test_every_differing_field_is_named_with_both_values(tmp_path: Path) -> None:
    kept = {"data": "abc", "augment.erasing": 0.25, "augment.scale": [0.08, 1.0], "teacher.digest": "ff"}
    require_same(tmp_path, kept, {**kept, "augment.scale": (0.08, 1.0), "teacher.digest": None})
    with pytest.raises(UserError) as caught:
        require_same(tmp_path, kept, {**kept, "augment.erasing": 0.1, "data": "abd"})
    assert str(caught.value).splitlines()[0].endswith("another data, augment.erasing")
    assert caught.value.expected == "data 'abd', augment.erasing 0.1"
    assert caught.value.found.startswith("data 'abc', augment.erasing 0.25")
    with pytest.raises(UserError, match=r"augment\.new"):
        require_same(tmp_path, kept, {**kept, "augment.new": 1})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"targets_per_view": 17}, r"at least 18 targets a view, as view \d has them"),
        ({"views": 3}, "a pass that begins with view 3, of which there are parts"),
        ({"samples": 18, "targets_per_view": 9}, "targets a view"),
        ({"repeats": 2, "views": 4}, "images"),
        ({"classes": 2}, "labels below 2"),
        ({"samples": 10, "targets_per_view": 9}, "those of other views or images"),
    ],
    ids=str,
)
def test_an_edited_manifest_of_a_cache_that_is_not_complete_is_told_by_its_parts(
    tmp_path: Path, changes: dict, says: str
) -> None:
    """With a checksum that fits: what is written in one place contradicts what is in the other."""
    cache = TeacherCache.create(tmp_path / "cache", manifest())
    fill(cache, drawn_targets(HARD), np.arange(6 * 18 - 3))
    assert not [problem for _, problem in cache.check() if problem]
    write_manifest(cache.folder, manifest(**changes))
    problems = [problem for _, problem in TeacherCache.open(cache.folder).check() if problem]
    assert problems
    assert re.search(says, "\n".join(problems))
