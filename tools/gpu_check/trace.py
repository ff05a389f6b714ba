"""A profiler's trace in figures: how busy the GPU was and with what, what overlapped, and where the host waited."""

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events that occupy the GPU, as torch.profiler names them."""
AUGMENTING = ("make_table", "apply_filter", "apply_rotate", "apply_move", "write_pixels")
"""The augmentation kernels; the stream that they run on is the step's."""
ON_HOST = ("cuda_runtime", "cuda_driver")
"""Categories of the host's calls to CUDA."""
STEP = "deitfast step"
"""Name under which the training loop's steps are annotated in a trace."""
SYNCHRONIZING = ("DeviceSynchronize", "StreamSynchronize", "EventSynchronize", "CtxSynchronize")
"""Parts of the names of calls that wait for the GPU."""
ALLOCATING = ("Malloc", "HostAlloc", "MemAlloc", "HostRegister", "HostUnregister", "Free")
"""Parts of the names of calls that allocate or free, most of which wait for the GPU as well."""
ASYNCHRONOUS = "Async"
"""Part of the names of their kind that do not wait."""
SHOWN = 12
"""Kernels and gaps that a summary names."""
Span = tuple[float, float]
"""Begin and end, in microseconds."""


@dataclass(frozen=True)
class Event:
    """Something that ran on a stream."""

    name: str
    stream: int
    span: Span

    @property
    def length(self) -> float:
        """Microseconds."""
        return self.span[1] - self.span[0]


def read(path: Path, categories: tuple[str, ...] = ON_GPU) -> list[Event]:
    """Return the events of some categories of a Chrome trace, gzipped or not, by their begin."""
    found = [
        Event(
            each["name"], int(each.get("args", {}).get("stream", each["tid"])), (each["ts"], each["ts"] + each["dur"])
        )
        for each in _tree(path)["traceEvents"]
        if each.get("ph") == "X" and each.get("cat") in categories
    ]
    return sorted(found, key=lambda event: event.span)


@dataclass(frozen=True)
class Waits:
    """Calls, name -> how many, that make the host wait for the GPU while training steps run."""

    loop: dict[str, int]
    """In the thread of the training loop, allocations included: it cannot run ahead of the GPU then."""
    others: dict[str, int]
    """In other threads: a loader's may wait for its own work."""
    allocations: dict[str, int]
    """In other threads: they may hold up every thread."""


def read_waits(path: Path) -> Waits:
    """Return the waits in a trace between the start of the first step that is annotated STEP and the end of the last.

    Raises:
        ValueError: no step is annotated.
    """
    tree = _tree(path)
    steps = [each for each in tree["traceEvents"] if each.get("name") == STEP and each.get("cat") == "user_annotation"]
    if not steps:
        raise ValueError(f"no event of {path} is called {STEP}")
    start, end = min(each["ts"] for each in steps), max(each["ts"] + each["dur"] for each in steps)
    found = Waits({}, {}, {})
    for each in tree["traceEvents"]:
        name = each.get("name", "")
        if each.get("cat") not in ON_HOST or not start <= each["ts"] < end or ASYNCHRONOUS in name:
            continue
        allocates = any(part in name for part in ALLOCATING)
        if allocates or name == "cudaMemcpy" or any(part in name for part in SYNCHRONIZING):
            in_loop = each["tid"] == steps[0]["tid"]
            counts = found.loop if in_loop else found.allocations if allocates else found.others
            counts[name] = counts.get(name, 0) + 1
    return found


def _tree(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def summary(events: list[Event]) -> dict[str, Any]:
    """Return what a trace says: shares are of the time from the first event's begin to the last one's end.

    The GPU's own JPEG decoder is no multiprocessor's work: what it does is not in a trace, only what surrounds it.

    Returns:
        seconds, busy, longest_gaps_us, kernels (name -> share of all kernel time), streams (stream -> busy, events,
        mostly), and busy of each part: step, augmentation, loader, and overlap: the share of the loader's work
        that ran while the step's stream was busy as well.
    """
    if not events:
        return {"seconds": 0.0, "busy": 0.0, "longest_gaps_us": [], "kernels": {}, "streams": {}, "parts": {}}
    begin, end = events[0].span[0], max(event.span[1] for event in events)
    length = max(end - begin, 1e-9)
    busy = union(event.span for event in events)
    gaps = sorted((after[0] - before[1] for before, after in pairwise(busy)), reverse=True)
    total, spent = sum(event.length for event in events) or 1e-9, Counter[str]()
    for event in events:
        spent[event.name] += event.length  # pyright: ignore[reportArgumentType]
    return {
        "seconds": length / 1e6,
        "busy": covered(busy) / length,
        "longest_gaps_us": [round(gap, 1) for gap in gaps[:SHOWN]],
        "kernels": {name: time / total for name, time in spent.most_common(SHOWN)},
        "streams": {str(stream): _stream(events, stream, length) for stream in sorted({e.stream for e in events})},
        "parts": _parts(events, length),
    }


def _stream(events: list[Event], stream: int, length: float) -> dict[str, Any]:
    own, spent = [event for event in events if event.stream == stream], Counter[str]()
    for event in own:
        spent[event.name] += event.length  # pyright: ignore[reportArgumentType]
    mostly = [name for name, _ in spent.most_common(3)]
    return {"busy": covered(union(event.span for event in own)) / length, "events": len(own), "mostly": mostly}


def _parts(events: list[Event], length: float) -> dict[str, float]:
    """Tell step, augmentation and loader apart: by kernel names first, then by the stream they run on."""
    augmenting = [event for event in events if event.name.startswith(AUGMENTING)]
    streams = {event.stream for event in augmenting}
    if not streams:  # augmentation in torch: the step's stream is the one with most to do
        spent = Counter[int]()
        for event in events:
            spent[event.stream] += event.length  # pyright: ignore[reportArgumentType]
        streams = {spent.most_common(1)[0][0]}
    main = union(event.span for event in events if event.stream in streams)
    step = union(event.span for event in events if event.stream in streams and not event.name.startswith(AUGMENTING))
    loader = union(event.span for event in events if event.stream not in streams)
    both = covered(main) + covered(loader) - covered(union([*main, *loader]))
    return {
        "step": covered(step) / length,
        "augmentation": covered(union(event.span for event in augmenting)) / length,
        "loader": covered(loader) / length,
        "overlap": both / covered(loader) if loader else 0.0,
    }


def union(spans: Iterable[Span]) -> list[Span]:
    """Return overlapping and touching spans joined, in rising order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def covered(spans: Iterable[Span]) -> float:
    """Return the length of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)
