"""One network's tensors inside whatever a training program saved: dicts in dicts, wrappers' prefixes, averages."""

import logging
import re
from collections.abc import Iterable, Mapping
from posixpath import commonprefix
from typing import Any

from torch import Tensor

from pipelines.errors import UserError

log = logging.getLogger(__name__)
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|avg|shadow|teacher|momentum)([._]|$)")
"""Parts of a name that say that averaged weights follow: model_ema, state_dict_ema, ema.model, teacher, ..."""
WRAPPERS = re.compile(r"(?:^|(?<=\.))_(?:orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module|forward_module)\.")
"""What torch.compile, activation checkpointing, FSDP and DeepSpeed put into names, inside a network as well."""
DEPTH = 8
"""Dicts in dicts that are looked into."""


def flatten(tree: Mapping[Any, Any], prefix: str = "", depth: int = DEPTH) -> dict[str, Tensor]:
    """Return all tensors of nested dicts under dotted names: {"model": {"a.b": t}} gives {"model.a.b": t}."""
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping) and depth:
            found |= flatten(value, f"{prefix}{key}.", depth - 1)
    return found


def select_network(
    tensors: dict[str, Tensor], anchors: Iterable[str], owner: object, *, ema: bool
) -> dict[str, Tensor]:
    """Return the tensors of the one network among `tensors`, without what stands before all its names.

    A network is wherever one of `anchors` is, whatever stands before it: `module.`, `_orig_mod.`, `model.`, the keys
    of the dicts that it was saved in, in any nesting; `WRAPPERS` inside its names do not count. Of several the plain
    weights are taken, or the averaged ones.

    Args:
        tensors: what `flatten` returned.
        anchors: names of which every network that may be meant has one.
        owner: the file, for messages.
        ema: take the averaged weights.

    Returns:
        Its tensors; all of `tensors` where no anchor is among them.

    Raises:
        UserError: no averaged weights, or several networks that are equally meant.
    """
    longest_first = sorted(anchors, key=len, reverse=True)
    tensors = {WRAPPERS.sub("", name): value for name, value in tensors.items()}
    prefixes = {prefix for name in tensors if (prefix := _before(name, longest_first)) is not None}
    above = _common_parent(prefixes)  # of ema.online_model and ema.ema_model the second is averaged
    averaged = {prefix for prefix in prefixes if _is_averaged(prefix, tensors, above)}
    averaged = averaged or {prefix for prefix in prefixes if _is_averaged(prefix, tensors)}
    chosen = averaged if ema else prefixes - averaged or averaged
    if ema and not averaged:
        raise UserError(f"{owner} has no averaged weights", remedy="leave --ema out")
    if not chosen:
        return tensors
    if len(chosen) > 1:
        raise UserError(
            f"{owner} holds several networks",
            expected="the weights of one, or plain and averaged ones of one",
            found=", ".join(sorted(prefix.rstrip(".") or "(no prefix)" for prefix in chosen)),
            remedy="save the state_dict of the one that is meant",
        )
    (prefix,) = chosen
    others = tuple(other for other in prefixes - {prefix} if other.startswith(prefix))
    inside = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    if others:
        inside = {name: value for name, value in inside.items() if not name.startswith(others)}
    if averaged and not ema and chosen == averaged:
        log.info("%s: its averaged weights (%s) are taken, there are no others", owner, prefix.rstrip("."))
    return {name.removeprefix(prefix): value for name, value in inside.items()}


def _before(name: str, anchors: list[str]) -> str | None:
    """Return what stands before the first of `anchors` that a name ends with; None where it ends with none."""
    for anchor in anchors:
        if name == anchor or name.endswith(f".{anchor}"):
            return name[: len(name) - len(anchor)]
    return None


def _common_parent(prefixes: set[str]) -> str:
    """Return the dicts that several networks lie in together, dotted; "" for a single one."""
    shared = commonprefix(list(prefixes)) if len(prefixes) > 1 else ""
    return shared[: shared.rfind(".") + 1]


def _is_averaged(prefix: str, tensors: dict[str, Tensor], above: str = "") -> bool:
    """Whether a prefix says so below `above`, or torch's AveragedModel, which counts its updates, stands before it."""
    if AVERAGED.search(prefix.removeprefix(above).rstrip(".")):
        return True
    outside = prefix.removesuffix("module.")
    return outside != prefix and f"{outside}n_averaged" in tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the names of tensors with NaN or infinite values and how many each has; "" where all are finite."""
    bad = []
    for name, value in tensors.items():
        if value.is_floating_point() and (count := int((~value.isfinite()).sum())):
            bad.append(f"{name} ({count:,} of {value.numel():,})")
    return listed(bad)


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return names in one line, the first few of them where they are many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
