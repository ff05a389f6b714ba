"""Damaged and edited teacher caches: each opens with the very same targets, or is refused by a message with the file.

pytest tests/campaigns/test_cache_mutations.py -m slow --cases 20000
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deitfast.distill.cache import TeacherCache
from deitfast.distill.cache_files import PARTS
from deitfast.distill.cache_manifest import ABSENT, FORMAT, MANIFEST, Manifest, TargetSpec, _digest
from pipelines.errors import DeitfastError
from tests.campaigns.damage import BYTES, edited

pytestmark = pytest.mark.slow
VIEWS, SAMPLES, REPEATS = 4, 12, 2
SPECS = {"hard": TargetSpec("hard"), "soft": TargetSpec("soft", 3, "float16", 3.0)}


def build(folder: Path, spec: TargetSpec, *, complete: bool) -> None:
    """Make a small cache of drawn targets; an incomplete one has three parts."""
    manifest = Manifest(
        FORMAT, spec, 100, VIEWS, SAMPLES, SAMPLES, REPEATS,
        identity={"data": "abc", "augment.scale": [0.08, 1.0], "teacher.digest": None}, made_with={"torch": "2"},
    )  # fmt: skip
    cache, rng = TeacherCache.create(folder, manifest), np.random.default_rng(0)
    targets = np.zeros((VIEWS, SAMPLES), spec.record)
    if spec.kind == "hard":
        targets[:] = rng.integers(0, 100, targets.shape)
    else:
        targets["label"] = rng.integers(0, 100, (*targets.shape, 3))
        targets["logit"] = rng.normal(size=(*targets.shape, 3))
        targets["lse"], targets["lse_tau"] = rng.normal(size=(2, *targets.shape))
    for view in range(VIEWS if complete else VIEWS - 1):
        cache.write(np.full(SAMPLES, view), np.arange(SAMPLES), targets[view])
    assert cache.finish() == complete


def read(folder: Path) -> list[bytes]:
    """Return all that a cache says: what `info`, `verify` and a training read."""
    cache = TeacherCache.open(folder)
    rows = [cache.read_pass(first) for first in cache.passes]
    count = cache.count()
    assert count <= VIEWS * SAMPLES
    return [row.tobytes() for row in rows]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "filling"])
@pytest.mark.parametrize("kind", list(SPECS))
def test_damage_is_named_or_changes_nothing(tmp_path: Path, cases: int, kind: str, complete: bool) -> None:
    whole, other, trial = tmp_path / "whole", tmp_path / "other", tmp_path / "trial"
    build(whole, SPECS[kind], complete=complete)
    build(other, SPECS["soft" if kind == "hard" else "hard"], complete=complete)
    expected, outcomes = read(whole), Counter[str]()
    for seed in range(cases):
        draw = random.Random(f"{kind}{complete}{seed}")
        shutil.copytree(whole, trial)
        path = draw.choice(sorted(file for file in trial.rglob("*") if file.is_file()))
        match draw.randrange(12):
            case 0:
                path.unlink()
                what = "removed"
            case 1:
                path.unlink()
                path.mkdir()
                what = "a folder"
            case 2:
                path.write_bytes(next(file for file in other.rglob(f"*{path.suffix}") if file.is_file()).read_bytes())
                what = "another cache's"
            case 3 if not complete:
                shutil.rmtree(trial / PARTS)
                what = "no parts"
            case _:
                change = draw.choice(BYTES)
                path.write_bytes(change(draw, bytearray(path.read_bytes())))
                what = change.__name__
        outcomes[judge(trial, expected, f"seed {seed}: {path.name} {what}", removed=what == "removed")] += 1
        shutil.rmtree(trial)
    assert outcomes["refused"] > cases // 2


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "filling"])
def test_an_edited_manifest_is_named_or_changes_nothing(
    tmp_path: Path, cases: int, complete: bool, signed: bool
) -> None:
    """Values of any type, removed, added; with the digest of the edited text (signed) or the old one."""
    whole, trial = tmp_path / "whole", tmp_path / "trial"
    build(whole, SPECS["soft"], complete=complete)
    expected, tree = read(whole), json.loads((whole / MANIFEST).read_text())
    for seed in range(cases):
        draw = random.Random(f"{complete}{signed}{seed}")
        shutil.copytree(whole, trial)
        new = edited(draw, {name: value for name, value in tree.items() if name != "digest"})
        if isinstance(new, dict):
            new["digest"] = _digest(new) if signed else tree["digest"]
        (trial / MANIFEST).write_text(json.dumps(new))
        judge(trial, expected, f"seed {seed}: {json.dumps(new)}", forged=signed and not complete, regrouped=signed)
        shutil.rmtree(trial)


def judge(
    trial: Path,
    expected: list[bytes],
    what: str,
    *,
    removed: bool = False,
    forged: bool = False,
    regrouped: bool = False,
) -> str:
    """Read a cache; return "refused" or "same".

    Args:
        trial: the cache.
        expected: what it says when undamaged.
        what: what was done to it.
        removed: a file is gone: targets may be missing (a part that is not there was never written).
        regrouped: a valid manifest may state passes of other lengths: the same targets in other groups.
        forged: its shape is stated by a valid manifest alone: all targets may be others, but reading must not crash.
    """
    refusal, found = None, list[bytes]()
    try:
        found = read(trial)
    except DeitfastError as error:
        refusal = error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if regrouped:
        found, expected = [b"".join(found)], [b"".join(expected)]
    if refusal:
        assert str(trial) in str(refusal), f"{what}: the message names no file: {refusal}"
        assert refusal.remedy or refusal.expected, f"{what}: the message says no way out: {refusal}"
        return "refused"
    if not forged and not removed:
        assert found == expected, what
    for row, undamaged in zip(found, expected, strict=not forged):
        assert forged or row == undamaged or (np.frombuffer(row, "<u2") == ABSENT).any(), what
    return "same"
