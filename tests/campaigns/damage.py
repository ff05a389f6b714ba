"""What campaigns do to files: bytes damaged at random, and JSON trees edited."""

import random
from collections.abc import Callable
from typing import Any


def flip(draw: random.Random, content: bytearray) -> bytes:
    """Flip up to four bits."""
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def overwrite(draw: random.Random, content: bytearray) -> bytes:
    """Replace a stretch by zeros, ones or noise."""
    start = draw.randrange(len(content))
    length = min(draw.choice((1, 4, 64, 4096)), len(content) - start)
    content[start : start + length] = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))
    return bytes(content)


def cut(draw: random.Random, content: bytearray) -> bytes:
    """Cut it short, anywhere."""
    return bytes(content[: draw.randrange(len(content))])


def extend(draw: random.Random, content: bytearray) -> bytes:
    """Add bytes at the end, or double it."""
    return bytes(content + draw.choice((b"\0", b"\n{}", draw.randbytes(64), bytes(content))))


def drop(draw: random.Random, content: bytearray) -> bytes:
    """Leave out a stretch in the middle."""
    start = draw.randrange(len(content))
    return bytes(content[:start] + content[start + draw.choice((1, 2, 24, 128)) :])


def ends(draw: random.Random, content: bytearray) -> bytes:
    """Flip a bit or write a number near an end, where formats keep what leads to the rest."""
    near = min(len(content), draw.choice((64, 512, 4096)))
    at = draw.randrange(near)
    at = at if draw.random() < 0.5 else len(content) - 1 - at
    if draw.random() < 0.5:
        content[at] ^= 1 << draw.randrange(8)
    else:
        number = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**40))
        content[at : at + 8] = number.to_bytes(8, draw.choice(("little", "big")))
    return bytes(content)


BYTES: tuple[Callable[[random.Random, bytearray], bytes], ...] = (flip, overwrite, cut, extend, drop)


def edited(draw: random.Random, tree: Any) -> Any:
    """Return a JSON tree with another value, without a value, or with one more, somewhere in it."""
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(sorted(tree))
        match draw.randrange(8):
            case 0:
                return {name: value for name, value in tree.items() if name != key}
            case 1:
                return {**tree, draw.choice(("new", "", key + "s")): draw.choice((0, None, "x"))}
        return {**tree, key: edited(draw, tree[key])}
    if isinstance(tree, list) and tree and draw.random() < 0.7:
        place = draw.randrange(len(tree))
        inside = [*tree[:place], edited(draw, tree[place]), *tree[place + 1 :]]
        return draw.choice((tree[:place], [*tree, *tree], inside))
    values = (None, True, -1, 0, 1, 3, 7, 65535, 65536, 2**31, 0.5, -0.0, 1e308, "", "x", "hard", "soft", [], {}, [[]])
    return draw.choice((*values, *((tree + 1, -tree, tree / 2) if isinstance(tree, int | float) else ())))
