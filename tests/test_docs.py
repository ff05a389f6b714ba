"""README and docs: every command is run, or at least read by the real command line; every Python block is run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from deitfast.cli.app import app
from deitfast.config.recipe import Recipe, flatten
from deitfast.docs.measured import tables
from pipelines.storage.convert.converter import ConvertOptions, convert
from pipelines.storage.sources.demo import open_demo
from tests.helpers.command_line import call
from tests.helpers.small_runs import run, tiny_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "deitfast" / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
NEEDS = {"gpu", "data", "minutes", "nodes", "install", "onnx"}
"""What a block may need that these tests have not: its commands are only read."""
ELSEWHERE = ("tools/", "source ", "export ", "docker ")
"""Lines that are not this program's."""


OTHERS = {"--mixup-off-epoch", "--network", "--nproc-per-node", "--signal", "--requeue"}
"""Options of timm, torchrun, Docker and SLURM that the text speaks of."""


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(needs, text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (needs, found, text) in enumerate(BLOCK.findall(page.read_text()))
        if found == language
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the docs speak of: a demo set in data/demo, small, and a distilled run of it in runs/student."""
    folder = tmp_path_factory.mktemp("reader")
    convert(open_demo(96, 32), folder / "data" / "demo", ConvertOptions(workers=1))
    recipe = tiny_recipe("model.patch=16", "model.token=on", "train.epochs=1", "train.ema=0")
    run(folder / "data" / "demo", folder / "runs" / "student", recipe)
    Image.new("RGB", (70, 50), "red").save(folder / "picture.jpg")
    return folder


@pytest.fixture
def reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in that folder; the demo set has the size that it has there."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(open_demo, "__defaults__", (96, 32, 0))
    monkeypatch.delenv("DEITFAST_DATA", raising=False)


def command(line: str) -> list[str] | None:
    """Return the arguments of `deitfast` on a line, also under torchrun; None for a line that is not this program's."""
    words = shlex.split(line, comments=True)
    if "-m" in words and words[words.index("-m") + 1] == "deitfast":
        return words[words.index("-m") + 2 :]
    if "deitfast" in words[:4]:
        return words[words.index("deitfast") + 1 :]
    assert not words or line.startswith(ELSEWHERE) or "-m tools." in line, f"what is this? {line}"
    return None


def read_by_the_command_line(arguments: list[str]) -> None:
    """Fail if the command does not exist or does not take these options."""
    group: Any = typer.main.get_command(app)
    assert arguments[0] in group.commands, f"there is no command {arguments[0]}"
    group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(("needs", "text"), blocks("sh"))
def test_commands_do_what_a_page_says(capsys: pytest.CaptureFixture[str], needs: str, text: str) -> None:
    assert not needs or needs in NEEDS
    for line in text.splitlines():
        arguments = command(line)
        if arguments is None:
            continue
        if needs:
            read_by_the_command_line(arguments)
        else:
            code, _, err = call(capsys, *arguments)
            assert code == 0, f"{line}\n{err}"


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(("needs", "text"), blocks("python"))
def test_python_blocks_run(capsys: pytest.CaptureFixture[str], needs: str, text: str) -> None:
    assert not needs
    exec(compile(text, "a page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_and_settings_in_the_text_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    options = {name for each in group.commands.values() for option in each.params for name in option.opts}
    options |= {"--debug", "--version", "--all", "--cov", "--cov-report", "--dry-run"} | OTHERS
    settings, sections = flatten(Recipe()).keys(), {name.partition(".")[0] for name in flatten(Recipe())}
    for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            assert option in options, f"`{code}`"
        for name in re.findall(r"(?<![\w./])([a-z]+\.[a-z_]+)(?=$|[ =])", code):
            assert name in settings or name.partition(".")[0] not in sections, f"`{code}`"


@pytest.mark.parametrize(
    "name", sorted({name for page in PAGES for _, name, _ in tables.BLOCK.findall(page.read_text())})
)
def test_a_record_says_how_to_measure_again(name: str) -> None:
    found = tables.read(name)
    assert found["machine"]
    assert found["versions"]["deitfast"]
    if arguments := command(found["command"]):
        read_by_the_command_line(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for path in re.findall(r"`((?:deitfast|pipelines|tools|tests)/(?:\w[\w/]*(?:\.\w+)?)?)`", page.read_text()):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_figures_are_the_records() -> None:
    for page in PAGES:
        assert tables.filled(page) == page.read_text(), f"{page.name}: run python -m {tables.__name__}"
    assert tables.CHART.read_text() == tables.chart()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text()) < 7000


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"deitfast/docs/{page.name}" not in text] == []
