"""Transcoding: what becomes of each kind of image, and what is refused."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.errors import UserError
from pipelines.storage.reader import JPEG, RAW
from pipelines.storage.sources.image_folder import IMAGE_SUFFIXES
from pipelines.storage.transcode import BadImageError, EncodedImage, EncodeOptions, Kind, transcode
from tests.helpers.sample_images import drawn, encoded, jpeg, pixels


def stored(sample: EncodedImage) -> np.ndarray:
    if sample.mode == RAW:
        return np.frombuffer(sample.data, np.uint8).reshape(sample.height, sample.width, 3)
    return pixels(sample.data)


def difference(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


@pytest.mark.parametrize("name", ["color.JPEG", "progressive.JPEG", "full_chroma.JPEG", "rotated.JPEG"])
def test_color_jpegs_pass_through(odd, name):
    sample = transcode(odd[name], name, EncodeOptions())
    assert sample.data == odd[name]
    assert (sample.height, sample.width) == pixels(odd[name]).shape[:2]
    assert sample.kind & Kind.PASSED
    assert bool(sample.kind & Kind.ROTATED) == (name == "rotated.JPEG")


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("cmyk.JPEG", Kind.REENCODED | Kind.CMYK, JPEG),
        ("really_png.JPEG", Kind.REENCODED | Kind.MISNAMED, JPEG),
        ("small.png", Kind.RAW, RAW),
        ("small_gray.png", Kind.RAW | Kind.GRAY, RAW),
        ("palette.png", Kind.REENCODED | Kind.PALETTE, JPEG),
        ("alpha.png", Kind.REENCODED | Kind.ALPHA, JPEG),
        ("bitmap.bmp", Kind.RAW, RAW),
    ],
)
def test_other_files_become_what_imagefolder_sees(odd, name, kind, mode):
    sample = transcode(odd[name], name, EncodeOptions())
    assert sample.kind == kind
    assert sample.mode == mode
    assert difference(stored(sample), pixels(odd[name])) <= (0 if mode == RAW else 3)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_whatever_is_taken_for_an_image_by_its_name_can_be_stored(suffix):
    form = Image.registered_extensions().get(suffix, "PPM")
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    content = encoded(Image.fromarray(drawn(40, 30)).convert("1" if suffix == ".pbm" else "RGB"), form)
    sample = transcode(content, "x" + suffix, EncodeOptions())
    assert (sample.height, sample.width) == (40, 30)
    assert difference(stored(sample), pixels(content)) == 0


def test_gray_jpegs_become_color_and_keep_their_pixels(odd):
    sample = transcode(odd["gray.JPEG"], "gray.JPEG", EncodeOptions())
    assert sample.kind == Kind.REENCODED | Kind.GRAY
    assert Image.open(io.BytesIO(sample.data)).mode == "RGB"
    assert difference(stored(sample), pixels(odd["gray.JPEG"])) < 0.1


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken_and_counted(form: str) -> None:
    frames = [Image.fromarray(drawn(40, 30, seed)) for seed in range(3)]
    several = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    sample = transcode(several, "x", EncodeOptions())
    assert sample.kind & Kind.FRAMES
    assert difference(stored(sample), pixels(several)) == 0
    assert difference(stored(sample), np.asarray(frames[0])) < 12
    if form == "GIF":  # cut in the second frame
        assert transcode(several[: len(several) * 2 // 5], "x", EncodeOptions()) == sample
    assert not transcode(encoded(frames[0], form), "x", EncodeOptions()).kind & Kind.FRAMES


def test_sixteen_bits_are_scaled_not_clipped(odd):
    deep = np.asarray(Image.open(io.BytesIO(odd["deep.png"]))).astype(float)
    sample = transcode(odd["deep.png"], "deep.png", EncodeOptions())
    assert sample.kind == Kind.REENCODED | Kind.GRAY | Kind.DEEP
    assert np.abs(stored(sample)[..., 0] - deep * 255 / 65535).mean() < 1
    small = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    scaled = stored(transcode(encoded(Image.fromarray(small), "PNG"), "x.png", EncodeOptions()))
    assert scaled[0, :, 1].tolist() == [0, 0, 1, 1, 128, 255]


def test_pixels_are_stored_raw_or_as_jpeg_by_their_size():
    assert stored(transcode(drawn(32, 128), "#1", EncodeOptions())).tolist() == drawn(32, 128).tolist()
    assert transcode(drawn(32, 129), "#2", EncodeOptions()).mode == JPEG


def test_max_side_shrinks_only_what_is_longer():
    long, short = jpeg(100, 300, 1), jpeg(300, 200, 2)
    shrunk = transcode(long, "x.JPEG", EncodeOptions(max_side=200))
    assert (shrunk.height, shrunk.width) == (67, 200)
    assert shrunk.kind == Kind.REENCODED | Kind.SHRUNK
    expected = np.asarray(Image.fromarray(pixels(long)).resize((200, 67), Image.Resampling.BICUBIC))
    assert difference(stored(shrunk), expected) < 4
    assert transcode(short, "x.JPEG", EncodeOptions(max_side=300)).data == short


def test_a_given_quality_reencodes_where_that_is_smaller():
    fine, coarse = jpeg(200, 200, 1, quality=98), jpeg(200, 200, 1, quality=30)
    assert len(transcode(fine, "x.JPEG", EncodeOptions(quality=80)).data) < len(fine)
    assert transcode(coarse, "x.JPEG", EncodeOptions(quality=80)).data == coarse


@pytest.mark.parametrize("codec", [EncodeOptions(), EncodeOptions(max_side=64), EncodeOptions(quality=80)])
@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(["color.JPEG", "progressive.JPEG", "gray.JPEG", "cmyk.JPEG"]), share=st.floats(0, 0.999))
def test_cut_jpegs_are_refused_wherever_they_are_cut(odd, codec, name, share):
    content = odd[name]
    with pytest.raises(BadImageError):
        transcode(content[: int(share * len(content))], name, codec)
    with pytest.raises(BadImageError):
        transcode(content[:-1], name, codec)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", r"not an image that Pillow reads \(it starts with b'<html>"),
        (encoded(drawn(90, 90), "PNG")[:-3000], "truncated|cut|broken"),
        (np.zeros((4, 4), np.uint8), "instead of uint8"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.new("1", (65501, 1)), "PNG"), "65501 pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(content, reason):
    with pytest.raises(BadImageError, match=reason):
        transcode(content, "x.JPEG", EncodeOptions())


def test_codecs_out_of_range_are_mistakes():
    for wrong in ({"max_side": 5}, {"max_side": -1}, {"quality": 0}, {"quality": 101}):
        with pytest.raises(UserError, match="out of range"):
            EncodeOptions(**wrong)
