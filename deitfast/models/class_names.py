"""Whether a model's classes are a data set's, and which of its outputs are which."""

from importlib import resources

from pipelines.errors import UserError

IMAGENET = 1000
"""Outputs of a network that was trained on ImageNet-1k."""


def imagenet_synsets() -> tuple[str, ...]:
    """Return ImageNet-1k's synsets (n01440764, ...) in label order: sorted, as every published network has them."""
    return tuple((resources.files("deitfast") / "models" / "imagenet_synsets.txt").read_text().split())


def require_classes(owner: str, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """Check that a model's classes are the data set's, in the same order.

    Raises:
        UserError: they are not; the message names the first difference.
    """
    if found == expected:
        return
    if len(found) != len(expected):
        what = (f"{len(expected)} classes", f"{len(found)}")
    else:
        first = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        what = (f"class {first} to be {expected[first]}", found[first])
    raise UserError(
        f"{owner} was trained on other classes than this data set has",
        expected=what[0],
        found=what[1],
        remedy="take a model that was trained on the same classes",
    )


def outputs_of(owner: str, names: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...]:
    """Return which of a teacher's outputs stands for each of a data set's classes, by their names.

    Args:
        owner: the teacher, for messages.
        names: its classes in the order of its outputs.
        wanted: the data set's classes in label order.

    Raises:
        UserError: the teacher does not know a class, or has two of that name.
    """
    places = {name: place for place, name in enumerate(names)}
    for name in wanted:
        if name not in places or names.count(name) > 1:
            why = "does not know" if name not in places else "has more than one"
            raise UserError(
                f"{owner} {why} class {name}",
                expected=f"each of the data set's {len(wanted)} classes once among the teacher's, by name",
                found=f"{len(names)} classes: {', '.join(names[:3])}, ...",
                remedy="take a teacher that was trained on the same classes",
            )
    return tuple(places[name] for name in wanted)
