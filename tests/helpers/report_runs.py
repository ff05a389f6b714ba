"""Runs' folders made up for reports, and their page."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.report.write import write_report


def fake(
    folder: Path, *settings: str, top1: float = 0.5, classes: tuple[str, ...] = ("a", "b"), data: str = "x"
) -> Path:
    """Write a run's folder as training would, without training: two epochs, one head, `top1` at the end."""
    folder.mkdir(parents=True)
    recipe = recipes.override(Recipe(), recipes.parse_settings(["model.arch=vit_ti", "train.epochs=2", *settings]))
    (folder / "recipe.toml").write_text(recipes.dump(recipe))
    about = {"data": "nowhere", "dataset": data, "fingerprint": data, "classes": classes, "command": [], "start": {}}
    (folder / "run.json").write_text(json.dumps(about))
    rows = []
    for epoch in (1, 2):
        figures = {"samples": 10, "top1": top1 * epoch / 2, "top5": 1.0, "loss": 1.0}
        row = {"epoch": epoch, "loss": 2.0 / epoch, "images": 100, "seconds": 10.0, "waited_seconds": 1.0}
        rows.append({**row, "lr": 0.1, "images_per_second": 10.0, "val": {"class": figures}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    confusion = (5 * np.eye(len(classes), dtype=int) + np.eye(len(classes), k=1, dtype=int)).tolist()
    evaluation = {"epoch": 2, "classes": classes, "val": {"class": {"top1": top1, "confusion": confusion}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "environment.json").write_text("{}")
    (folder / "checkpoint.pt").write_bytes(b"")
    return folder


def page_of(*folders: Path) -> str:
    """Return the page of some runs; the Markdown file stands beside it."""
    out = folders[0].parent / "page.html"
    write_report(list(folders), out, out.with_suffix(".md"))
    return out.read_text()


class Outline(HTMLParser):
    """Elements that are open, what is loaded from elsewhere, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("data:", "#")):
                self.outside.append(f"{tag} {name} {value}")
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
