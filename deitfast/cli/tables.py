"""Tables on the terminal: metrics, ablations, and what `info` and `doctor` show."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from deitfast.config.ablations import ABLATIONS, BASE
from deitfast.config.methods import METHODS
from deitfast.distill.cache import TeacherCache
from deitfast.environment import environment
from deitfast.eval.evaluate import Agreement
from deitfast.eval.metrics import Metrics
from deitfast.progress import duration, volume
from deitfast.run_folder import RunFolder, read_rows
from pipelines.errors import pluralize
from pipelines.spec import DatasetSpec

if TYPE_CHECKING:
    import torch

COLUMNS = ("top1", "top5", "precision", "recall", "f1", "auc", "loss")
MB = 1_000_000
CONFUSION_CLASSES = 20
"""Most classes for which the confusion matrix is printed."""


def metrics_table(title: str, heads: Mapping[str, Mapping[str, float]]) -> Table:
    """Return one row a head; precision, recall and F1 are macro averages, AUC one against the rest."""
    table = Table(title=title, title_justify="left")
    table.add_column("head")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for head, summary in heads.items():
        cells = []
        for name in COLUMNS:
            value = summary.get(name)
            shares = name in ("top1", "top5")
            cells.append("-" if value is None else f"{value:.2%}" if shares else f"{value:.3f}")
        table.add_row(head, *cells)
    return table


def ablation_table() -> Table:
    """Return the rows that `train --ablate` takes, with what they change and the paper's figures beside each."""
    title = "--ablate NAME (the paper's top-1 of DeiT-B on ImageNet-1k in per cent; deitfast has measured none)"
    table = Table(title=title, title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("changes", overflow="fold")
    for column in ("224 px", "384 px"):
        table.add_column(column, justify="right")
    table.add_column("note", overflow="fold")
    table.add_row("", "the recipe as it is", *map(str, BASE), "")
    for row in ABLATIONS:
        table.add_row(
            row.name,
            "\n".join(f"{field}={value}" for field, value in row.changes.items()),
            *map(str, row.paper),
            row.note,
        )
    return table


def method_table() -> Table:
    """Return the rows that `train --method` takes, with what they change and the paper's figures beside each."""
    title = "--method NAME (the paper's top-1 on ImageNet-1k in per cent; deitfast has measured none)"
    table = Table(title=title, title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("changes", overflow="fold")
    for column in ("Ti", "S", "B", "B, 384 px"):
        table.add_column(column, justify="right")
    table.add_column("note", overflow="fold")
    for row in METHODS:
        changes = "\n".join(f"{field}={value}" for field, value in row.changes.items())
        table.add_row(row.name, changes, *map(str, row.paper), row.note)
    return table


def agreement_table(loader: str, found: Agreement) -> Table:
    """Return how far a loader's predictions are from the reference loader's."""
    table = Table(title=f"{loader} loader against the reference loader", title_justify="left", show_header=False)
    table.add_row("top-1", f"{found.top1:+.2%}")
    table.add_row("changed predictions", f"{found.changed:,} of {found.images:,} ({found.changed / found.images:.2%})")
    table.add_row("largest difference of a logit", f"{found.logits:.5f}")
    if found.changed:
        table.add_row("largest lead of a changed prediction", f"{found.margin:.5f}")
    return table


def confusion_table(metrics: Metrics, classes: tuple[str, ...]) -> Table:
    """Return the confusion matrix: a row a true class, a column a predicted one."""
    table = Table(title="confusion matrix (rows: truth, columns: prediction)", title_justify="left")
    table.add_column("")
    for number in range(len(classes)):
        table.add_column(str(number), justify="right")
    for number, (name, row) in enumerate(zip(classes, metrics.confusion.tolist(), strict=True)):
        table.add_row(f"{number} {name}", *(str(count) if count else "." for count in row))
    return table


def describe_run(folder: RunFolder) -> RenderableType:
    """Return what `deitfast info` shows of a run: what it was made of, and its last epoch's figures."""
    recipe, info = folder.recipe(), folder.info()
    rows, damage = read_rows(folder.path / "metrics.jsonl")
    table = Table(title=f"{folder.path}: {recipe.model.arch}", title_justify="left", show_header=False)
    distill = recipe.distill
    asked = f"{distill.mode}, {distill.targets} targets, from {distill.teacher or 'the cache'}"
    teacher = f"{asked}, cache {distill.cache}"
    facts: dict[str, Any] = {
        "recipe": f"{recipe.name}, digest {recipe.digest}",
        "data": f"{info.data} ({info.dataset}, {pluralize(len(info.classes), 'class')})",
        "distillation": teacher if distill.mode != "none" else "none",
        "started from": f"{info.start['file']} ({info.start['fitted']})" if info.start else "drawn weights",
        "epochs": f"{len(rows)} of {recipe.train.epochs}",
    }
    if rows:
        facts["training time"] = duration(sum(row.get("seconds", 0.0) for row in rows))
        facts["loss"] = f"{rows[-1]['loss']:.4f}"
    if damage:
        facts["damaged"] = damage
    for key, value in facts.items():
        table.add_row(key, str(value))
    evaluated = next((row for row in reversed(rows) if "val" in row), None)
    if evaluated is None:
        return table
    titles = {"val": "validation", "val_ema": "validation, averaged weights"}
    shown = [
        metrics_table(f"{titles[key]}, epoch {evaluated['epoch']}", evaluated[key])
        for key in titles
        if key in evaluated
    ]
    return Group(table, *shown)


def describe_cache(cache: TeacherCache) -> RenderableType:
    """Return what `deitfast info` shows of a teacher cache: what is in it, and what it depends on."""
    manifest = cache.manifest
    table = Table(title=f"{cache.folder}: teacher cache", title_justify="left", show_header=False)
    there, total = cache.count(), manifest.total
    spec = manifest.targets
    kept = "labels" if spec.kind == "hard" else f"{spec.k} largest logits, {spec.dtype}, and log-sum-exp"
    facts = {
        "targets": f"{spec.kind}: {kept}",
        "views": f"{manifest.views:,} of each of {manifest.samples:,} images",
        "complete": "yes" if cache.complete else f"no, {there:,} of {total:,} ({there / total:.1%})",
        "size": volume(manifest.bytes) + ("" if cache.complete else " when complete"),
        **{name: str(value) for name, value in manifest.identity.items() if "." not in name},
        **{part: _fields(manifest.identity, part) for part in ("teacher", "augment")},
        "made with": ", ".join(f"{name} {value}" for name, value in manifest.made_with.items()),
    }
    for key, value in facts.items():
        table.add_row(key, value)
    return table


def _fields(identity: Mapping[str, Any], part: str) -> str:
    """Return the fields of one part of a cache's identity in a line."""
    own = {name: value for name, value in identity.items() if name.startswith(f"{part}.")}
    return ", ".join(f"{name.removeprefix(f'{part}.')} {value}" for name, value in own.items())


def describe_dataset(spec: DatasetSpec, folder: Path) -> RenderableType:
    """Return what `deitfast info` shows of a data set."""
    table = Table(title=f"{folder}: {spec.name}, {pluralize(len(spec.classes), 'class')}", title_justify="left")
    table.add_column("split")
    table.add_column("stored in")
    for column in ("images", "of a class", "MB"):
        table.add_column(column, justify="right")
    table.add_column("how they were stored")
    for name, split in spec.splits.items():
        low, high = min(split.counts), max(split.counts)
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        stored = ", ".join(f"{count:,} {kind}" for kind, count in split.converted.items() if count)
        table.add_row(name, split.file, f"{split.samples:,}", each, f"{split.size / MB:,.1f}", stored)
    shown = ", ".join(spec.classes[:10]) + (", ..." if len(spec.classes) > 10 else "")
    return Group(table, f"classes: {shown}", f"source: {spec.source}", f"fingerprint: {spec.fingerprint}")


def describe_machine() -> Table:
    """Return what `deitfast doctor` shows: processor, memory, disk, devices, loaders and libraries."""
    import torch

    from deitfast.runtime.device import unusable_gpu
    from pipelines.batch.place import kernels_missing
    from pipelines.loaders.factory import available, cpu_codec, free_memory

    table = Table(title="deitfast doctor", title_justify="left", show_header=False)
    found = environment()
    table.add_row("deitfast", f"{found['deitfast']}, Python {found['python']}, {found['system']}")
    table.add_row("processor", f"{found['processor']}, {found['cores']} cores for this process")
    table.add_row("memory", f"{free_memory(torch.device('cpu')) / 1e9:.1f} GB free")
    table.add_row("disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free here, {os.getcwd()}")
    for index, name in enumerate(found["devices"]):
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        table.add_row(f"cuda:{index}", f"{name}, {memory:.0f} GB, {_precision(device)}")
        if missing := kernels_missing(device):
            table.add_row("", f"not compiled, and without kernels: {missing}")
    if not found["devices"] and (unusable := unusable_gpu()):
        table.add_row("cuda", f"a GPU that PyTorch cannot use: needs {unusable[0]}; found {unusable[1]}")
    elif not found["devices"]:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        table.add_row("cuda", f"no device (PyTorch is built {built})")
    table.add_row("cpu", _precision(torch.device("cpu")))
    for name, reason in available().items():
        works = f"works: {cpu_codec()}" if name == "cpu" else "works"
        table.add_row(f"loader {name}", f"no: {reason}" if reason else works)
    versions = (f"{name} {version or 'not installed'}" for name, version in found["libraries"].items())
    table.add_row("libraries", ", ".join(versions))
    return table


def _precision(device: "torch.device") -> str:
    """Describe what train.amp=auto, train.compile=auto and train.kernels=auto mean on a device."""
    from deitfast.runtime import choose_amp, choose_compile
    from pipelines.augment.chain import kernels_run

    amp = choose_amp("auto", device)
    name = str(amp).removeprefix("torch.") if amp else "float32"
    compiled = "compiled" if choose_compile("auto", device) else "not compiled"
    return f"trains in {name}, {compiled}, augments in {'kernels' if kernels_run('auto', device) else 'batched torch'}"
