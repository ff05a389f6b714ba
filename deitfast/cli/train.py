"""The commands around training: train, teach, recipes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deitfast.cli.app import (
    AssumeOrder,
    Data,
    Device,
    PerImage,
    Settings,
    Teacher,
    TeacherWeights,
    Which,
    app,
    display,
    out,
)  # fmt: skip
from deitfast.config import ablations


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
        typer.Option(help="Folder that keeps the teacher's answers; or none. Default: one in caches/."),
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="Use this many views of each image, again and again (not exactly DeiT).")
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
    which: Which = None,
    assume_class_order: AssumeOrder = False,
    device: Device = "auto",
) -> None:
    """Train a network; several GPUs or nodes with `torchrun ... -m deitfast train`."""
    from deitfast.cli.commands import run_training
    from deitfast.cli.options import TrainOptions

    options = TrainOptions(
        data, arch, recipe, distill, teacher, out_, epochs, batch, tuple(settings or ()), resume, tuple(sys.argv),
        weights=weights, finetune=finetune, ablate=tuple(ablate or ()), teacher_weights=teacher_weights, cache=cache,
        views=views, per_image=per_image, skip_bad=skip_bad, fraction=fraction, tensorboard=tensorboard,
        which=which, assume_class_order=assume_class_order,
    )  # fmt: skip
    run_training(options, device, display(), out)


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
    which: Which = None,
    assume_class_order: AssumeOrder = False,
    device: Device = "auto",
) -> None:
    """Ask a teacher once for every view that a student will see, and keep the answers for `train --cache`."""
    from deitfast.cli.commands import run_teaching
    from deitfast.cli.options import TrainOptions

    options = TrainOptions(
        data, arch, recipe, distill, teacher, None, epochs, batch, tuple(settings or ()), ablate=tuple(ablate or ()),
        teacher_weights=teacher_weights, cache=str(out_) if out_ else None, per_image=per_image,
        which=which, assume_class_order=assume_class_order,
    )  # fmt: skip
    run_teaching(options, views, device, display(), out)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this recipe, every field of it.")] = None) -> None:
    """List the built-in recipes and ablations, or show one recipe as TOML."""
    from deitfast.cli.tables import ablation_table
    from deitfast.config import recipe

    if name:
        out.print(recipe.dump(recipe.load(name)), highlight=False)
        return
    for each in recipe.names():
        out.print(each, style="bold")
        out.print(recipe.head(each), highlight=False, style="dim")
    out.print(ablation_table())
