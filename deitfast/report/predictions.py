"""Predictions as one HTML file: every image, what each head says of it, and what its tokens look at."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from deitfast.eval.predict import ImagePrediction
from deitfast.report.html import TEMPLATES, render

THUMBNAIL = 128
"""Longest side of a picture on the page, in pixels; pictures of attention are drawn larger."""


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
        truths=any(row.prediction.truth for row in rows),
        skipped=skipped,
        rows=[
            {
                "name": row.prediction.name,
                "truth": row.prediction.truth,
                "heads": row.prediction.heads,
                "picture": _data_uri(row.picture, THUMBNAIL),
                "attention": {token: _data_uri(drawn, 2 * THUMBNAIL) for token, drawn in row.attention.items()},
            }
            for row in rows
        ],
    )


def _data_uri(picture: Image.Image, side: int) -> str:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
