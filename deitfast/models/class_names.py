"""Which output of a network stands for which class of a data set: matched by name, synset or number, never guessed.

ImageNet's classes have several names: the synset (n01440764), WordNet's words ("tench, Tinca tinca", any one of
them), and the place among the sorted synsets (0 to 999, the folders of ImageNet-V2). All of them are understood.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from pipelines.errors import UserError

IMAGENET = 1000
"""Outputs of a network that was trained on ImageNet-1k."""


@dataclass(frozen=True)
class ClassMatch:
    """Which of a network's outputs stands for each of a data set's classes."""

    index: tuple[int, ...]
    """For each class of the data set, in label order, the output of the network."""
    num_outputs: int
    """Outputs of the network."""
    how: str
    """How they were matched, human-readable."""

    @property
    def is_identity(self) -> bool:
        """Whether the outputs are the data set's classes, all of them, in its order."""
        return self.index == tuple(range(self.num_outputs))

    def __str__(self) -> str:
        used = "" if len(self.index) == self.num_outputs else f", {len(self.index)} of {self.num_outputs:,}"
        return f"matched {self.how}{used}"


@cache
def _imagenet() -> dict[str, str]:
    """Return WordNet's words of each of ImageNet-1k's synsets, in label order."""
    lines = (resources.files("deitfast") / "models" / "imagenet_classes.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def imagenet_synsets() -> tuple[str, ...]:
    """Return ImageNet-1k's synsets (n01440764, ...) in label order: sorted, as every published network has them."""
    return tuple(_imagenet())


def imagenet_word(synset: str) -> str:
    """Return the first of WordNet's words for one of ImageNet's synsets; any other name as it is."""
    words = _imagenet().get(synset)
    return words.split(",")[0] if words else synset


def match_classes(
    owner: str, names: Sequence[str], num_outputs: int, wanted: Sequence[str], *, assume_order: bool = False
) -> ClassMatch:
    """Match a network's outputs to a data set's classes.

    Args:
        owner: the network, for messages.
        names: its class names in the order of its outputs; empty: unknown. A thousand unnamed outputs are ImageNet's.
        num_outputs: its outputs.
        wanted: the data set's class names in label order.
        assume_order: where names do not decide, take equally many outputs for the classes in their order.

    Raises:
        UserError: a class has no output or two of them, or nothing tells which output is which.
    """
    known = names or (imagenet_synsets() if num_outputs == IMAGENET else ())
    numbers = _numbers(wanted, num_outputs)
    if known:
        keys = _keys(wanted)
        spelled = "by ImageNet's names" if set(keys) & set(imagenet_synsets()) else "by name, however it is spelled"
        for how, own, theirs in (("by name", tuple(known), tuple(wanted)), (spelled, _keys(known), keys)):
            if (index := _index(own, theirs)) is not None:
                return ClassMatch(index, num_outputs, how if names else "by synset, in ImageNet's order")
    elif numbers:
        return ClassMatch(numbers, num_outputs, "by number")
    if assume_order and len(wanted) == num_outputs:
        return ClassMatch(
            tuple(range(num_outputs)), num_outputs, "in the data set's order, as --assume-class-order says"
        )
    raise _mismatch(owner, tuple(known), num_outputs, tuple(wanted))


def _index(own: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the place of each of `wanted` in `own`; None where one is missing, or is there twice, on either side."""
    counts = Counter(own)
    if len(set(wanted)) < len(wanted) or any(counts[name] != 1 for name in wanted):
        return None
    places = {name: place for place, name in enumerate(own)}
    return tuple(places[name] for name in wanted)


def _numbers(names: Sequence[str], count: int) -> tuple[int, ...]:
    """Return names as the numbers that they are, where they are exactly 0 to count - 1; else ()."""
    if len(names) != count or not all(name.isascii() and name.isdecimal() for name in names):
        return ()
    numbers = tuple(map(int, names))
    return numbers if set(numbers) == set(range(count)) else ()


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFKC", name)  # macOS decomposes letters
    return " ".join(name.casefold().replace("_", " ").replace(",", " ").split())


@cache
def _synsets_of() -> dict[str, frozenset[str]]:
    """Return the synsets that each of WordNet's words, or all words of a synset together, may stand for."""
    found: dict[str, set[str]] = {}
    for synset, words in _imagenet().items():
        for word in {synset, words, *words.split(",")}:
            found.setdefault(_plain(word), set()).add(synset)
    found["crane bird"] = {"n02012849"}  # torchvision tells its two cranes apart so
    found["crane"] = {"n02012849", "n03126707"}
    return {word: frozenset(synsets) for word, synsets in found.items()}


def _keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return names in one spelling: ImageNet's classes as their synsets, others in lower case without underscores."""
    synsets, table = imagenet_synsets(), _synsets_of()
    if numbers := _numbers(names, IMAGENET):
        return tuple(synsets[number] for number in numbers)
    plain = [_plain(name) for name in names]
    if len(names) == IMAGENET and all(
        synset in table.get(name, ()) for synset, name in zip(synsets, plain, strict=True)
    ):
        return synsets  # in ImageNet's order, which also tells the two cranes and the two maillots apart
    return tuple(next(iter(found)) if len(found := table.get(name, ())) == 1 else name for name in plain)


def _mismatch(owner: str, names: tuple[str, ...], count: int, wanted: tuple[str, ...]) -> UserError:
    """Return the error that says why outputs and classes cannot be matched."""
    possible = "" if count != len(wanted) else ", or --assume-class-order if the outputs are in the data set's order"
    if not names:
        return UserError(
            f"{owner} does not say what its {count} classes are",
            expected="class names next to the weights (config.json), in them, or a network of ImageNet's 1,000",
            found=f"a data set of {len(wanted)} classes: {_some(wanted)}",
            remedy="give a network that names its classes" + possible,
        )
    own, keys = Counter(_keys(names)), _keys(wanted)
    at = next((i for i, key in enumerate(keys) if own[key] != 1), 0)
    several = sorted(_synsets_of().get(keys[at], ()))
    why = "has more than one class" if own[keys[at]] > 1 else "does not know class"
    hint = f" ({wanted[at]} may be {' or '.join(several)}: name it by its synset)" if len(several) > 1 else ""
    return UserError(
        f"{owner} {why} {wanted[at]}{hint}",
        expected=f"each of the data set's {len(wanted)} classes once among the network's, by name",
        found=f"{len(names)} classes: {_some(names)}",
        remedy="give a network that was trained on these classes" + possible,
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
