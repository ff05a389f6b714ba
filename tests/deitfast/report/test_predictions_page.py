"""The page of predictions: names that wrap, pictures that can be seen, probabilities as bars, the truth marked."""

import base64
import io
import re

import pytest
from PIL import Image

from deitfast.eval.predict import ImagePrediction
from deitfast.report.predictions import TINY, PredictionRow, predictions_page


def page(name: str, truth: str | None, side: int, attention: tuple[str, ...] = ()) -> str:
    heads = {"class": (("tench (n01440764)", 0.876), ("a < b", 0.124)), "joint": (("a < b", 0.5),)}
    pictures = {token: Image.new("RGB", (side, side)) for token in attention}
    prediction = ImagePrediction(name, heads, truth, "class")
    return predictions_page("t", "l", [PredictionRow(prediction, Image.new("RGB", (side, side)), pictures)], [])


def test_a_file_is_named_before_its_folder_and_probabilities_are_bars() -> None:
    text = page("some/long folder/x.jpg", None, 64)
    assert re.search(r"<h2>x\.jpg<span[^>]*>some/long folder</span></h2>", text)
    assert re.findall(r"--share: ([\d.]+)%", text) == ["87.6", "12.4", "50.0"]
    assert re.findall(r'"number">([\d.]+) %', text) == ["87.6", "12.4", "50.0"]
    assert "a &lt; b" in text
    assert "labeled" not in text
    assert 'class="true"' not in text


def test_the_truth_is_said_and_marked_in_the_words_of_the_predictions() -> None:
    text = page("val/7", "n01440764", 64)
    assert "<h2>val/7</h2>" in text
    assert "labeled <b>tench (n01440764)</b>" in text
    assert re.findall(r'<tr class="true"><td[^>]*>([^<]*)', text) == ["tench (n01440764)"]


@pytest.mark.parametrize(("side", "shown"), [(TINY, TINY), (TINY + 1, TINY + 1), (500, 256)])
def test_pictures_are_large_and_tiny_ones_keep_their_pixels(side: int, shown: int) -> None:
    text = page("x.png", None, side, ("class", "distillation"))
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in pictures] == [(shown, shown)] * 3
    assert ('class="pictures pixels"' in text) == (side <= TINY)
    assert "attended" in text
    assert re.findall(r"<figcaption>([^<]*)", text) == ["image", "class token", "distillation token"]
