"""The model card, README.md, of an exported folder: what the network is, learned from and reaches; how to load it."""

import json
from typing import Any

from deitfast.environment import __version__
from deitfast.run_folder import RunFolder
from deitfast.weights.load import TrainedModel, describe_augment
from pipelines.errors import pluralize

LIBRARIES = {"hf": "transformers", "timm": "timm", "torchvision": "pytorch"}
"""What Hugging Face's hub calls the library that loads a format."""
LOADING = {
    "hf": """from transformers import pipeline
pipeline("image-classification", "FOLDER")("image.jpg")""",
    "timm": """import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    "torchvision": """# the tensors have torchvision's names; from the command line:
# deitfast eval --weights FOLDER --data DATA""",
}
METRICS = {"top1": "top-1", "top5": "top-5", "f1": "macro F1", "loss": "cross-entropy"}


def model_card(trained: TrainedModel, form: str) -> str:
    """Return the card of a network in a format of `export.FORMATS`."""
    recipe, run = trained.recipe, RunFolder(trained.source)
    facts = {
        "Network": f"{recipe.model.arch}, {_millions(trained)}M parameters, {pluralize(trained.num_classes, 'class')}",
        "Input": describe_augment(recipe.augment),
        "Weights": f"{trained.weights} of epoch {trained.epoch}" if trained.epoch else f"from {trained.source.name}",
    }
    if run.exists():
        info = run.info()
        distill, train = recipe.distill, recipe.train
        taught = f"{distill.mode}, from {distill.teacher or 'a cache'}"
        facts |= {
            "Data": f"{info.dataset}, {pluralize(len(info.classes), 'class')}, fingerprint {info.fingerprint}",
            "Recipe": f"{recipe.name}, digest {recipe.digest}: {pluralize(train.epochs, 'epoch')}, batch {train.batch}",
            "Distillation": "none" if distill.mode == "none" else taught,
            "Command": f"`{' '.join(info.command)}`",
        }
    head = ["---", f"library_name: {LIBRARIES[form]}", "pipeline_tag: image-classification", "tags: [deitfast]", "---"]
    lines = [*head, "", f"# {recipe.model.arch}", "", f"Trained with deitfast {__version__}.", ""]
    lines += [f"- **{name}**: {value}" for name, value in facts.items()]
    if table := _metrics(trained, run):
        lines += ["", "## Validation", "", *table]
    lines += ["", "## Load it", "", "```python", LOADING[form], "```"]
    if trained.classes:
        some = ", ".join(trained.classes[:10])
        lines += ["", "## Classes", "", some + (", ..." if len(trained.classes) > 10 else "")]
    return "\n".join(lines) + "\n"


def _millions(trained: TrainedModel) -> str:
    return f"{sum(parameter.numel() for parameter in trained.model.parameters()) / 1e6:.1f}"


def _metrics(trained: TrainedModel, run: RunFolder) -> list[str]:
    """Return a Markdown table of the heads' metrics in the epoch of these weights; empty where there are none."""
    if not run.exists():
        return []
    rows: list[dict[str, Any]] = [row for row in run.metrics() if row["epoch"] == trained.epoch]
    heads = rows[-1].get("val_ema" if "averaged" in trained.weights else "val") if rows else None
    if not isinstance(heads, dict):
        return []
    lines = ["| head | " + " | ".join(METRICS.values()) + " |", "|---|" + "---|" * len(METRICS)]
    for head, summary in heads.items():
        cells = [_cell(name, summary.get(name)) for name in METRICS]
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return lines


def _cell(name: str, value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.2%}" if name.startswith("top") else f"{value:.4f}"


def sidecar_json(tree: dict[str, Any]) -> str:
    """Return a configuration as a file's text."""
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
