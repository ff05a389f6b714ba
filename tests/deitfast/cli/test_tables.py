"""Tables on the terminal: the units that their headings name."""

import io
from pathlib import Path

from rich.console import Console

from deitfast.cli.tables import describe_dataset
from pipelines.spec import DatasetSpec, SplitSpec


def test_sizes_are_in_the_unit_of_their_heading() -> None:
    split = SplitSpec(file="train.beton", samples=5, counts=(2, 3), size=2_500_000, index_crc32=0, fingerprint="f")
    spec = DatasetSpec(2, "folder", ("a", "b"), {"train": split}, {}, "here", "f")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(describe_dataset(spec, Path("data")))
    text = console.export_text()
    assert "MB" in text
    assert "2.5" in text
    assert "2 to 3" in text
