"""Other ways to feed the same step: what a change of setting would bring end to end, in turns with the step alone."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from deitfast.bench.stages import all_together, device_stages
from deitfast.bench.timing import Work, measure
from pipelines.loaders.factory import why_not
from tools.gpu_check.lab import Lab, ratio
from tools.gpu_check.record import Figure, Note

SETTINGS = {
    "dali": (
        *(f"loader.hw_decoder_load={share}" for share in ("0.0", "0.3", "0.65", "0.9", "1.0")),
        "loader.prefetch=4",
    ),
    "cpu": ("loader.name=cpu",),
}
"""What is changed, by the loader that it asks for: the decoder's share in company of the step, which may not be the
best one without; more runs under way; decoding on the host, which leaves the GPU to the step."""
URGENT = -1
"""Priority of a CUDA stream whose kernels go before those of the others; torch's and DALI's streams have 0."""


def alternatives(lab: Lab) -> Iterator[Figure | Note]:
    """End to end with one setting changed at a time, as a share of the step alone."""
    with ExitStack() as stack:
        works = {"as it is": all_together(lab.bench)}
        for loader, settings in SETTINGS.items():
            for setting in settings if not why_not(loader) else ():
                works[setting] = all_together(stack.enter_context(closing(lab.bench.changed([setting]))))
        if lab.cuda:
            works["the step on a stream of high priority"] = urgent(works["as it is"], lab.runtime.device)
        alone, *found = measure([device_stages(lab.bench)[-1], *works.values()], lab.bench.clock, lab.pace)
    for name, each in zip(works, found, strict=True):
        yield ratio(f"of the step alone: {name}", each, alone)


def urgent(work: Work, device: torch.device) -> Work:
    """Return the same work on a stream whose kernels go before the loader's."""
    stream = torch.cuda.Stream(device, priority=URGENT)

    def call() -> object:
        usual = torch.cuda.current_stream(device)
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            result = work.call()
        usual.wait_stream(stream)
        return result

    return replace(work, call=call)
