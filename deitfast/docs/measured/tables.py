"""Write the measured figures into README and docs, and draw the chart: `python -m deitfast.docs.measured.tables`.

Each NAME.json here is one measurement with its command, machine, versions and commit. A document shows it between
`<!-- measured: NAME -->` and `<!-- end -->`; what stands there is replaced, so that no figure is typed twice.
study_NAME.json is the study.json of `deitfast study`, with the hardware and the commit added by hand. The script lives
beside the records, and not in tools/, because it is shipped with them: who measures again has all in one folder.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from deitfast.study.results import format_figure
from deitfast.study.tables import HEADINGS, NONE, published_figure

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CHART = HERE / "peers.svg"


def read(name: str) -> dict[str, Any]:
    """Return one record."""
    return json.loads((HERE / f"{name}.json").read_text())


def cell(value: Any) -> str:
    """Return a figure as text; [median, lowest, highest] with its spread."""
    if isinstance(value, list):
        return f"{value[0]:,} ({value[1]:,} to {value[2]:,})"
    return f"{value:,}" if isinstance(value, int | float) else value


def table(name: str) -> str:
    """Return a record as a Markdown table, with where and how it was measured under it."""
    record = read(name)
    if "kernels" in record:
        return kernel_table(record)
    lines = [record["columns"], ["---"] * len(record["columns"]), *record["rows"]]
    rows = "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)
    where = f"{record['what']}. {record['unit']}. {record['data']}; {record['machine']}; commit {record['commit']}."
    return f"\n{rows}\n{where}\nAgain: `{record['command']}`\n\n"


def study_table(name: str, *, brief: bool) -> str:
    """Return a study's record, as `deitfast study` wrote it, as a Markdown table with the claims under it.

    Args:
        name: of the record.
        brief: top-1 of finished rows alone, without claims and versions.
    """
    record = read(name)
    record["columns"] = ["top1"] if brief else record["columns"]
    published = [column for column in record["columns"] if any(column in row["published"] for row in record["rows"])]
    head = ["row", "runs"]
    for column in record["columns"]:
        head += [HEADINGS.get(column, column), *["published"] * (column in published)]
    lines = []
    for row in record["rows"]:
        if brief and not row["done"]:
            continue
        line = [row["name"], str(row["done"])]
        for column in record["columns"]:
            line.append(spread(column, row["figures"].get(column, [])))
            if column in published:
                line.append(published_figure(row["published"], column))
        lines.append(line)
    rows = "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *lines))
    claims = "".join(
        f"- {each['better']} better than {each['than']}: **{each['verdict']}**; {each['reason']}.\n"
        for each in record["claims"]
    )
    about, again = record["about"][:1].upper() + record["about"][1:], f"Again: `{record['command']}`\n\n"
    if brief:
        return f"\n{rows}\n{record['title']}. {about}; no GPU. {again}"
    versions = ", ".join(f"{library} {version}" for library, version in record["versions"].items() if version)
    return f"\n{rows}\n{claims}\n{about}; {record['hardware']}; commit {record['commit']}; {versions}.\n{again}"


def spread(column: str, values: list[float]) -> str:
    """Return the mean of some runs' figures, and their standard deviation where there are several."""
    if not values:
        return NONE
    mean = format_figure(column, statistics.fmean(values))
    return f"{mean} ± {format_figure(column, statistics.stdev(values))}" if len(values) > 1 else mean


GPUS = "sm_80", "sm_89", "sm_90"
"""GPUs whose columns `kernel_table` has: A100, L4 and RTX 4090, H100 and H200."""


def kernel_table(record: dict[str, Any]) -> str:
    """Return what kernels compile to as a Markdown table: a figure for each GPU, or one where all have the same."""
    columns = ("kernel", "pixels a thread", "loads of 1, 4, 16 bytes", "stores of 2, 4, 8 bytes",
               "instructions a pixel", "registers", "stack", "MB a batch")  # fmt: skip
    lines = [columns, ["---"] * len(columns)]
    moved = {**record["megabytes_per_batch"], "place_kernel": record["megabytes_placing"]}
    for name, gpus in record["kernels"].items():
        found = [gpus[gpu] for gpu in GPUS]
        pixels = found[0]["pixels_per_thread"]
        lines.append([
            f"`{name}`", str(pixels),
            _for_each([", ".join(str(one["loads"].get(str(width), 0)) for width in (1, 4, 16)) for one in found]),
            _for_each([", ".join(str(one["stores"].get(str(width), 0)) for width in (2, 4, 8)) for one in found]),
            _for_each([f"{one['instructions'] / pixels:.0f}" for one in found]),
            *(_for_each([str(one[key]) for one in found]) for key in ("registers", "stack")),
            str(moved.get(name.split(",")[0], "")) if "pixels" not in name.partition(",")[2] else "",
        ])  # fmt: skip
    rows = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    total = record["megabytes_per_batch"]["sum"]
    where = f"{record['what']}; {', '.join(GPUS)} where they differ; Triton {record['versions']['triton']}"
    return f"\n{rows}\n{where}; augmentation moves {total} MB a batch.\nAgain: `{record['command']}`\n\n"


def _for_each(texts: list[str]) -> str:
    """Return one text where all are the same, else all of them."""
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def filled(document: Path) -> str:
    """Return a document with every block's table as the records have it; in the README those of studies are brief."""

    def block(found: re.Match[str]) -> str:
        name = found[2]
        made = study_table(name, brief=document.name == "README.md") if name.startswith("study_") else table(name)
        return found[1] + made + found[3]

    return BLOCK.sub(block, document.read_text())


def chart() -> str:
    """Return peers.json as bars, an SVG: images/s of one core on JPEGs as they are."""
    record = read("peers")
    rows = [row for row in record["rows"] if isinstance(row[1], list)]
    bars, scale = [], 250 / max(row[1][0] for row in rows)
    for number, (name, (rate, low, high), *_) in enumerate(rows):
        top, label = 34 + 26 * number, name.replace("`", "")
        color = "#2a6fb0" if number == 0 else "#9db4c8"
        bars.append(
            f'<text x="252" y="{top + 12}" text-anchor="end">{label}</text>'
            f'<rect x="260" y="{top}" width="{rate * scale:.0f}" height="16" fill="{color}"/>'
            f'<path d="M{260 + low * scale:.0f} {top + 8}H{260 + high * scale:.0f}" stroke="#333"/>'
            f'<text x="{266 + high * scale:.0f}" y="{top + 12}">{rate:,}</text>'
        )
    height = 34 + 26 * len(bars) + 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="{height}" viewBox="0 0 600 {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        '<text x="12" y="20" font-weight="bold">Random crops from ImageNet JPEGs, images/s on one CPU core</text>\n'
        + "\n".join(bars)
        + f'\n<text x="12" y="{height - 8}" font-size="10" fill="#666">Median of 5, line: lowest to highest. '
        f"{record['machine'].partition(', ')[0]}; commit {record['commit']}.</text>\n</svg>\n"
    )


def main() -> None:
    """Rewrite the documents and the chart."""
    for path in [ROOT / "README.md", *sorted(HERE.parent.glob("*.md"))]:
        path.write_text(filled(path))
    CHART.write_text(chart())
    sys.stderr.write("tables and chart are as the records have them\n")


if __name__ == "__main__":
    main()
