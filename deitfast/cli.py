"""The command line. Heavy imports stay inside the commands, so that --help comes at once."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deitfast import __version__, ablations
from pipelines.errors import Failure, Mistake

log = logging.getLogger("deitfast")
app = typer.Typer(
    name="deitfast",
    help="Train DeiT from a data pipeline that keeps up with the GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)
ClickException = typer.BadParameter.__bases__[0].__bases__[0]  # click's own, or the copy that newer Typer carries
INTERRUPTED = 130
KINDS = ("imagenet", "cifar10", "cifar100", "folder", "demo", "dataset")

Data = Annotated[
    Path | None, typer.Option("--data", help="Converted data set. Default: $DEITFAST_DATA, else the demo set.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="A run, a file of weights, or a torchvision network (regnet_y_16gf).")
]
TeacherWeights = Annotated[
    Path | None, typer.Option("--teacher-weights", help="torchvision network's weights, where they cannot be fetched.")
]
PerImage = Annotated[
    bool, typer.Option("--per-image", help="One target an image, mixed like labels, instead of one a view (not DeiT).")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Any field of the recipe; again for more.")
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """Train DeiT from a data pipeline that keeps up with the GPU."""
    if version:
        out.print(f"deitfast {__version__}")
        raise typer.Exit


@app.command()
def convert(
    kind: Annotated[str, typer.Argument(help=f"What SOURCE is: {', '.join(KINDS)}.")],
    source: Annotated[
        Path | None, typer.Argument(help="Archive or folder. imagenet: Default: $IMAGENET_DIR, else ./imagenet.")
    ] = None,
    output: Annotated[Path | None, typer.Argument(help="Folder of the data set. Default: data/KIND.")] = None,
    max_side: Annotated[
        int, typer.Option(min=0, help="Shrink images whose longer side is longer; 0: leave JPEGs as they are.")
    ] = 0,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Encode JPEGs again at this quality where that is smaller.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="beton: one file a split; wds: WebDataset tar shards with DALI's indices.")
    ] = "beton",
    shard_size: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="MB of a shard, at most, for --format wds. Default: 1000.")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Make a validation split of this share, where the source has none.")
    ] = 0.0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out damaged files and list them, instead of stopping.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
) -> None:
    """Convert a data set to the files that loaders read. Goes on where it was interrupted."""
    from deitfast.datasets import convert_dataset, describe_dataset

    if kind not in KINDS:
        raise Mistake(f"there is no kind of data set called {kind}", expected=", ".join(KINDS))
    if kind == "demo" and output is None:
        source, output = None, source
    spec, folder = convert_dataset(
        kind, source, output, max_side=max_side, quality=quality, form=format_, shard_size=shard_size,
        val_fraction=val_fraction, skip_bad=skip_bad, workers=workers, display=_display(),
    )  # fmt: skip
    out.print(describe_dataset(spec, folder))


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="A converted data set, a run or a teacher cache.")]) -> None:
    """Say what is in a data set, a run or a teacher cache."""
    from deitfast.datasets import describe_dataset
    from deitfast.runlog import RunFolder
    from deitfast.tables import describe_cache, describe_run
    from pipelines.cache_files import is_cache
    from pipelines.storage.dataset import read_spec
    from pipelines.teacher_cache import TeacherCache

    run = RunFolder(folder)
    if is_cache(folder):
        out.print(describe_cache(TeacherCache.open(folder)))
    else:
        out.print(describe_run(run) if run.exists() else describe_dataset(read_spec(folder), folder))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A converted data set or a teacher cache.")]) -> None:
    """Read all of a data set, decode every image and compare it with what was converted; or all of a teacher cache."""
    from deitfast.datasets import verify_cache, verify_dataset
    from pipelines.cache_files import is_cache

    if not (verify_cache if is_cache(folder) else verify_dataset)(folder, _display()):
        raise typer.Exit(1)


@app.command()
def train(
    data: Data = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="deit_* or vit_* with ti, s, b; resnet18, resnet50; regnet_y_* with 4gf, 8gf, 16gf. Default: deit_ti."
        ),
    ] = None,
    distill: Annotated[str | None, typer.Option(help="none, soft or hard. Default: the recipe's.")] = None,
    teacher: Teacher = None,
    teacher_weights: TeacherWeights = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Folder of the teacher's answers, read and added to; or none. Default: one in caches/."),
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="Go round this many views of each image (DeiT no longer exactly).")
    ] = None,
    per_image: PerImage = False,
    recipe: Annotated[
        str | None, typer.Option(help="A built-in recipe or a TOML file. Default: what suits network and data.")
    ] = None,
    out_: Annotated[Path | None, typer.Option("--out", help="The run's folder. Default: a new one in runs/.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the run. Default: the recipe's.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images in a batch, over all devices. Default: the recipe's.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option("--data-fraction", help="Share of the training images to use, of every class alike.")
    ] = None,
    settings: Settings = None,
    weights: Annotated[
        Path | None, typer.Option(help="Start from these weights: a run or a file (DeiT, timm, Hugging Face).")
    ] = None,
    finetune: Annotated[
        Path | None, typer.Option(help="Start from these weights at another size or with other classes.")
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"A row of the paper's ablation table: {', '.join(ablations.names())}."),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out images that cannot be read, and count them, instead of stopping."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write event files for TensorBoard, to tensorboard/ in the run.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Train a network; several GPUs or nodes with `torchrun ... -m deitfast train`."""
    from deitfast.commands import run_training
    from deitfast.plan import TrainOptions

    options = TrainOptions(
        data, arch, recipe, distill, teacher, out_, epochs, batch, tuple(settings or ()), resume, tuple(sys.argv),
        weights=weights, finetune=finetune, ablate=tuple(ablate or ()), teacher_weights=teacher_weights, cache=cache,
        views=views, per_image=per_image, skip_bad=skip_bad, fraction=fraction, tensorboard=tensorboard,
    )  # fmt: skip
    run_training(options, device, _display(), out)


@app.command()
def teach(
    data: Data = None,
    teacher: Teacher = None,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Folder of the cache, new or begun. Default: one in caches/.")
    ] = None,
    teacher_weights: TeacherWeights = None,
    views: Annotated[int | None, typer.Option(help="Views of each image. Default: one for every epoch.")] = None,
    per_image: PerImage = False,
    distill: Annotated[str, typer.Option(help="hard or soft.")] = "hard",
    arch: Annotated[str | None, typer.Option(help="The student; its recipe says how images are augmented.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The student's recipe. Default: what suits network and data.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the student's run. Default: the recipe's.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images in a batch, over all devices. Default: the recipe's.")
    ] = None,
    settings: Settings = None,
    ablate: Annotated[list[str] | None, typer.Option(metavar="NAME", help="As for train.")] = None,
    device: Device = "auto",
) -> None:
    """Ask a teacher once for every view that a student will see, and keep the answers for `train --cache`."""
    from deitfast.commands import run_teaching
    from deitfast.plan import TrainOptions

    options = TrainOptions(
        data, arch, recipe, distill, teacher, None, epochs, batch, tuple(settings or ()), ablate=tuple(ablate or ()),
        teacher_weights=teacher_weights, cache=str(out_) if out_ else None, per_image=per_image,
    )  # fmt: skip
    run_teaching(options, views, device, _display(), out)


@app.command("eval")
def eval_(
    run: Annotated[Path | None, typer.Argument(help="The run whose network to evaluate.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Evaluate a file of weights (DeiT, timm, Hugging Face, export) instead.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="The file's network. Default: as its shapes tell.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Converted data set. Default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    ema: Annotated[bool, typer.Option("--ema", help="Evaluate the averaged weights.")] = False,
    loader: Annotated[str, typer.Option(help="auto, resident, dali, cpu, ffcv or reference.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the reference loader's predictions on the same images.")
    ] = False,
    settings: Settings = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Also write the metrics and confusion matrices here.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Evaluate a trained network: every head's top-1, top-5, precision, recall, F1, AUC and confusion matrix."""
    from deitfast.commands import EvalOptions, run_evaluation

    options = EvalOptions(run, weights, arch, data, split, ema, loader, check, tuple(settings or ()), json_)
    run_evaluation(options, device, _display(), out)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run whose network to write.")],
    output: Annotated[Path, typer.Argument(help="FILE.safetensors, or a folder for weights and config.json.")],
    format_: Annotated[str, typer.Option("--format", help="timm.")] = "timm",
    ema: Annotated[bool, typer.Option("--ema", help="Write the averaged weights.")] = False,
) -> None:
    """Write a trained network for other programs: safetensors under timm's names."""
    from deitfast.commands import run_export

    run_export(run, output, format_, ema=ema, out=out)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this recipe, every field of it.")] = None) -> None:
    """List the built-in recipes and ablations, or show one recipe as TOML."""
    from deitfast import recipe
    from deitfast.tables import ablation_table

    if name:
        out.print(recipe.dump(recipe.load(name)), markup=False, highlight=False)
        return
    for each in recipe.names():
        out.print(f"[bold]{each}[/bold]")
        out.print(recipe.head(each), markup=False, highlight=False, style="dim")
    out.print(ablation_table())


@app.command()
def bench(
    part: Annotated[str, typer.Argument(help="all, loader, step or train (loader and step together).")] = "all",
    data: Data = None,
    arch: Annotated[str, typer.Option(help="Network of the step.")] = "deit_ti",
    batch: Annotated[int | None, typer.Option(help="Images in a batch. Default: the recipe's.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0.05, help="Least time of one measurement; each is made five times.")
    ] = 0.5,
    settings: Settings = None,
    try_: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="A.B=VALUE", help="Predict this change, then measure it; or data=FOLDER."),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also timm, FFCV and DALI, on the same files.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to look at here.")] = None,
    device: Device = "auto",
) -> None:
    """Measure every stage of training in images/s, say which one holds it back, and what would lift it."""
    from deitfast.bench.session import Wish
    from deitfast.commands import BenchOptions, run_bench

    wish = Wish(part, seconds, tries=tuple(try_ or ()), peers=peers, command=tuple(sys.argv))
    run_bench(BenchOptions(data, arch, batch, tuple(settings or ()), json_, html), wish, device, _display(), out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")],
    out_: Annotated[
        Path | None, typer.Option("--out", help="The page. Default: RUN/report.html; of several runs ./report.html.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="The tables as Markdown. Default: beside the page, .md for .html.")
    ] = None,
) -> None:
    """Show what runs have learned: one HTML page with curves, metrics, classes and sample images; a Markdown table."""
    from deitfast.commands import run_report

    _display()
    run_report(runs, out_, markdown, out)


@app.command()
def doctor() -> None:
    """Say what this machine has, and which loaders and devices will work."""
    from deitfast.doctor import examine

    out.print(examine())


def _display() -> Any:
    from deitfast.display import Display, start_logging

    quiet = os.environ.get("RANK", "0") != "0"
    start_logging(err, quiet=quiet)
    return Display(err, quiet=quiet)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    sys.exit(_run(arguments) if debug else _run_quietly(arguments))


def _run(arguments: list[str]) -> int:
    return int(app(arguments, standalone_mode=False) or 0)


def _run_quietly(arguments: list[str]) -> int:
    """Run without tracebacks: every error becomes a short message and an exit code."""
    try:
        code = _run(arguments)
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this code
            err.print("interrupted")
        return code
    except Failure as error:
        err.print(f"[red]error:[/red] {_escaped(error)}", highlight=False, soft_wrap=True)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        err.print("interrupted")
        return INTERRUPTED
    except ClickException as error:  # pyright: ignore[reportGeneralTypeIssues]
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit stays quiet
        return 1
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        err.print(f"[red]error:[/red] {_escaped(message)}", highlight=False, soft_wrap=True)
        err.print("  this should not happen; --debug shows where it did", highlight=False)
        return 1


def _escaped(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))
