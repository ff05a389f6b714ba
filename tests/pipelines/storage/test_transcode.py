"""Transcoding: what becomes of each kind of image, and what is refused."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.errors import UserError
from pipelines.storage.convert.converter import convert
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.image_kinds import Kind
from pipelines.storage.reader import JPEG, RAW
from pipelines.storage.sources.image_folder import IMAGE_SUFFIXES
from pipelines.storage.transcode import BadImageError, EncodedImage, EncodeOptions, stored_size, transcode
from pipelines.storage.verify import verify
from tests.helpers.sample_images import MemorySource, drawn, encoded, entries, jpeg, pixels, rotated_jpeg


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
    assert not transcode(rotated_jpeg(40, 90, orientation=1), name, EncodeOptions()).kind & Kind.ROTATED  # upright


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
    fine = jpeg(300, 200, 2, quality=99)  # encoded again, it would be smaller
    assert transcode(fine, "x.JPEG", EncodeOptions(max_side=300)).data == fine


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
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "floating-point pixels .* not finite"),
        (encoded(Image.fromarray(np.full((4, 4), 256, np.float32)), "TIFF"), "floating-point pixels from 256 to 256"),
        (encoded(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"), "integer pixels from -1 to -1"),
        (encoded(Image.fromarray(np.full((4, 4), 65536, np.int32)), "TIFF"), "integer pixels from 65536"),
        (encoded(Image.new("1", (65501, 1)), "PNG"), "65501 pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(content, reason):
    with pytest.raises(BadImageError, match=reason):
        transcode(content, "x.JPEG", EncodeOptions())


@pytest.mark.parametrize(
    ("pixels", "form", "white", "kinds"),
    [
        (np.uint16([[0, 40_000, 65_535]]), "PNG", 65535, Kind.DEEP),
        (np.uint16([[0, 4096, 4097]]), "TIFF", 65535, Kind.DEEP),
        (np.uint16([[0, 1000, 4095]]), "PNG", 4095, Kind.DEEP | Kind.NARROW),
        (np.uint16([[0, 100, 255]]), "TIFF", 255, Kind.DEEP | Kind.NARROW),
        (np.uint16([[0, 100, 255]]), "PPM", 65535, Kind.DEEP),  # the file states its range
        (np.int32([[0, 127, 255]]), "TIFF", 255, Kind.LONG),
        (np.int32([[0, 127, 3000]]), "TIFF", 4095, Kind.LONG),
        (np.int32([[0, 127, 60_000]]), "TIFF", 65535, Kind.LONG),
        (np.float32([[0, 0.25, 1]]), "TIFF", 1, Kind.FLOAT),
        (np.float32([[0, 0.25, 254.6]]), "TIFF", 255, Kind.FLOAT),
    ],
)
def test_integers_and_floats_by_their_own_rule(pixels, form, white, kinds, monkeypatch):
    monkeypatch.setattr("pipelines.storage.transcode.BAND_PIXELS", 20)  # two rows
    pixels = np.repeat(np.repeat(pixels, 9, 0), 3, 1)
    for rows in (slice(3), slice(5, 9)):
        pixels[rows, 6:] = pixels[rows, 3:6]  # the largest value is in neither the first band nor the last
    image = transcode(encoded(Image.fromarray(pixels), form), "x", EncodeOptions())
    assert image.kind & (Kind.DEEP | Kind.NARROW | Kind.LONG | Kind.FLOAT) == kinds
    assert image.kind & Kind.GRAY
    expected = np.floor(pixels.astype(np.float64) * 255 / white + 0.5)
    assert stored(image).tolist() == np.repeat(expected[..., None], 3, 2).tolist()


def test_dark_sixteen_bit_colors_are_counted():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    for value, narrow in ((0x0FFF, Kind.NARROW), (0x1000, Kind(0))):
        rows = (b"\0" + value.to_bytes(2, "big") * 12) * 4
        image = transcode(head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""), "x.png", EncodeOptions())
        assert image.kind & Kind.NARROW == narrow


def test_huge_images_are_read_where_asked_for(monkeypatch):
    monkeypatch.setattr("pipelines.storage.transcode.USUAL_PIXELS", 5000)
    monkeypatch.setattr("pipelines.storage.transcode.HUGE_PIXELS", 90_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)  # Pillow would raise above twice that
    large = jpeg(200, 300)
    with pytest.raises(BadImageError, match=r"300 x 200 pixels; at most 5,000 .*--max-side or --allow-huge .*90,000"):
        transcode(large, "x.jpg", EncodeOptions())
    for content in (large, encoded(drawn(200, 300), "PNG")):
        most = transcode(content, "x.jpg", EncodeOptions(allow_huge=True))
        assert most.kind & Kind.SHRUNK
        assert (most.width, most.height) == (83, 55)  # of at most 5,000 pixels, with room for rounding
    for content in (large, encoded(drawn(200, 300), "PNG")):
        small = transcode(content, "x.jpg", EncodeOptions(max_side=60))
        assert (small.width, small.height) == (60, 40)
        full = Image.fromarray(drawn(200, 300)).resize((60, 40), Image.Resampling.BICUBIC)
        assert np.abs(stored(small).astype(int) - np.asarray(full)).mean() < 6
        less = transcode(content, "x.jpg", EncodeOptions(max_side=80))
        assert (less.width, less.height) == (80, 53)
    with pytest.raises(BadImageError, match=r"at most 90,000 are read$"):
        transcode(jpeg(301, 300), "x.jpg", EncodeOptions(allow_huge=True))
    assert Image.MAX_IMAGE_PIXELS == 2500


def test_codecs_out_of_range_are_mistakes():
    for wrong in ({"max_side": 5}, {"max_side": -1}, {"quality": 0}, {"quality": 101}):
        with pytest.raises(UserError, match="out of range"):
            EncodeOptions(**wrong)


def with_stray_bytes(data: bytes) -> bytes:
    return data[:20] + b"\0\0" + data[20:]


CHECKERS = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)


def without_a_table(data: bytes) -> bytes:
    last = data.rindex(b"\xff\xc4")
    return data[:last] + b"\xff\xe4" + data[last + 2 :]  # a segment that decoders skip


def with_a_gap(data: bytes) -> bytes:
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    return data[:middle] + data[middle + 300 :]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (with_stray_bytes(jpeg(80, 96)), "nvImageCodec: .*"),
        (without_a_table(jpeg(80, 96)), "a Huffman table is missing.*"),
        (with_a_gap(jpeg(80, 96)), "libjpeg: Corrupt JPEG data: .*"),
        (encoded(CHECKERS, quality=100, subsampling=0), ".*fast DCT.*"),
    ],
    ids=["stray bytes", "no table", "a gap", "overflow"],
)
def test_what_not_every_decoder_reads_is_re_encoded_and_named(content, reason, tmp_path, caplog):
    content = bytes(content)
    image = transcode(content, "x.jpg", EncodeOptions())
    assert image.kind & (Kind.DISPUTED | Kind.REENCODED | Kind.PASSED) == Kind.DISPUTED | Kind.REENCODED
    assert re.fullmatch(reason, image.objection)
    with pytest.raises(BadImageError, match="not every loader reads it"):
        stored_size(content)
    assert stored_size(image.data) == (image.height, image.width)
    assert transcode(image.data, "x.jpg", EncodeOptions()).data == image.data
    assert transcode(content, "x.jpg", EncodeOptions(quality=100)).data != content
    caplog.set_level("INFO")
    source = MemorySource(splits={"train": entries([jpeg(40, 40), content])})
    spec = convert(source, tmp_path / "d", ConvertOptions(workers=1))
    assert spec.splits["train"].converted["not read by every decoder"] == 1
    assert re.fullmatch(f"1.JPEG\t{reason}\n", (tmp_path / "d" / "reencoded.txt").read_text())
    assert "1 JPEG re-encoded or stored raw, as not every" in caplog.text
    assert verify(tmp_path / "d").intact


def test_other_words_on_standard_error_go_on(capfd):
    from pipelines.storage import decoders

    with decoders._stderr() as messages:
        os.write(2, b"progress 50 %\nCorrupt JPEG data: bad Huffman code\nmore")
    assert messages == ["Corrupt JPEG data: bad Huffman code"]
    assert capfd.readouterr().err == "progress 50 %\nmore"


def test_what_no_jpeg_holds_is_stored_raw_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.transcode.objection", lambda data, pixels: "planted")
    small = transcode(jpeg(60, 90), "x.jpg", EncodeOptions())
    assert (small.mode, small.kind & Kind.DISPUTED, small.kind & Kind.REENCODED) == (RAW, Kind.DISPUTED, Kind(0))
    assert small.objection == "planted"
    assert small.data == pixels(jpeg(60, 90)).tobytes()
    with pytest.raises(BadImageError, match="no JPEG is read alike"):
        transcode(jpeg(60, 290), "x.jpg", EncodeOptions())
