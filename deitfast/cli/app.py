"""What all commands share: the app, the consoles, the options that several have, their completion."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from deitfast.config.choices import Arch
from deitfast.environment import __version__
from pipelines.choices import LoaderName
from pipelines.workers import rank

if TYPE_CHECKING:
    from deitfast.progress import Display

app = typer.Typer(
    name="deitfast",
    help="Train DeiT from a data pipeline that keeps up with the GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(markup=False)  # [brackets] in the names of classes and folders are no markup
err = Console(stderr=True)

DATA, MODEL, DISTILLATION, OPTIMIZATION, RUN = "Data", "Model", "Distillation", "Optimization", "Run"
OUTPUT, MEASURING, PREDICTION = "Output", "Measuring", "Prediction"
"""Panels of a command's `--help`."""
COMMANDS = {
    "Data": ("convert", "info", "verify"),
    "Training": ("train", "teach", "study"),
    "Trained models": ("eval", "predict", "report", "export"),
    "Speed": ("bench",),
    "Help": ("recipes", "doctor", "docs"),
}
"""Panels of `deitfast --help`, in order."""

ARCHITECTURES = "deit_* or vit_* with ti, s or b; resnet18, resnet20, resnet50; regnet_y_* with 4gf, 8gf or 16gf."


def complete_recipe(incomplete: str) -> Iterable[str]:
    """Return the built-in recipes that begin so."""
    from deitfast.config.builtin import names

    return (name for name in names() if name.startswith(incomplete))


def complete_ablation(incomplete: str) -> Iterable[str]:
    """Return the ablations that begin so."""
    from deitfast.config import ablations

    return (name for name in ablations.names() if name.startswith(incomplete))


def complete_study(incomplete: str) -> Iterable[str]:
    """Return the built-in studies that begin so."""
    from deitfast.config.builtin import study_names

    return (name for name in study_names() if name.startswith(incomplete))


def complete_device(incomplete: str) -> Iterable[str]:
    """Return the devices that begin so."""
    return (name for name in ("auto", "cpu", "cuda", "cuda:0") if name.startswith(incomplete))


def complete_setting(incomplete: str) -> Iterable[str]:
    """Return the recipe's fields that begin so, each with its equals sign."""
    from deitfast.config.recipe import Recipe, flatten

    return (f"{name}=" for name in flatten(Recipe()) if name.startswith(incomplete))


Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Converted data set. Default: $DEITFAST_DATA, else the built-in demo set.", rich_help_panel=DATA
    ),
]
Loader = Annotated[
    LoaderName | None,
    typer.Option("--loader", help="Loader of the images. Default: the fastest that works here.", rich_help_panel=DATA),
]
OptionalArch = Annotated[
    Arch | None,
    typer.Option("--arch", metavar="ARCH", help=f"{ARCHITECTURES} Default: deit_ti.", rich_help_panel=MODEL),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A built-in recipe or a TOML file. Default: the one that suits architecture and data.",
        autocompletion=complete_recipe,
        rich_help_panel=OPTIMIZATION,
    ),
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", help="Number of epochs. Default: the recipe's.", rich_help_panel=OPTIMIZATION)
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        help="Global batch size, over all devices. Default: the recipe's, or what fits the data.",
        rich_help_panel=OPTIMIZATION,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", autocompletion=complete_device, rich_help_panel=RUN),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        help="Run folder, weights file, torchvision model (such as regnet_y_16gf) or timm/NAME.",
        rich_help_panel=DISTILLATION,
    ),
]
TeacherWeights = Annotated[
    Path | None,
    typer.Option(
        "--teacher-weights",
        help="Weights file of a torchvision or timm teacher, where they cannot be downloaded.",
        rich_help_panel=DISTILLATION,
    ),
]
PerImage = Annotated[
    bool,
    typer.Option(
        "--per-image",
        help="One target per image, mixed like its label, instead of one per view (not DeiT).",
        rich_help_panel=DISTILLATION,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field of the recipe, such as optim.lr=1e-3; repeatable.",
        autocompletion=complete_setting,
        rich_help_panel=OPTIMIZATION,
    ),
]
Ablate = Annotated[
    list[str] | None,
    typer.Option(
        "--ablate",
        metavar="NAME",
        help="A row of the paper's ablation table (see `deitfast recipes`); repeatable.",
        autocompletion=complete_ablation,
        rich_help_panel=OPTIMIZATION,
    ),
]

Which = Annotated[
    Literal["best", "last"] | None,
    typer.Option(
        "--which",
        help="Checkpoint of a run: of the best validation top-1, or the last. Default: best, if there is one.",
        rich_help_panel=MODEL,
    ),
]
AssumeOrder = Annotated[
    bool,
    typer.Option(
        "--assume-class-order",
        help="Weights without class names have the data set's classes, in its order.",
        rich_help_panel=MODEL,
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (global option).")] = False,
) -> None:
    """Train DeiT from a data pipeline that keeps up with the GPU."""
    if version:
        out.print(f"deitfast {__version__}")
        raise typer.Exit


def sort_commands() -> None:
    """Put the commands into their panels; to be called when all are there. A command without a place is an error."""
    panels = {name: panel for panel, names in COMMANDS.items() for name in names}
    order = list(panels)
    for command in app.registered_commands:
        command.name = command.name or getattr(command.callback, "__name__", "")
        command.rich_help_panel = panels[command.name]
    app.registered_commands.sort(key=lambda command: order.index(command.name or ""))


def display() -> "Display":
    """Return where progress is shown, and send messages there as well; ranks other than 0 show nothing."""
    from deitfast.progress import Display, start_logging

    quiet = rank() != 0
    start_logging(err, quiet=quiet)
    return Display(err, quiet=quiet)
