"""The commands that use a trained network: eval, predict, export."""

from pathlib import Path
from typing import Annotated

import typer

from deitfast.cli.app import AssumeOrder, Device, Settings, Which, app, display, out


@app.command("eval")
def eval_(
    run: Annotated[Path | None, typer.Argument(help="The run whose network to evaluate.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Evaluate a file of weights (DeiT, timm, Hugging Face, export) instead.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="The file's network. Default: what its shapes say.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Converted data set. Default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    which: Which = None,
    ema: Annotated[bool, typer.Option("--ema", help="Evaluate the averaged weights of the last checkpoint.")] = False,
    assume_class_order: AssumeOrder = False,
    loader: Annotated[str, typer.Option(help="auto, resident, dali, cpu, ffcv or reference.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the reference loader's predictions on the same images.")
    ] = False,
    settings: Settings = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Also write the metrics and confusion matrices here.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Also write every image's name, truth, prediction and probability here (CSV).")
    ] = None,
    device: Device = "auto",
) -> None:
    """Evaluate a trained network: every head's top-1, top-5, precision, recall, F1, AUC and confusion matrix.

    A network with more classes than the data set is evaluated on the data set's, matched by name.
    """
    from deitfast.cli.evaluate_impl import EvalOptions, run_evaluation

    options = EvalOptions(
        run=run, weights=weights, arch=arch, data=data, split=split, which=which or "auto", ema=ema,
        assume_class_order=assume_class_order, loader=loader, check=check, settings=tuple(settings or ()),
        json_file=json_, predictions_file=predictions,
    )  # fmt: skip
    run_evaluation(options, device, display(), out)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run whose network to write, or weights of any kind.")],
    output: Annotated[
        Path, typer.Argument(help="FILE.safetensors, FILE.onnx, or a folder for weights and config.json.")
    ],
    format_: Annotated[
        str,
        typer.Option("--format", help="timm, torchvision (CNNs), hf or onnx. Default: what fits."),
    ] = "",
    which: Which = None,
    ema: Annotated[bool, typer.Option("--ema", help="Write the averaged weights of the last checkpoint.")] = False,
) -> None:
    """Write a trained network for other programs: timm, torchvision, Hugging Face's transformers, or ONNX."""
    from deitfast.cli.evaluate_impl import run_export

    display()
    run_export(run, output, format_, which=which or "auto", ema=ema, out=out)


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_WEIGHTS", help="A run, or weights as for eval --weights.")],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Files, folders, - for a list from stdin; or a data set."),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes of each image.")] = 5,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a line for every image, head and rank here.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write every head's best classes here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with thumbnails here.")] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="Draw on the page what the class and distillation tokens look at.")
    ] = False,
    which: Which = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the averaged weights of the last checkpoint.")] = False,
    arch: Annotated[str | None, typer.Option(help="The file's network. Default: what its shapes say.")] = None,
    loader: Annotated[str, typer.Option(help="auto, resident, dali, cpu, ffcv or reference.")] = "auto",
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Say what is on images: the most probable classes of every head."""
    from deitfast.cli.predict_impl import PredictOptions, run_predict

    options = PredictOptions(
        source=source, images=tuple(images), split=split, arch=arch, which=which or "auto", ema=ema, top=top,
        loader=loader, settings=tuple(settings or ()), csv_file=csv, json_file=json_, html_file=html,
        attention=attention,
    )  # fmt: skip
    run_predict(options, device, display(), out)
