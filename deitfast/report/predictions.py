"""Predictions as one HTML file: every image, what each head says of it, and what its tokens look at."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from deitfast.eval.predict import ImagePrediction
from deitfast.models.class_names import imagenet_word
from deitfast.report.html import TEMPLATES, render

THUMBNAIL = 256
"""Longest side of a picture on the page, in pixels."""
TINY = 96
"""Pictures up to this side are shown with their pixels, not smoothed."""


@dataclass(frozen=True)
class PredictionRow:
    """One image on the page."""

    prediction: ImagePrediction
    picture: Image.Image
    """The image as the network sees it."""
    attention: Mapping[str, Image.Image] = field(default_factory=dict)
    """What a token looks at, by the token's name."""


def predictions_page(title: str, lead: str, rows: Sequence[PredictionRow], skipped: Sequence[tuple[str, str]]) -> str:
    """Return the whole file.

    Args:
        title: of the page.
        lead: a sentence on the network and its input.
        rows: at least one; all of one network.
        skipped: files that could not be read, and why.
    """
    first = rows[0]
    return render(
        TEMPLATES / "predictions.html",
        title=title,
        lead=lead,
        heads=list(first.prediction.heads),
        tokens=list(first.attention),
        skipped=skipped,
        rows=[
            {
                **_named(row.prediction),
                "heads": row.prediction.heads,
                "picture": _data_uri(row.picture),
                "tiny": max(row.picture.size) <= TINY,
                "attention": {token: _data_uri(drawn) for token, drawn in row.attention.items()},
            }
            for row in rows
        ],
    )


def _named(prediction: ImagePrediction) -> dict[str, str]:
    """Return an image's file and folder, and its true class in the words of the predicted ones."""
    if prediction.truth is None:
        folder, _, file = prediction.name.rpartition("/")
        return {"file": file, "folder": folder, "truth": ""}
    word = imagenet_word(prediction.truth)
    truth = word if word == prediction.truth else f"{word} ({prediction.truth})"
    return {"file": prediction.name, "folder": "", "truth": truth}


def _data_uri(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
