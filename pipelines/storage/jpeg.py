"""What a JPEG's header says of its frame (ITU-T T.81, annex B), without decoding anything."""

from collections.abc import Iterator
from dataclasses import dataclass

TABLES, SCAN = 0xC4, 0xDA
"""Markers of Huffman tables and of a scan."""
BASELINE = 0xC0
"""Marker of a baseline frame, the only kind that the GPUs' own JPEG decoders take."""
PROGRESSIVE = 0xC2
HUFFMAN_FRAMES = (BASELINE, 0xC1, 0xC2)  # baseline, extended, progressive


@dataclass(frozen=True)
class Frame:
    """A JPEG's frame header."""

    marker: int
    """Second byte of its marker: one of HUFFMAN_FRAMES, or a rarer kind."""
    height: int
    width: int
    components: int
    """1: gray, 3: color, 4: CMYK."""
    scan: int
    """Where the first scan starts, in bytes."""
    sampling: tuple[tuple[int, int], ...] = ()
    """Horizontal and vertical sampling factor of each component."""

    @property
    def baseline(self) -> bool:
        """Whether a hardware decoder takes it: baseline, and gray or color."""
        return self.marker == BASELINE and self.components in (1, 3)


def read_frame(content: bytes) -> Frame:
    """Return the frame of a JPEG.

    Raises:
        ValueError: no JPEG, or one that ends before its first scan.
    """
    frame = 0
    for marker, position in _segments(content):
        if marker == SCAN and frame:
            height, width = (int.from_bytes(content[frame + at : frame + at + 2], "big") for at in (5, 7))
            factors = content[frame + 11 : frame + 10 + 3 * content[frame + 9] : 3]
            sampling = tuple((factor >> 4, factor & 15) for factor in factors)
            return Frame(content[frame + 1], height, width, content[frame + 9], position, sampling)
        if 0xC0 <= marker <= 0xCF and marker not in (TABLES, 0xC8, 0xCC):
            frame = position
    raise ValueError("the JPEG stops before its image data")


def lacks_tables(content: bytes, frame: Frame) -> bool:
    """Say whether a sequential JPEG's first scan uses a Huffman table that stands nowhere before it."""
    count = content[frame.scan + 4]
    selectors = content[frame.scan + 6 : frame.scan + 5 + 2 * count : 2]
    needed = {selector >> 4 for selector in selectors} | {0x10 | selector & 15 for selector in selectors}
    for marker, position in _segments(content):  # a thumbnail or a comment may hold tables too: not the image's
        if position >= frame.scan:
            break
        at, end = position + 4, position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        while marker == TABLES and at + 17 <= end:
            needed.discard(content[at])
            at += 17 + sum(content[at + 1 : at + 17])
    return bool(needed) and frame.marker != PROGRESSIVE


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and place of each segment, by their lengths: some ten up to the first scan."""
    position = 2
    while (position := content.find(b"\xff", position)) >= 0 and position + 4 <= len(content):
        marker = content[position + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # stuffing, fill bytes, markers without length
            position += 1 if marker == 0xFF else 2
            continue
        yield marker, position
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
