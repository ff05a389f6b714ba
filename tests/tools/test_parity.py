"""tools/parity: what it prints and how it exits, with nothing wrong and with errors planted."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pipelines.augment.torch_ops import affine, ops
from pipelines.errors import UserError
from pipelines.rng.policies import AUTOAUGMENT
from tests.helpers.stored_images import jpeg, photo
from tools.parity import __main__ as parity
from tools.parity import learning, loading, pixels
from tools.parity.check import Check, absent, compare
from tools.parity.pictures import pictures


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small network, and no FFCV to compile."""
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(learning, "NETWORKS", learning.NETWORKS[-1:])
    reasons = {"resident": "", "dali": "", "cpu": "", "ffcv": "left out", "reference": ""}
    monkeypatch.setattr(loading, "available", lambda: reasons)


def run(*words: str) -> Result:
    return CliRunner().invoke(parity.app, ["--size", "32", *words])


def outcomes(text: str) -> dict[str, str]:
    """Each line's name and its last word."""
    lines = [line.rstrip() for line in text.splitlines()]
    return {line.split("  ")[0]: line.split()[-1] for line in lines if line.endswith(("  pass", "  FAIL"))}


def test_everything_is_compared_and_passes(quick: None) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    found = outcomes(result.output)
    assert set(found.values()) == {"pass"}
    assert set(ops.TABLE) | {
        "sub-policies",
        "normalize",
        "erase",
        "cpu, evaluation",
        "dali, evaluation",
        "hard distillation",
    } <= set(found)
    assert "ffcv" in result.output
    assert f"{len(found)} pass, 0 fail, 1 not compared" in result.output
    assert "MixUp, 0" not in result.output
    assert "CutMix, 0" not in result.output


def test_it_takes_images_of_a_folder(quick: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        (tmp_path / f"{number}.JPEG").write_bytes(jpeg(photo(rng, 60, 80)))
    result = run(str(tmp_path), "--images", "2")
    assert result.exit_code == 0, result.output
    assert f"2 images of {tmp_path}" in result.output.replace("\n", "")


def test_a_planted_error_fails_its_line_alone(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = replace(ops.TABLE["ShearX"], apply=affine.shear_y)
    monkeypatch.setitem(ops.TABLE, "ShearX", swapped)
    result = run()
    assert result.exit_code == 1
    failed = {name for name, outcome in outcomes(result.output).items() if outcome == "FAIL"}
    assert "ShearX" in failed
    assert failed - {"ShearX"} <= {"all of it, RandAugment", "all of it, AutoAugment"}


@pytest.mark.parametrize("name", ops.TABLE)
def test_a_magnitude_off_by_one_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.arguments
    heeds = bool(right(name, np.array([9.0])).any())
    monkeypatch.setattr(ops, "arguments", lambda name, m: right(name, m + 1))
    monkeypatch.setattr(ops, "TABLE", {name: ops.TABLE[name]})
    check, _ = pixels.operations(np.stack(list(pictures(32, 32).values())))
    assert check.passed != heeds


def test_another_probability_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pixels.policy().passed
    (name, chance, level), second = AUTOAUGMENT[3]
    wrong = (*AUTOAUGMENT[:3], ((name, chance + 0.2, level), second), *AUTOAUGMENT[4:])
    monkeypatch.setattr(pixels, "AUTOAUGMENT", wrong)
    assert not pixels.policy().passed


def test_a_wrong_rate_loss_or_network_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, loss, build = learning.learning_rate, learning.soft_distillation, learning.build_model
    monkeypatch.setattr(learning, "NETWORKS", learning.NETWORKS[-1:])
    monkeypatch.setattr(learning, "learning_rate", lambda *some: rate(*some[:4], some[4] + 1, some[5]))
    monkeypatch.setattr(learning, "soft_distillation", lambda *z, **more: loss(*z, **more) * (1 + 1e-3))

    def deeper(*some, **more):
        model = build(*some, **more)
        model.norm.eps = 1e-3
        return model

    monkeypatch.setattr(learning, "build_model", deeper)
    failed = {c.name for group in (learning.rates, learning.losses, learning.networks) for c in group() if not c.passed}
    assert {"learning rate, 300 epochs", "soft distillation, by batch", "deit_ti 32/4, class head"} <= failed
    assert "hard distillation" not in failed


def test_differences_are_measured_as_they_say() -> None:
    check = compare("x", [[1.0, 2.0], [3.0]], [[1.0, 2.5], [3.0]], 0.2)
    assert (check.worst, check.mean, check.passed) == (0.5, 0.5 / 3, False)
    assert compare("x", [1.0, 2.0], [1.0, 2.5], 0.26, by="mean").passed
    assert compare("x", [2.0], [1.0], 0.5, unit=2.0).passed
    assert not compare("x", [1.0], [1.0, 1.0], 9).passed, "another shape"
    assert not compare("x", [float("nan")], [1.0], 9).passed, "not a number"
    assert absent("x", "no reason").passed
    assert not Check("x", 1.0, 0.0, 0.5).passed


def test_images_come_from_every_folder(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 2), ("c/d", 1)):
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / name / f"{number}.jpg").write_bytes(f"{name}{number}".encode())
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert parity.gather(tmp_path, 3) == [b"a0", b"b0", b"c/d0"]
    assert parity.gather(tmp_path, 2) == [b"a0", b"b0"]
    assert set(parity.gather(tmp_path, 5)) == {b"a0", b"b0", b"c/d0", b"a1", b"b1"}
    with pytest.raises(UserError, match="holds no images"):
        parity.gather(tmp_path / "c" / "nothing", 3)


def test_without_timm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm is not installed" in str(run().exception)
    monkeypatch.setattr(parity, "app", lambda: parity.parity(None, 1, 32))
    with pytest.raises(SystemExit) as caught:
        parity.main()
    assert caught.value.code == 2


def test_help_comes_without_heavy_imports() -> None:
    heavy = "{'torch', 'numpy', 'timm', 'PIL'}"
    code = f"import sys; from tools.parity import __main__; assert not {heavy} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
