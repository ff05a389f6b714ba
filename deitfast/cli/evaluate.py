"""The commands that use a trained network: eval, export."""

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
    device: Device = "auto",
) -> None:
    """Evaluate a trained network: every head's top-1, top-5, precision, recall, F1, AUC and confusion matrix.

    A network with more classes than the data set is evaluated on the data set's, matched by name.
    """
    from deitfast.cli.evaluate_impl import EvalOptions, run_evaluation

    options = EvalOptions(
        run=run, weights=weights, arch=arch, data=data, split=split, which=which or "auto", ema=ema,
        assume_class_order=assume_class_order, loader=loader, check=check, settings=tuple(settings or ()),
        json_file=json_,
    )  # fmt: skip
    run_evaluation(options, device, display(), out)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run whose network to write.")],
    output: Annotated[
        Path, typer.Argument(help="FILE.safetensors, FILE.onnx, or a folder for weights and config.json.")
    ],
    format_: Annotated[str, typer.Option("--format", help="timm or onnx; default: as OUTPUT ends.")] = "",
    which: Which = None,
    ema: Annotated[bool, typer.Option("--ema", help="Write the averaged weights of the last checkpoint.")] = False,
) -> None:
    """Write a trained network for other programs: safetensors under timm's names, or ONNX."""
    from deitfast.cli.evaluate_impl import run_export

    display()
    run_export(run, output, format_, which=which or "auto", ema=ema, out=out)
