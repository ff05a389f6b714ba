"""One HTML file: no network, no script; style, figures and pictures inside."""

from importlib import resources

from deitfast import __version__
from deitfast.report import sections, summary
from deitfast.report.compare import remarks
from deitfast.report.markup import Html, tag
from deitfast.report.read import RunRecord
from deitfast.report.samples import Sample
from deitfast.report.sections import text_table

Pictures = tuple[list[Sample], str]
"""A run's training images, and a sentence on what is missing of them."""


def page(runs: list[RunRecord], pictures: list[Pictures]) -> str:
    """Return the whole file.

    Args:
        runs: at least one.
        pictures: of each run.
    """
    title = summary.title(runs)
    style = (resources.files("deitfast") / "report" / "style.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(style)),
    )
    several = "several" if len(runs) > 1 else None
    body = tag("body", _header(title, runs), tag("main", *_main(runs, pictures)), _footer(), class_=several)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(title: str, runs: list[RunRecord]) -> Html:
    parts = [tag("h1", title)]
    if len(runs) == 1:
        figures = [tag("div", tag("dt", name), tag("dd", value)) for value, name in summary.key_figures(runs[0])]
        parts += [tag("p", summary.lead(runs[0]), class_="soft"), tag("dl", *figures, class_="figures")]
    if said := remarks(runs):
        parts.append(tag("div", tag("ul", *(tag("li", remark) for remark in said)), class_="notes"))
    return tag("header", *parts)


def _main(runs: list[RunRecord], pictures: list[Pictures]) -> list[Html]:
    """A single run's parts follow each other; of several runs, what is each one's own can be opened."""
    heads = tag("section", tag("h2", "Every head"), text_table(summary.heads_table(runs)), _meaning(runs))
    if len(runs) == 1:
        return [
            heads,
            sections.curves(runs),
            tag("section", tag("h2", "Classes"), sections.classes(runs[0])),
            tag("section", tag("h2", "What the network sees"), sections.samples(runs[0], *pictures[0])),
            tag("section", tag("h2", "The run"), _made(runs[0])),
        ]
    runs_table = text_table(summary.runs_table(runs), chips=True)
    return [
        tag("section", tag("h2", "The runs"), runs_table),
        sections.curves(runs),
        sections.comparison(runs),
        heads,
        tag("section", tag("h2", "Run by run"), *(_one(*each) for each in enumerate(zip(runs, pictures, strict=True)))),
    ]


def _one(number: int, run_and_pictures: tuple[RunRecord, Pictures]) -> Html:
    run, pictures = run_and_pictures
    return tag(
        "details",
        tag("summary", sections.chip(number), run.name),
        tag("p", summary.lead(run), class_="soft"),
        tag("h3", "Classes"),
        sections.classes(run),
        tag("h3", "What the network sees"),
        sections.samples(run, *pictures),
        tag("h3", "The run"),
        _made(run),
        class_="run",
    )


def _made(run: RunRecord) -> Html:
    """How a run was made: command, data, machine; the whole recipe to open."""
    facts = text_table(summary.TextTable([], [list(pair) for pair in summary.facts(run)]))
    recipe = text_table(summary.settings_table(run))
    return tag("", tag("div", facts, class_="facts"), tag("details", tag("summary", "The whole recipe"), recipe))


def _meaning(runs: list[RunRecord]) -> Html:
    said = "F1, precision and recall are means over the classes; AUC is the mean of each class against the rest."
    if any("joint" in run.final()[1].get("val", {}) for run in runs):
        said += " “joint” is the mean of the logits of both heads, the published prediction."
    return tag("p", said, class_="soft")


def _footer() -> Html:
    return tag("footer", f"deitfast {__version__}, report. Dark or light as your system is set.")
