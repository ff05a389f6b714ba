"""Which data set a command uses, and what planning a run needs to know of it."""

import logging
import os
import shlex
from contextlib import closing
from pathlib import Path

from deitfast.cli.demo import DEMO_DATA
from deitfast.config.fit_to_data import DataFacts
from deitfast.data_loaders import typical_side
from pipelines.storage.dataset import SPEC_FILE, Dataset
from pipelines.storage.sources.demo import SIDES, open_demo

log = logging.getLogger("deitfast")
SHOWN = 3
"""Data sets in data/ that are named beside the demo set."""


def data_folder(data: Path | None) -> Path:
    """Return the data set to use: --data, else $DEITFAST_DATA, else the demo set; a line says so and names others."""
    if data:
        return data
    if named := os.environ.get("DEITFAST_DATA"):
        log.info("no --data: using $DEITFAST_DATA, %s", named)
        return Path(named).expanduser()
    found = sorted(file.parent for file in DEMO_DATA.parent.glob(f"*/{SPEC_FILE}") if file.parent != DEMO_DATA)
    others = "".join(f"; to use {folder}: --data {shlex.quote(str(folder))}" for folder in found[:SHOWN])
    log.info("no --data and no $DEITFAST_DATA: using the built-in demo set, %s%s", DEMO_DATA, others)
    return DEMO_DATA


def data_facts(data: Path) -> DataFacts:
    """Return what planning needs to know of the data set in `data`; of the demo set also before it is made."""
    if data == DEMO_DATA and not (data / SPEC_FILE).exists():
        labels = [entry.label for entry in open_demo().splits["train"]]
        counts = tuple(labels.count(label) for label in sorted(set(labels)))
        return DataFacts("demo", sum(SIDES) // 2, counts, "", validated=True)
    with closing(Dataset.open(data)) as dataset:
        spec = dataset.spec
        counts = spec.splits["train"].counts if "train" in spec.splits else ()
        return DataFacts(spec.name, typical_side(dataset), counts, spec.fingerprint, "val" in spec.splits)
