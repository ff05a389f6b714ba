"""What a JPEG's header says, whatever stands in its comments and thumbnails."""

import pytest

from pipelines.storage.jpeg import lacks_tables, read_frame
from pipelines.storage.transcode import EncodeOptions, stored_size, transcode
from tests.helpers.sample_images import jpeg

TABLES, COMMENT, EXIF = b"\xff\xc4", b"\xff\xfe", b"\xff\xe1"


def segment(marker: bytes, content: bytes) -> bytes:
    return marker + (len(content) + 2).to_bytes(2, "big") + content


def without_tables(data: bytes) -> bytes:
    """Cut every Huffman table out of a header."""
    position = 0
    while (position := data.find(TABLES, position, read_frame(data).scan)) >= 0:
        data = data[:position] + data[position + 2 + int.from_bytes(data[position + 2 : position + 4], "big") :]
    return data


@pytest.mark.parametrize("marker", [COMMENT, EXIF])
def test_tables_of_a_comment_or_a_thumbnail_are_not_the_images(marker: bytes) -> None:
    plain = jpeg(40, 60, 1)
    thumbnail, cut = jpeg(16, 16, 2), TABLES + b"\x30\x00"  # a length that leads far into the image
    for inside in (thumbnail, cut):
        whole = plain[:2] + segment(marker, b"x" * 9 + inside) + plain[2:]
        bare = without_tables(plain)
        bare = bare[:2] + segment(marker, b"x" * 9 + inside) + bare[2:]
        assert not lacks_tables(whole, read_frame(whole))
        assert lacks_tables(bare, read_frame(bare))
        assert stored_size(transcode(whole, "x.jpg", EncodeOptions()).data) == (40, 60)
