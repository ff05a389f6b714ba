"""Parquet and Arrow files of labeled images, as Hugging Face's `datasets` writes them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image_table(
    labels: list[Any], *, names: list[str] | None = None, image: str = "image", label: str = "label"
) -> pa.Table:
    """As `datasets` writes it: images as bytes and path, and the columns' features in the schema's metadata."""
    rows = [{"bytes": b"image %d" % n, "path": f"n{n}.JPEG"} for n in range(len(labels))]
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if names:
        features[label] = {"_type": "ClassLabel", "names": names}
    kind = pa.string() if labels and isinstance(labels[0], str) else pa.int64()
    columns = {image: pa.array(rows, ENCODED), label: pa.array(labels, kind), "id": pa.array(range(len(labels)))}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_table(path: Path, data: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(data, path, row_group_size=3)
    else:
        with pa.ipc.new_stream(path, data.schema) as stream:
            stream.write_table(data, max_chunksize=2)
    return path
