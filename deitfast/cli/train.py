"""The commands that train: train, teach."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deitfast.cli.app import (
    DATA,
    DISTILLATION,
    MODEL,
    RUN,
    Ablate,
    AssumeOrder,
    Batch,
    Data,
    Device,
    Epochs,
    Loader,
    OptionalArch,
    PerImage,
    RecipeName,
    Settings,
    Teacher,
    TeacherWeights,
    Which,
    app,
    display,
    out,
)
from deitfast.cli.arguments import told_once
from deitfast.config.choices import DistillMode, MethodName

if TYPE_CHECKING:
    from deitfast.config.recipe import Recipe
    from deitfast.progress import Display
    from deitfast.runtime import Runtime


@app.command()
def train(
    data: Data = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            "--data-fraction",
            help="Share of the training images to use, the same of every class.",
            rich_help_panel=DATA,
        ),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out and count damaged images, instead of stopping.", rich_help_panel=DATA
        ),
    ] = False,
    loader: Loader = None,
    arch: OptionalArch = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from these weights, of the same shape: a run folder or a file (DeiT, timm, Hugging Face).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    finetune: Annotated[
        Path | None,
        typer.Option(help="Start from these weights at another size or with other classes.", rich_help_panel=MODEL),
    ] = None,
    which: Which = None,
    assume_class_order: AssumeOrder = False,
    distill: Annotated[
        DistillMode | None,
        typer.Option(help="Kind of distillation. Default: the recipe's.", rich_help_panel=DISTILLATION),
    ] = None,
    method: Annotated[
        MethodName | None,
        typer.Option(
            metavar="METHOD",
            help="A row of the DeiT paper's table 3, instead of --distill: no-, usual- or hard-distillation, "
            "class-embedding, distillation-embedding, class+distillation.",
            rich_help_panel=DISTILLATION,
        ),
    ] = None,
    teacher: Teacher = None,
    teacher_weights: TeacherWeights = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Teacher cache: a folder, or none. Default: one in caches/.", rich_help_panel=DISTILLATION),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cache this many views of each image and reuse them (approximates DeiT).",
            rich_help_panel=DISTILLATION,
        ),
    ] = None,
    per_image: PerImage = False,
    recipe: RecipeName = None,
    epochs: Epochs = None,
    batch: Batch = None,
    settings: Settings = None,
    ablate: Ablate = None,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Run folder. Default: a new one in runs/.", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from the last checkpoint of --out, else of the newest unfinished run of this recipe and data.",
            rich_help_panel=RUN,
        ),
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Also write TensorBoard event files, to RUN/tensorboard.", rich_help_panel=RUN
        ),
    ] = False,
    device: Device = "auto",
) -> None:
    """Train a model; on several GPUs or nodes with `torchrun ... -m deitfast train`."""
    from deitfast.cli.demo import make_demo_data
    from deitfast.cli.options import RecipeOptions, plan_training, say_recipe
    from deitfast.cli.tables import describe_run
    from deitfast.run_folder import RunFolder
    from deitfast.runtime import start
    from deitfast.train import trainer

    shown = display()
    options = RecipeOptions.of(
        recipe=recipe, method=method, ablate=ablate, settings=settings, views=views, per_image=per_image,
        loader=loader, arch=arch, weights=weights, finetune=finetune, distill=distill, teacher=teacher,
        teacher_weights=teacher_weights, cache=cache, epochs=epochs, batch=batch, fraction=fraction, skip_bad=skip_bad,
        which=which, assume_class_order=assume_class_order,
    )  # fmt: skip
    with told_once():
        plan = plan_training(
            options, data=data, out=out_, resume=resume, tensorboard=tensorboard, command=tuple(sys.argv)
        )
    say_recipe(plan)
    make_demo_data(plan.job.data, shown)
    with start(plan.job.recipe.train, device) as runtime:  # once: a process group that was left cannot be joined again
        _train_demo_teacher(plan.job.recipe, plan.job.data, runtime, shown)
        trainer.train(plan.job, runtime, shown)
        if runtime.is_main_process:
            out.print(describe_run(RunFolder(plan.job.out)))


@app.command()
def teach(
    data: Data = None,
    loader: Loader = None,
    arch: OptionalArch = None,
    which: Which = None,
    assume_class_order: AssumeOrder = False,
    distill: Annotated[
        DistillMode, typer.Option(help="Kind of targets: hard or soft.", rich_help_panel=DISTILLATION)
    ] = "hard",
    teacher: Teacher = None,
    teacher_weights: TeacherWeights = None,
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Cache folder, new or unfinished. Default: one in caches/.", rich_help_panel=DISTILLATION
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(min=1, help="Views of each image. Default: one for every epoch.", rich_help_panel=DISTILLATION),
    ] = None,
    per_image: PerImage = False,
    recipe: RecipeName = None,
    epochs: Epochs = None,
    batch: Batch = None,
    settings: Settings = None,
    ablate: Ablate = None,
    device: Device = "auto",
) -> None:
    """Compute a teacher's targets for every view that a student will see, and cache them for `train --cache`.

    The options describe the student's training, as for `train`: its recipe says how images are augmented.
    """
    from deitfast.cli.demo import make_demo_data
    from deitfast.cli.options import RecipeOptions, plan_teaching, say_recipe
    from deitfast.cli.tables import describe_cache
    from deitfast.distill import precompute
    from deitfast.runtime import start

    shown = display()
    options = RecipeOptions.of(
        recipe=recipe, ablate=ablate, settings=settings, per_image=per_image, loader=loader, arch=arch,
        distill=distill, teacher=teacher, teacher_weights=teacher_weights, cache=str(out_) if out_ else None,
        epochs=epochs, batch=batch, which=which, assume_class_order=assume_class_order,
    )  # fmt: skip
    with told_once():
        plan = plan_teaching(options, views=views, data=data)
    say_recipe(plan)
    make_demo_data(plan.job.data, shown)
    with start(plan.job.recipe.train, device) as runtime:
        _train_demo_teacher(plan.job.recipe, plan.job.data, runtime, shown)
        cache = precompute.teach(plan.job, runtime, shown)
        if runtime.is_main_process:
            out.print(describe_cache(cache))


def _train_demo_teacher(recipe: "Recipe", data: Path, runtime: "Runtime", shown: "Display") -> None:
    """Train the demo set's own teacher first, where the recipe names it and it is not trained yet."""
    from deitfast.cli.demo import demo_teacher_job, uses_demo_teacher
    from deitfast.train import trainer

    if uses_demo_teacher(recipe) and (job := runtime.broadcast_from_rank0(demo_teacher_job(data))):
        trainer.train(job, runtime.with_precision(job.recipe.train), shown)
