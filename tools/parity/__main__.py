"""Compares deitfast with timm, Pillow, torchvision and plain readings of the recipe, line by line."""

import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines.errors import DeitfastError, UserError

if TYPE_CHECKING:
    from tools.parity.check import Check

SUFFIXES = (".jpeg", ".jpg", ".png")
POLICIES = {"RandAugment": "randaugment", "AutoAugment": "autoaugment", "color jitter": "none"}
LEAST = 8
"""Images that are compared at least; fewer are taken again and again."""
out, err = Console(), Console(stderr=True)
app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def parity(
    folder: Annotated[Path | None, typer.Argument(help="JPEGs and PNGs, at any depth. Default: drawn ones.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of them, taken evenly from every folder.")] = 24,
    size: Annotated[int, typer.Option(min=8, help="Side of the crops, in pixels.")] = 224,
) -> None:
    """Print how far deitfast is from what it should equal, line by line; exit with 1 where anything is too far."""
    _require_timm()
    files = gather(folder, images) if folder else drawn(LEAST)
    what = f"{len(files)} images of {folder}" if folder else f"{len(files)} drawn images"
    out.print(f"{what}, crops of {size} px. Differences of pixels are in levels of 255.")
    checks = [check for title, group in groups(files, size) for check in show(title, group)]
    failed, absent = sum(not check.passed for check in checks), sum(bool(check.absent) for check in checks)
    out.print(f"\n{len(checks) - failed - absent} pass, {failed} fail, {absent} not compared on this machine")
    if failed:
        raise typer.Exit(1)


def groups(files: list[bytes], size: int) -> Iterator[tuple[str, Iterable["Check"]]]:
    """Yield each group's title and its checks, which are computed one by one as they are taken."""
    from pipelines.spec import AugmentSpec
    from tools.parity import learning, loading, pixels

    with TemporaryDirectory() as scratch:
        files = list(islice(cycle(files), max(LEAST, len(files))))
        reader = loading.store(files, Path(scratch) / "images")
        small = loading.store(loading.shrunk(files), Path(scratch) / "small")
        spec = AugmentSpec(size, erasing=1.0, repeats=1, mix_group=2)
        drawn = {name: loading.one_batch(reader, replace(spec, policy=policy)) for name, policy in POLICIES.items()}
        crops = drawn["RandAugment"].images.numpy()  # windows are the same under every policy
        params = {name: batch.params for name, batch in drawn.items()}
        yield "operations against timm with Pillow, and torchvision's color jitter", pixels.operations(crops)
        yield "to the model's input, against a plain reading (normalized units)", pixels.chain(crops, params)
        yield "loaders against the reference loader", loading.loaders(reader, small, size)
    yield "networks against timm (relative to the largest entry)", learning.networks()
    yield "losses, in value and gradient", learning.losses()
    yield "schedule and groups", learning.rates()


def show(title: str, group: Iterable["Check"]) -> list["Check"]:
    """Print one group's table and return its checks."""
    table = Table("", "worst", "mean", "allowed", "", box=None, pad_edge=False)
    checks = []
    with err.status(title):
        for check in group:
            checks.append(check)
            if check.absent:
                table.add_row(check.name, "", "", "", f"not here: {check.absent}")
                continue
            allowed = f"{check.by} {check.allowed:.3g}"
            outcome = "pass" if check.passed else "[red]FAIL[/red]"
            table.add_row(check.name, f"{check.worst:.3g}", f"{check.mean:.3g}", allowed, outcome)
    out.print(f"\n[bold]{title}[/bold]", table)
    return checks


def gather(folder: Path, count: int) -> list[bytes]:
    """Return the bytes of `count` images below `folder`: one of each folder in turn, so that none has them all.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            by_folder.setdefault(path.parent, []).append(path)
    if not by_folder:
        raise UserError(f"{folder} holds no images", expected=f"files called *{', *'.join(SUFFIXES)}, at any depth")
    depth = -(-count // len(by_folder))
    layers = [paths[turn] for turn in range(depth) for paths in by_folder.values() if turn < len(paths)]
    step = max(1, len(layers) // count)
    return [path.read_bytes() for path in layers[::step][:count]]


def drawn(count: int) -> list[bytes]:
    """Draw JPEGs with the spectrum of photographs, of several sizes."""
    import numpy as np
    from PIL import Image

    from tools.parity.pictures import photograph

    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        height, width = (int(side) for side in rng.integers(200, 500, 2))
        Image.fromarray(photograph(rng, height, width)).save(buffer, "JPEG", quality=90, subsampling=number % 3)
        files.append(buffer.getvalue())
    return files


def _require_timm() -> None:
    """Say what is missing where this was started outside the developer's environment.

    Raises:
        UserError: timm cannot be imported.
    """
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "timm is not installed: it is what deitfast is compared with",
            remedy="tools/setup, or pip install -e '.[dev]'",
        ) from None


def main() -> None:
    """Run the command and exit; an error is printed in a line or two."""
    try:
        app()
    except DeitfastError as error:
        err.print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
