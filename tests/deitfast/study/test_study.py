"""A study trains its rows once, goes on where it stopped, and claims no more than its runs show."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from deitfast.cli.options import data_facts
from deitfast.config.builtin import study_names
from deitfast.config.fit_to_data import DataFacts
from deitfast.report.live import LiveReport
from deitfast.report.read import read_run
from deitfast.run_folder import RunFolder
from deitfast.study import run as run_module
from deitfast.study.plan import StudyOptions, StudyPlan, disk_bytes, plan_study
from deitfast.study.results import Measurements, RowResult, StudyResult, gather, judge
from deitfast.study.side_by_side import INTERRUPTED, Children, train_side_by_side
from deitfast.study.spec import Claim, load_study
from deitfast.study.tables import claims_table, rows_table
from pipelines.errors import DeitfastError, UserError
from pipelines.files import file_lock
from tests.helpers.command_line import call
from tests.helpers.small_runs import CPU

ROOT = Path(__file__).parents[3]
CIFAR = DataFacts("cifar10", 32, (5000,) * 10, "", validated=True)
IMAGENET = DataFacts("imagenet", 400, (1300,) * 1000, "", validated=True)
TINY = """
# Where it comes from.
title = "Small"
columns = ["top1", "f1", "minutes"]
[base]
arch = "deit_ti"
set = ["model.depth=1", "model.patch=16", "train.batch=16", "augment.mix_group=8", "train.ema=0"]
[[rows]]
name = "plain"
[[rows]]
name = "class head"
method = "class-embedding"
teacher = "small"
[[rows]]
name = "both heads"
method = "class+distillation"
teacher = "small"
published = { top1 = 74.5 }
[teachers.small]
arch = "vit_ti"
set = ["model.depth=1", "model.patch=32", "train.batch=16", "train.ema=0", "augment.mixup=0", "augment.cutmix=0"]
[[claims]]
better = "both heads"
than = "plain"
"""


def plan_of(text_or_name: str, facts: DataFacts, tmp_path: Path, **options) -> StudyPlan:
    chosen = StudyOptions(**{"data": tmp_path, "out": tmp_path / "out", "scale": "cpu", **options})
    return plan_study(load_study(text_or_name)[0], chosen, lambda folder: facts, tmp_path / "demo")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return lambda *arguments: Ended(*call(capsys, *arguments))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return str(file)


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", study_names())
def test_every_built_in_study_plans_at_every_scale(name: str, tmp_path: Path) -> None:
    study, comment = load_study(name)
    assert comment
    assert study.title
    for scale in study.scales or ("cpu",):
        facts = IMAGENET if scale == "paper" or study.kind == "throughput" else CIFAR
        plan = plan_of(name, facts, tmp_path, scale=scale)
        trained = {run.name: run for run in plan.runs}
        assert all(needed in trained for run in plan.runs for needed in run.needs)
        done: set[str] = set()
        for run in plan.runs:
            assert set(run.needs) <= done  # in an order that works
            done.add(run.name)
        shown = [(row.runs, row.head, row.row.weights) for row in plan.rows]
        assert len(set(shown)) == len(shown)  # no two rows are the same figures
        assert disk_bytes(plan.runs) > 0


def test_the_command_names_a_file_of_ones_own(tiny: str, tmp_path: Path) -> None:
    assert plan_of(tiny, CIFAR, tmp_path).typed().startswith(f"deitfast study {tiny} --scale cpu --seeds 1 --data ")
    assert plan_of("methods", CIFAR, tmp_path).typed().startswith("deitfast study methods --scale cpu")


def test_rows_that_are_trained_alike_share_a_run_and_a_teacher_is_a_row(tmp_path: Path) -> None:
    plan = plan_of("methods", CIFAR, tmp_path)
    runs = {row.row.name: row.runs for row in plan.rows}
    assert runs["class embedding"] == runs["distillation embedding"] == runs["class + distillation"]
    assert len(runs["class embedding"]) == 3
    assert [row.head for row in plan.rows[3:]] == ["class", "distillation", "joint"]
    course = plan_of("course", CIFAR, tmp_path)
    assert [row.runs for row in course.rows if row.row.name == "CNN"] == [("cnn",)]


def test_a_row_and_a_teacher_of_one_name_that_learn_otherwise_are_two_runs(tiny: str, tmp_path: Path) -> None:
    Path(tiny).write_text(TINY.replace('name = "class head"', 'name = "small"'))
    plan = plan_of(tiny, CIFAR, tmp_path)
    assert [run.name for run in plan.runs] == ["plain", "small", "small-row"]
    assert [row.runs for row in plan.rows] == [("plain",), ("small-row",), ("small-row",)]
    assert plan.runs[2].needs == ("small",)


def test_more_seeds_go_on_from_what_fewer_have_left(tiny: str, tmp_path: Path) -> None:
    one, three = ([run.name for run in plan_of(tiny, CIFAR, tmp_path, seeds=seeds).runs] for seeds in (1, 3))
    assert one == ["plain", "small", "class-head"]
    assert three == [*one, "plain-seed1", "class-head-seed1", "plain-seed2", "class-head-seed2"]


def test_settings_of_the_scale_give_way_to_the_rows_and_those_of_the_user_to_nothing(tmp_path: Path) -> None:
    ablation = {run.name: run.recipe for run in plan_of("ablation", CIFAR, tmp_path).runs}
    assert ablation["deit"].train.ema == 0
    assert ablation["ema"].train.ema == 0.99996
    assert ablation["no-repeated-augmentation"].augment.repeats == 1
    assert ablation["deit"].augment.repeats == 3
    forced = plan_of("ablation", CIFAR, tmp_path, settings=("train.epochs=1",))
    assert {run.recipe.train.epochs for run in forced.runs} == {1}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('teacher = "small"', 'teacher = "smal"', "unknown teacher 'smal' (did you mean small?)"),
        ('than = "plain"', 'than = "plane"', "unknown row 'plane' (did you mean plain?)"),
        ('name = "both heads"', 'name = "Plain"', "two rows are called 'plain'"),
        ('"f1", "minutes"', '"f2", "minutes"', "columns.1: must be 'top1'"),
        ('title = "Small"', 'tittle = "Small"', "unknown key tittle"),
        ('"train.ema=0"]\n[[rows]]', '"train.ema"]\n[[rows]]', "--set train.ema has no value"),
        ("[[rows]]\nname", "[[rows]\nname", "is not TOML"),
        ('column = "top1"', "", ""),
        ("[[claims]]", '[[claims]]\ncolumn = "auc"', "column is not shown: 'auc'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(TINY.replace(old, new, 1))
    if not said:
        load_study(str(file))
        return
    with pytest.raises(UserError) as error:
        load_study(str(file))
    assert said in str(error.value)


def test_what_cannot_work_is_refused_before_anything_trains(tiny: str, tmp_path: Path, tiny_small: Path, cli) -> None:
    file = Path(tiny)
    file.write_text(TINY.replace('teacher = "small"\n', "", 1))
    with pytest.raises(UserError, match=r"class-head .*distills and has no teacher"):
        plan_of(tiny, CIFAR, tmp_path)
    file.write_text(TINY)
    with pytest.raises(UserError, match="no validation split"):
        plan_of(tiny, DataFacts("folder", 32, (40, 40), "", validated=False), tmp_path)
    with pytest.raises(UserError, match=r"unknown field optim\.rate"):
        plan_of(tiny, CIFAR, tmp_path, settings=("optim.rate=1",))
    with pytest.raises(UserError, match=r"no row 'clas head' \(did you mean class head\?\)"):
        plan_of(tiny, CIFAR, tmp_path, only=("clas head",))
    with pytest.raises(UserError, match="no scale paper"):
        plan_of("teachers", CIFAR, tmp_path, scale="paper")
    result = cli("study", "nonesuch", "--data", tiny_small)
    assert result.exit_code == 2
    assert "study not found" in result.stderr
    assert data_facts(tiny_small).validated


def test_a_study_is_trained_once_stopped_and_gone_on_with(
    tiny: str, tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LiveReport, "write", lambda self, **options: None)  # twice the time of these runs
    arguments = ["study", tiny, "--data", tiny_small, "--out", "whole", "--set", "train.epochs=1"]
    assert cli(*arguments).exit_code == 0
    whole = json.loads((tmp_path / "whole" / "study.json").read_text())
    assert [row["name"] for row in whole["rows"]] == ["plain", "class head", "both heads", "small"]
    assert all(row["done"] == row["planned"] == 1 for row in whole["rows"])
    runs = sorted(path.name for path in (tmp_path / "whole" / "runs").iterdir())
    assert runs == ["class-head", "plain", "small"]
    heads = read_run(tmp_path / "whole" / "runs" / "class-head").final()[1]["val"]
    figures = {row["name"]: row["figures"]["top1"] for row in whole["rows"]}
    assert figures["class head"] == [heads["class"]["top1"]]
    assert figures["both heads"] == [heads["joint"]["top1"]]
    rows = [json.loads(line) for line in Path("whole/runs/class-head/metrics.jsonl").read_text().splitlines()]
    assert whole["rows"][1]["figures"]["minutes"] == pytest.approx([sum(row["seconds"] for row in rows) / 60])
    assert whole["claims"][0]["verdict"] == "not decided"  # one run of each
    for name in ("study.html", "study.md"):
        text = (tmp_path / "whole" / name).read_text()
        assert "74.50" in text
        assert f"{100 * heads['joint']['top1']:.2f}" in text
        assert "deitfast train --recipe whole/recipes/plain.toml" in text

    options = StudyOptions(data=tiny_small, out=tmp_path / "whole", scale="cpu", settings=("train.epochs=1",))
    plan = plan_study(load_study(tiny)[0], options, data_facts, tmp_path / "demo")
    left = sum(file.stat().st_size for file in (tmp_path / "whole").rglob("*") if file.is_file())
    assert left < disk_bytes(plan.runs) < 1.5 * left  # a run of one epoch has no moments in the checkpoint before

    # stopped in its second run, and started again: the same figures, and nothing is trained twice
    original, begun = run_module.train, []

    def stopped_at_the_second(job, *rest):
        begun.append(job.out.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return original(job, *rest)

    arguments[5] = "stopped"
    monkeypatch.setattr(run_module, "train", stopped_at_the_second)
    assert cli(*arguments).exit_code == 130
    half = json.loads((tmp_path / "stopped" / "study.json").read_text())["rows"]
    assert [row["done"] for row in half] == [1, 0, 0, 0]
    assert cli(*arguments).exit_code == 0
    assert begun == ["plain", "small", "small", "class-head"]
    again = json.loads((tmp_path / "stopped" / "study.json").read_text())
    for one, other in zip(whole["rows"], again["rows"], strict=True):
        assert one["figures"]["top1"] == other["figures"]["top1"]
        assert one["figures"]["f1"] == other["figures"]["f1"]
    assert cli(*arguments).exit_code == 0
    assert len(begun) == 4

    refused = cli(*arguments[:-1], "optim.lr=0.5")
    assert refused.exit_code == 2
    assert "holds this study with other settings" in refused.stderr

    # a run that has not come to its last epoch is begun, not done, and its figures do not count
    (tmp_path / "whole" / "runs" / "class-head" / "metrics.jsonl").write_text("")
    rows = {row.name: row for row in gather(plan, {}).rows}
    assert [(row.done, len(row.runs)) for row in rows.values()] == [(1, 1), (0, 1), (0, 1)]
    assert rows["class head"].figures == {}


def test_a_row_that_fails_is_reported_and_does_not_stop_the_others(
    tiny: str, tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    trained = []

    def train(job, *rest):
        if job.out.name == "small":
            raise DeitfastError("the disk is full")
        trained.append(job.out.name)

    monkeypatch.setattr(run_module, "train", train)
    result = cli("study", tiny, "--data", tiny_small, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert trained == ["plain"]
    assert "2 of 3 runs failed" in result.stderr or "runs failed" in result.stderr
    assert "class-head: small failed, which it needs" in (tmp_path / "out" / "study.md").read_text()


@pytest.mark.slow
def test_runs_side_by_side_learn_the_same(
    tiny: str, tiny_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(run_module.__file__).parents[2])]))
    common = ["study", tiny, "--data", tiny_small, "--set", "train.epochs=1", "--out"]
    assert cli(*common, "one").exit_code == 0
    shutil.rmtree(tmp_path / "caches", ignore_errors=True)
    assert cli(*common, "two", "--jobs", "2").exit_code == 0
    found = [json.loads((tmp_path / out / "study.json").read_text())["rows"] for out in ("one", "two")]
    assert [row["figures"]["top1"] for row in found[0]] == [row["figures"]["top1"] for row in found[1]]


def test_a_run_starts_when_what_it_needs_is_trained(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny, CIFAR, tmp_path)
    assert [(run.name, run.needs) for run in plan.runs] == [("plain", ()), ("small", ()), ("class-head", ("small",))]
    started, after_small = [], threading.Event()

    def train(self: Children, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        name = Path(command[command.index("--out") + 1]).name
        started.append(name)
        if name == "class-head":
            after_small.set()
        if name == "plain":  # the longest of all holds nothing up that does not need it
            assert after_small.wait(30)
        return 0, ""

    monkeypatch.setattr(Children, "run", train)
    told = []
    assert train_side_by_side(plan, 2, 0, told.append, CPU) == {}
    assert (sorted(started[:2]), started[2], len(told)) == (["plain", "small"], "class-head", 3)


def test_a_run_that_waits_for_its_teacher_takes_no_place(tiny: str, tmp_path: Path, monkeypatch) -> None:
    plan = plan_of(tiny, CIFAR, tmp_path, seeds=2)
    second_seed, running = threading.Event(), []

    def train(self: Children, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        name = Path(command[command.index("--out") + 1]).name
        running.append(name)
        assert len(running) <= 2
        if name == "plain-seed1":
            second_seed.set()
        if name == "small":  # class-head waits for it; the other place is plain's, and then the next one's that can run
            assert second_seed.wait(30)
        running.remove(name)
        return 0, ""

    monkeypatch.setattr(Children, "run", train)
    assert train_side_by_side(plan, 2, 0, lambda failures: None, CPU) == {}


def test_one_run_that_is_asked_to_stop_ends_them_all(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny, CIFAR, tmp_path)
    monkeypatch.setattr(Children, "run", lambda *_: (INTERRUPTED, "interrupted"))
    with pytest.raises(KeyboardInterrupt):
        train_side_by_side(plan, 2, 0, lambda failures: None, CPU)


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_runs_side_by_side_end_with_their_study_and_go_on_with_it(
    tiny: str, tiny_small: Path, tmp_path: Path, how: signal.Signals
) -> None:
    def study() -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = ["study", tiny, "--data", str(tiny_small), "--only", "plain", "--set", f"train.epochs={epochs}"]
        return subprocess.Popen([sys.executable, "-m", "deitfast", *words, "--jobs", "2", "--out", "out"],
                                cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True)  # fmt: skip

    epochs = 2000
    rows = tmp_path / "out" / "runs" / "plain" / "metrics.jsonl"
    first = study()
    wait_until(rows.exists, 120)
    os.kill(first.pid, how)
    second = study()  # at once: the run of the first may still be saving
    first.communicate(timeout=60)
    assert first.returncode == (-how if how == signal.SIGKILL else 130)
    left = len(rows.read_text().splitlines())
    wait_until(lambda: len(rows.read_text().splitlines()) > left + 2, 120)
    os.kill(second.pid, signal.SIGTERM)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 130, said
    assert "failed" not in said
    epochs_seen = [json.loads(line)["epoch"] for line in rows.read_text().splitlines()]
    assert epochs_seen == list(range(1, len(epochs_seen) + 1))
    with file_lock(rows.parent, "run"):  # nobody is in it any more
        pass


def test_a_dry_run_prints_the_commands_and_trains_nothing(tiny: str, tiny_small: Path, tmp_path: Path, cli) -> None:
    result = cli("study", tiny, "--data", tiny_small, "--out", tmp_path / "out", "--dry-run", "--only", "plain")
    assert result.exit_code == 0
    assert f"--out {tmp_path}/out/runs/plain --resume" in result.stdout
    assert "1 of 1 run to be trained" in result.stdout
    assert not RunFolder(tmp_path / "out" / "runs" / "plain").exists()


def test_a_dry_run_in_an_empty_folder_draws_the_demo_set_to_measure_on(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.delenv("DEITFAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    result = cli("study", tiny, "--out", "out", "--dry-run", "--only", "plain")
    assert "1 of 1 run to be trained" in result.stdout
    assert (tmp_path / "data" / "demo" / "dataset.json").exists()


def rows_of(better: tuple[float, ...], than: tuple[float, ...], column: str = "top1") -> tuple[RowResult, ...]:
    return tuple(
        RowResult(name, {column: Measurements(values)} if values else {}, {})
        for name, values in (("a", better), ("b", than))
    )


@pytest.mark.parametrize(
    ("better", "than", "column", "verdict"),
    [
        ((0.7, 0.71, 0.72), (0.6, 0.65, 0.69), "top1", "shown"),
        ((0.6, 0.65, 0.69), (0.7, 0.71, 0.72), "top1", "contradicted"),
        ((0.7, 0.71, 0.72), (0.6, 0.65, 0.7), "top1", "not decided"),  # inside the spread, if by one run
        ((0.72,), (0.6,), "top1", "not decided"),
        ((0.72, 0.73), (), "top1", "not measured"),
        ((1.0, 1.1), (1.2, 1.3), "loss", "shown"),
    ],
)
def test_a_difference_inside_the_spread_is_never_called_one(better, than, column, verdict) -> None:
    found = judge(Claim(better="a", than="b", column=column), rows_of(better, than, column))
    assert found.verdict == verdict
    assert found.reason


def test_figures_stand_with_their_spread_and_what_was_published_in_the_same_unit() -> None:
    few, one = Measurements((0.5, 0.6, 0.8)), Measurements((0.5,))
    assert (few.mean, few.spread) == (pytest.approx(0.6333, abs=1e-4), pytest.approx(0.1528, abs=1e-4))  # n - 1
    assert one.spread is None
    rows = tuple(RowResult(name, {"top1": found}, {"top1": 74.5}) for name, found in (("few", few), ("one", one)))
    study = SimpleNamespace(columns=("top1",))
    shown = rows_table(StudyResult(SimpleNamespace(study=study), rows))  # pyright: ignore[reportArgumentType]
    assert shown.head == ["row", "top-1 (%)", "published"]
    assert [row[1:] for row in shown.rows] == [["63.33 ± 15.28", "74.50"], ["50.00", "74.50"]]
    assert shown.numeric == [False, True, True]
    said = judge(Claim(better="few", than="one"), rows)
    assert said.reason.startswith("63.33 against 50.00")
    claims = claims_table(StudyResult(SimpleNamespace(study=study), rows, claims=(said,)))  # pyright: ignore[reportArgumentType]
    assert not claims.numeric[-1]  # a sentence that begins with a figure is text


def test_throughput_times_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    from deitfast.study import throughput

    monkeypatch.setattr(throughput, "ROUNDS", 1)
    monkeypatch.setattr(throughput, "BATCH", {"cpu": 1})
    file = tmp_path / "speed.toml"
    file.write_text(
        'title = "Speed"\nkind = "throughput"\ncolumns = ["parameters", "size", "eager"]\n'
        '[[rows]]\nname = "Ti"\nrecipe = "deit_ti_imagenet"\nset = ["augment.size=32"]\npublished = { eager = 2536 }\n'
    )
    result = cli("study", file, "--out", tmp_path / "out", "--set", "model.patch=16")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert row["figures"]["parameters"][0] == pytest.approx(5.68e6, rel=0.01)
    assert row["figures"]["size"] == [32]
    assert min(row["figures"]["eager"]) > 0
    text = (tmp_path / "out" / "study.md").read_text()
    assert "2,536" in text
    assert "repeated measurements of one network" in text
    assert f"deitfast study {file} --set model.patch=16 --out" in text
    assert "deitfast train" not in text  # nothing is trained
