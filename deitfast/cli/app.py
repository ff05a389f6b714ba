"""What all commands share: the app, the consoles, the options that several have."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from deitfast import __version__

app = typer.Typer(
    name="deitfast",
    help="Train DeiT from a data pipeline that keeps up with the GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(markup=False)  # [brackets] in the names of classes and folders are no markup
err = Console(stderr=True)

Data = Annotated[
    Path | None, typer.Option("--data", help="Converted data set. Default: $DEITFAST_DATA, else the demo set.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher", help="A run, a file of weights, a network of torchvision's (regnet_y_16gf) or timm/NAME."
    ),
]
TeacherWeights = Annotated[
    Path | None,
    typer.Option("--teacher-weights", help="That network's weights as a file, where they cannot be fetched."),
]
PerImage = Annotated[
    bool, typer.Option("--per-image", help="One target per image, mixed like labels, not one per view (not DeiT).")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Set a field of the recipe; may be given again.")
]
Which = Annotated[
    Literal["best", "last"] | None,
    typer.Option(help="Of a run, the checkpoint of the best validation top-1 or the last. Default: best, if there is."),
]
AssumeOrder = Annotated[
    bool,
    typer.Option("--assume-class-order", help="Take outputs whose classes are not known for the data set's, in order."),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """Train DeiT from a data pipeline that keeps up with the GPU."""
    if version:
        out.print(f"deitfast {__version__}")
        raise typer.Exit


def display() -> Any:
    """Return where progress is shown, and send messages there as well; ranks other than 0 show nothing."""
    from deitfast.progress import Display, start_logging

    quiet = os.environ.get("RANK", "0") != "0"
    start_logging(err, quiet=quiet)
    return Display(err, quiet=quiet)
