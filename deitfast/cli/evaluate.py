"""The commands that use a trained model: eval, predict, export."""

from pathlib import Path
from typing import Annotated

import typer

from deitfast.cli.app import DATA, MODEL, OUTPUT, RUN, AssumeOrder, Device, Loader, Settings, Which, app, display, out
from deitfast.config.choices import Arch

Ema = Annotated[
    bool, typer.Option("--ema", help="Take the averaged weights (EMA) of the last checkpoint.", rich_help_panel=MODEL)
]
FileArch = Annotated[
    Arch | None,
    typer.Option(
        "--arch", metavar="ARCH", help="Architecture of a weights file. Default: told by its shapes.",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Split = Annotated[str, typer.Option("--split", help="Split of the data set.", rich_help_panel=DATA)]


@app.command("eval")
def eval_(
    run: Annotated[Path | None, typer.Argument(help="Run folder whose model to evaluate.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Converted data set. Default: the one of the run.", rich_help_panel=DATA),
    ] = None,
    split: Split = "val",
    loader: Loader = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Evaluate a weights file (DeiT, timm, Hugging Face, export) instead of a run.", rich_help_panel=MODEL
        ),
    ] = None,
    arch: FileArch = None,
    which: Which = None,
    ema: Ema = False,
    assume_class_order: AssumeOrder = False,
    settings: Settings = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Also compare with the reference loader's predictions on these images.", rich_help_panel=RUN
        ),
    ] = False,
    json_: Annotated[
        Path | None,
        typer.Option("--json", help="Write metrics and confusion matrices to this file.", rich_help_panel=OUTPUT),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="Write every image's name, label, prediction and probability to this CSV file.", rich_help_panel=OUTPUT
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Evaluate a trained model: for every head top-1, top-5, precision, recall, F1, AUC and the confusion matrix.

    A model with more classes than the data set is evaluated on the data set's, matched by name.
    """
    from deitfast.cli.evaluation import EvalOptions, run_evaluation

    options = EvalOptions(
        run=run, weights=weights, arch=arch, data=data, split=split, which=which or "auto", ema=ema,
        assume_class_order=assume_class_order, loader=loader or "auto", check=check, settings=tuple(settings or ()),
        json_file=json_, predictions_file=predictions,
    )  # fmt: skip
    run_evaluation(options, device, display(), out)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder whose model to export, or weights of any kind.")],
    output: Annotated[
        Path, typer.Argument(help="FILE.safetensors, FILE.onnx, or a folder for weights and config.json.")
    ],
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="timm, torchvision (CNNs), hf or onnx. Default: what fits OUTPUT.", rich_help_panel=OUTPUT
        ),
    ] = "",
    which: Which = None,
    ema: Ema = False,
) -> None:
    """Write a trained model for other programs: timm, torchvision, Hugging Face's transformers, or ONNX."""
    from deitfast.cli.evaluation import run_export

    display()
    run_export(run, output, format_, which=which or "auto", ema=ema, out=out)


@app.command()
def predict(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_WEIGHTS", help="Run folder, or weights as for eval --weights.")
    ],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Files, folders, - for a list from stdin; or a converted data set."),
    ],
    split: Split = "val",
    loader: Loader = None,
    arch: FileArch = None,
    which: Which = None,
    ema: Ema = False,
    settings: Settings = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes per image.", rich_help_panel=OUTPUT)] = 5,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Write a line per image, head and rank to this file.", rich_help_panel=OUTPUT),
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", help="Write every head's best classes to this file.", rich_help_panel=OUTPUT),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with thumbnails to this file.", rich_help_panel=OUTPUT)
    ] = None,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="Show on the page what the class and distillation tokens attend to.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    device: Device = "auto",
) -> None:
    """Classify images: the most probable classes of every head."""
    from deitfast.cli.prediction import PredictOptions, run_predict

    options = PredictOptions(
        source=source, images=tuple(images), split=split, arch=arch, which=which or "auto", ema=ema, top=top,
        loader=loader or "auto", settings=tuple(settings or ()), csv_file=csv, json_file=json_, html_file=html,
        attention=attention,
    )  # fmt: skip
    run_predict(options, device, display(), out)
