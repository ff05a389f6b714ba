"""tools/gpu_check: all of it in miniature, and what needs no GPU: wheels, trace, verdict, schema, table."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from deitfast.bench.record import BenchRecord, Figure, Section, load, new_record, save
from deitfast.bench.tables import section_sentences, section_table
from pipelines.errors import DeitfastError, UserError
from pipelines.storage.reader import Reader
from tests.helpers.loader_contract import RESIZED, open_train
from tests.helpers.small_runs import CPU
from tools.gpu_check import wheels
from tools.gpu_check.context import DRY, Context, InputPaths, Note
from tools.gpu_check.inputs import RepeatedReader, draw_photographs, jpegs, open_photos
from tools.gpu_check.runner import SECTIONS, Runner, SectionSpec, why_left_out
from tools.gpu_check.suite import read as read_report
from tools.gpu_check.trace import STEP, Event, read, read_waits, summary, union

ROOT = Path(__file__).parents[2]
ON_CPU = {"augment", "graphs"}
"""Sections that a dry run leaves out."""


def record(*sections: Section) -> BenchRecord:
    return replace(new_record("gpu_check", ("gpu_check",)), sections=sections)


def shown(found: BenchRecord, *, dry: bool = False) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*map(section_table, found.sections), *section_sentences(found, dry=dry))
    return capture.get()


def test_a_dry_run_goes_through_everything(tmp_path: Path) -> None:
    """In a process of its own, as Triton looks at its environment once."""
    command = [sys.executable, "-m", "tools.gpu_check", "--dry-run", "--json", tmp_path / "found.json"]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # as from a plain checkout
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = load(tmp_path / "found.json")
    assert [section.name for section in found.sections] == list(SECTIONS)
    left = {section.name for section in found.sections if section.outcome == "left out"}
    lacks = {name for name, spec in SECTIONS.items() if wheels.missing(spec.needs)}
    assert left - lacks == ON_CPU
    for section in found.sections:
        assert section.outcome != "failed", section.reason
        assert section.figures or section.name in left
    assert (tmp_path / "found.trace.json.gz").exists()
    assert "A dry run" in done.stdout
    assert "end to end, of the step alone" in done.stdout


def test_nothing_of_it_is_imported_before_it_is_known_to_be_there() -> None:
    """What says that pydantic is missing must not need pydantic."""
    code = "import sys; from tools.gpu_check import __main__\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'pydantic'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def context(tmp_path: Path) -> Context:
    return Context(CPU, DRY, InputPaths(), tmp_path, tmp_path / "trace.json.gz")


def failing(context: Context) -> Iterator[Figure | Note]:
    yield Figure("before", "ms", (1.0, 3.0))
    raise ValueError("planted in test[on], see [/folder]")


def fine(context: Context) -> Iterator[Figure | Note]:
    yield Note("found", {"a": 1})


def run(tmp_path: Path, sections: dict[str, SectionSpec], missing: tuple[str, ...] = (), **more) -> BenchRecord:
    path = tmp_path / "found.json"
    found = Runner(context(tmp_path), sections, missing, path, **more).run()
    assert load(path) == found
    return found


def test_a_section_that_fails_keeps_its_figures_and_the_next_one_runs(tmp_path: Path) -> None:
    found = run(tmp_path, {"one": SectionSpec(failing), "two": SectionSpec(fine)})
    one, two = found.sections
    assert (one.outcome, two.outcome) == ("failed", "done")
    assert one.figures == (Figure("before", "ms", (1.0, 3.0)),)
    assert "ValueError: planted in test[on], see [/folder]" in one.reason
    assert two.notes == {"found": {"a": 1}}
    assert found.failed
    assert "ValueError: planted in test[on], see [/folder]" in shown(found)


def test_what_was_found_is_on_the_disk_before_a_section_ends(tmp_path: Path) -> None:
    path = tmp_path / "found.json"

    def killed(context: Context) -> Iterator[Figure | Note]:
        yield Figure("first", "ms", (1.0,))
        (section,) = load(path).sections
        assert section.figures == (Figure("first", "ms", (1.0,)),)
        assert section.outcome == "failed"
        assert "under way" in section.reason
        yield Note("looked", True)

    assert run(tmp_path, {"one": SectionSpec(killed)}).sections[0].notes == {"looked": True}


def test_sections_are_left_out_by_name(tmp_path: Path) -> None:
    sections = {
        "dali": SectionSpec(fine, needs=("nvidia.dali",)),
        "gpu": SectionSpec(fine, cuda=True),
        "here": SectionSpec(fine),
    }
    found = run(tmp_path, sections, ("nvidia.dali",))
    reasons = [section.reason for section in found.sections]
    assert reasons == ["nvidia.dali is not installed", "it needs a GPU", ""]
    assert "not installed: nvidia.dali" in found.notes
    assert "left out: dali, gpu" in shown(found)
    late = run(tmp_path, {"here": SectionSpec(fine)}, minutes=1e-9)
    assert late.sections[0].reason == "--minutes were over"
    assert why_left_out(SectionSpec(fine, needs=("a", "b")), ("b", "a"), cuda=True, late=True) == (
        "a, b are not installed"
    )


@pytest.mark.parametrize(
    ("least", "most", "met"),
    [
        (None, None, None),
        (2.0, None, True),
        (2.1, None, False),
        (None, 2.0, True),
        (None, 1.9, False),
        (1.0, 1.5, False),
    ],
)
def test_a_target_is_met_by_the_median(least: float | None, most: float | None, met: bool | None) -> None:
    figure = Figure("it", "share", (1.0, 2.0, 9.0), least=least, most=most)
    assert figure.median == 2.0
    assert figure.met is met


def test_the_table_says_what_is_met_and_what_is_missed() -> None:
    figures = (
        Figure("end to end", "share", (0.9, 0.94, 0.96), least=0.95),
        Figure("waits", "count", (0.0,), most=0),
        Figure("step", "images/s", (21700.4,)),
    )
    text = shown(record(Section("together", "done", "", 3.0, figures, {}, 5_000_000_000, 9_500_000_000)))
    assert "at least 95.0%: missed" in text
    assert "at most 0: met" in text
    assert "21,700" in text
    assert "torch at most 5.0 GB, GPU in use 9.5 GB" in text
    assert "1 of 2 targets met; missed: end to end" in text
    assert "mean nothing" in shown(record(), dry=True)


def test_records_come_back_and_nothing_else_is_one(tmp_path: Path) -> None:
    path, one = tmp_path / "found.json", record(Section("a", "done", figures=(Figure("x", "ms", (1.0, 2.0)),)))
    save(one, path)
    assert load(path) == one
    tree = json.loads(path.read_text())
    for change in ({"format": 0}, {"more": 1}, {"sections": [{"name": "a", "outcome": "well"}]}):
        path.write_text(json.dumps(tree | change))
        with pytest.raises(DeitfastError):
            load(path)
    with pytest.raises(DeitfastError, match="is not a record"):
        load(tmp_path / "nowhere.json")


def traced(name: str, stream: int, begin: float, length: float, kind: str = "kernel") -> dict:
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": length, "tid": stream, "args": {"stream": stream}}


TRACE = [
    traced("write_pixels", 7, 0, 10),
    traced("matmul", 7, 10, 50),
    traced("matmul", 7, 80, 20),  # after a gap of 20, in which the loader works for 10
    traced("idct", 20, 30, 40),
    traced("Memcpy HtoD", 21, 90, 5, "gpu_memcpy"),
    traced("aten::mm", 1, 0, 500, "cpu_op"),
    {"ph": "M", "name": "process_name", "pid": 0, "args": {}},
]


def test_a_trace_is_read_and_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": TRACE}).encode()))
    events = read(path)
    assert events[0] == Event("write_pixels", 7, (0, 10))
    assert [event.name for event in events] == ["write_pixels", "matmul", "idct", "matmul", "Memcpy HtoD"]
    found = summary(events)
    assert found["seconds"] == 1e-4
    assert found["busy"] == pytest.approx(0.9)
    assert found["longest_gaps_us"] == [10]
    assert next(iter(found["kernels"].items())) == ("matmul", pytest.approx(70 / 125))
    assert found["streams"]["7"] == {"busy": pytest.approx(0.8), "events": 3, "mostly": ["matmul", "write_pixels"]}
    assert found["parts"] == pytest.approx({"step": 0.7, "augmentation": 0.1, "loader": 0.45, "overlap": 35 / 45})
    plain = tmp_path / "trace.json"
    plain.write_text(json.dumps({"traceEvents": TRACE}))
    assert [event.name for event in read(plain, ("cpu_op",))] == ["aten::mm"]


def test_waits_are_told_apart_by_thread_and_only_those_in_steps_count(tmp_path: Path) -> None:
    def call(name: str, thread: int, begin: float) -> dict:
        return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": begin, "dur": 1, "tid": thread, "args": {}}

    steps = [traced(STEP, 1, begin, 40, "user_annotation") for begin in (100, 150)]
    calls = [
        call("cudaStreamSynchronize", 1, 120),
        call("cudaHostAlloc", 1, 130),
        call("cudaMalloc", 2, 130),
        call("cudaEventSynchronize", 2, 140),
        call("cudaMemcpy", 1, 151),
        call("cudaMemcpyAsync", 1, 152),
        call("cudaMallocAsync", 2, 153),
        call("cudaLaunchKernel", 1, 154),
        call("cudaDeviceSynchronize", 1, 50),  # before the first step
        call("cudaDeviceSynchronize", 1, 191),  # behind the last one
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*steps, *calls, *TRACE]}))
    found = read_waits(path)
    assert found.loop == {"cudaStreamSynchronize": 1, "cudaHostAlloc": 1, "cudaMemcpy": 1}
    assert found.allocations == {"cudaMalloc": 1}
    assert found.others == {"cudaEventSynchronize": 1}
    path.write_text(json.dumps({"traceEvents": calls}))
    with pytest.raises(ValueError, match=STEP):
        read_waits(path)


def test_without_the_kernels_the_busiest_stream_is_the_steps() -> None:
    found = summary([Event("matmul", 7, (0, 90)), Event("idct", 20, (80, 100))])
    assert found["parts"] == pytest.approx({"step": 0.9, "augmentation": 0.0, "loader": 0.2, "overlap": 0.5})
    assert summary([])["busy"] == 0


def test_spans_are_joined_where_they_touch() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4), (0, 1)]) == [(0, 4), (5, 6)]


def write_wheel(folder: Path, name: str, module: str, text: str = "") -> None:
    """A wheel as pip takes it: module, METADATA, WHEEL and RECORD."""
    folder.mkdir(exist_ok=True)
    distribution, version = name.split("-")[:2]
    info = f"{distribution}-{version}.dist-info"
    files = {
        module: text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD")))


def test_wheels_are_installed_beside_this_python_and_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, name = tmp_path / "wheels", "made_up_for_a_test"
    write_wheel(folder, f"{name}-1.0-py3-none-any.whl", f"{name}.py", "VALUE = 3\n")
    write_wheel(folder, "torch-9.9-py3-none-any.whl", "torch/__init__.py")  # torch is here: left alone
    write_wheel(folder, "nvidia_made_up-1.0-py3-none-any.whl", "nvidia/made_up/__init__.py")
    assert wheels.missing((name, "nvidia.made_up")) == (name, "nvidia.made_up")
    assert wheels.install(folder, tmp_path / "there") == [name, "nvidia_made_up"]
    assert wheels.missing((name, "torch")) == ()
    assert __import__(name).VALUE == 3
    del sys.modules[name]
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'there')!r}); import nvidia.made_up, nvidia.nvimgcodec"
    if not wheels.missing(("nvidia.nvimgcodec",)):  # both parts of the package are found
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken_one-1-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"(?s)pip failed.*broken_one"):
        wheels.install(tmp_path, tmp_path / "there")


def test_repeated_images_are_the_same_under_new_numbers(photos: Reader) -> None:
    again = RepeatedReader(photos, 3)
    assert again.num_samples == 3 * photos.num_samples
    for index in (0, 28, 29, 57, 86):
        assert (again.read_verified(index) == photos.sample(index % 29)).all()
        assert again.location(index) == photos.location(index % 29)
        assert again.labels[index] == photos.labels[index % 29]
    with closing(open_train("reference", again, RESIZED)) as loader:
        assert sum(len(batch.labels) for batch in loader.epoch(0)) == 84


def test_given_images_are_converted_to_as_many_classes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, file in enumerate(draw_photographs(3, ((20, 30),))):
        (images / f"{number}.JPEG").write_bytes(file)
    dataset, what = open_photos(None, images, 0, 5, tmp_path, {"train": 40, "val": 0})
    with closing(dataset):
        assert dataset.split("train").num_samples == 40
        assert len(dataset.spec.classes) == dataset.split("val").num_samples == 5
    assert what.startswith("3 JPEGs of ")
    assert what.endswith("8 times")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no JPEGs"):
        jpegs(tmp_path / "empty")
    with pytest.raises(UserError, match="not found"):
        jpegs(tmp_path / "nowhere")


def test_a_report_of_tests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        "<testsuites><testsuite><testcase classname='a' name='b'/><testcase classname='a' name='c'>"
        "<failure message='no'>assert 1 == 2</failure></testcase><testcase classname='a' name='d'>"
        "<skipped message='needs a GPU'/></testcase></testsuite></testsuites>"
    )
    assert read_report(path) == {
        "a::b": ("passed", ""), "a::c": ("failed", "assert 1 == 2"), "a::d": ("skipped", "needs a GPU")
    }  # fmt: skip
