"""CIFAR's size: DeiT-Ti at 32 px with patches of 4, whose steps are so short that starting their kernels counts."""

from collections.abc import Iterator

from deitfast.bench.stages import all_together, device_stages
from deitfast.bench.timing import measure
from tools.gpu_check.lab import Lab, rates, ratio
from tools.gpu_check.record import Figure, Note


def cifar(lab: Lab) -> Iterator[Figure | Note]:
    """Step alone and end to end at several batch sizes, as the recipe has it: with CUDA graphs on a GPU."""
    for batch in lab.scale.batches:
        with lab.small_bench(f"train.batch={batch}") as bench:
            alone, both = measure([device_stages(bench)[-1], all_together(bench)], bench.clock, lab.pace)
            how = "CUDA graphs" if bench.learner.graphs else "no CUDA graphs"
            yield rates(alone, f"step alone, batch {batch}", what=how)
            yield rates(both, f"end to end, batch {batch}", what=f"{bench.loader.name} loader")
            yield ratio(f"end to end, of the step alone, batch {batch}", both, alone)


def cifar_ungraphed(lab: Lab) -> Iterator[Figure | Note]:
    """The middle batch size compiled without CUDA graphs."""
    batch, compiled = lab.scale.batches[len(lab.scale.batches) // 2], "on" if lab.cuda else "off"
    with lab.small_bench(f"train.batch={batch}", f"train.compile={compiled}") as bench:
        (alone,) = measure([device_stages(bench)[-1]], bench.clock, lab.pace)
        yield rates(alone, f"step alone, batch {batch}, no CUDA graphs")
