"""What is read of the files next to weights, without the weights."""

import json
from pathlib import Path

from deitfast.weights.sidecar import read_sidecar


def test_labels_are_in_the_order_of_their_numbers_not_of_the_file(tmp_path: Path) -> None:
    """A JSON object has no order: programs that sort its keys write 0, 1, 10, 11, 2."""
    labels = {str(number): f"class {number}" for number in range(12)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": labels}, sort_keys=True))
    assert read_sidecar(tmp_path / "model.safetensors", {}).classes == tuple(labels.values())
