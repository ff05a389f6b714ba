"""One call of tools/gpu_check: its sections in order, which of them can run, and the record, written as it grows."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deitfast.bench.record import BenchRecord, Figure, Section, new_record, save
from tools.gpu_check import augmentation, baseline, loading, suite, training
from tools.gpu_check.context import Context, Note


@dataclass(frozen=True)
class SectionSpec:
    """A section that may be run."""

    run: Callable[[Context], Iterator[Figure | Note]]
    needs: tuple[str, ...] = ()
    """Modules."""
    cuda: bool = False
    """Whether it says anything only on a GPU."""
    alone: bool = False
    """Whether the photographs' workbench has to be closed before."""


SECTIONS: dict[str, SectionSpec] = {
    "together": SectionSpec(training.together),
    "waiting": SectionSpec(training.waiting),
    "trace": SectionSpec(training.trace),
    "step": SectionSpec(training.step),
    "loader": SectionSpec(loading.loader, needs=("nvidia.dali",)),
    "pixels": SectionSpec(loading.pixels, needs=("nvidia.dali",)),
    "kernels": SectionSpec(augmentation.equality, needs=("triton",)),
    "augment": SectionSpec(augmentation.times, needs=("triton",), cuda=True),
    "evaluation": SectionSpec(training.evaluation),
    "teacher": SectionSpec(baseline.teacher),
    "baseline": SectionSpec(baseline.baseline, needs=("timm",)),
    "alternatives": SectionSpec(training.alternatives),
    "graphs": SectionSpec(training.graphs, cuda=True),
    "cifar": SectionSpec(training.cifar, alone=True),
    "cifar_ungraphed": SectionSpec(training.cifar_ungraphed, alone=True),
    "tests": SectionSpec(suite.tests, needs=("pytest", "hypothesis"), alone=True),
}
"""In the order in which they run: what matters most comes first, as time may end."""


class Runner:
    """Runs sections and keeps the record on the disk as it grows; a section that fails does not stop the next."""

    def __init__(
        self,
        context: Context,
        sections: Mapping[str, SectionSpec],
        missing: tuple[str, ...],
        path: Path,
        command: tuple[str, ...] = (),
        *,
        minutes: float = 0.0,
    ) -> None:
        """Prepare a record at `path`; no section is begun after `minutes` (0: no limit)."""
        self.context, self.sections, self.missing, self.path = context, sections, missing, path
        self.minutes, self.start = minutes, time.monotonic()
        self.record = new_record("gpu_check", command)

    def run(self, on_section: Callable[[Section], None] = lambda section: None) -> BenchRecord:
        """Run every section that can run, tell of each when it ends, and return the record."""
        with closing(self.context):
            for name, spec in self.sections.items():
                on_section(self._run(name, spec))
        return self.record

    def _run(self, name: str, spec: SectionSpec) -> Section:
        late = bool(self.minutes) and time.monotonic() - self.start > 60 * self.minutes
        others = self.record.sections
        if reason := why_left_out(spec, self.missing, cuda=self.context.cuda, late=late):
            return self._keep(Section(name, "left out", reason), others)
        section = Section(name, "failed", "it was under way when this was written")
        start, memory = time.monotonic(), PeakMemory(self.context.runtime.device)
        try:
            if spec.alone:
                self.context.close_photos_bench()
            for found in spec.run(self.context):
                torch_bytes, device_bytes = memory.peaks()
                seconds = time.monotonic() - start
                section = replace(section, seconds=seconds, torch_bytes=torch_bytes, device_bytes=device_bytes)
                if isinstance(found, Note):
                    section = replace(section, notes=section.notes | {found.name: found.value})
                else:
                    section = replace(section, figures=(*section.figures, found))
                self._keep(section, others)
            section = replace(section, outcome="done", reason="")
        except Exception:  # recorded: the next section may still tell something
            section = replace(section, reason=traceback.format_exc())
        return self._keep(replace(section, seconds=time.monotonic() - start), others)

    def _keep(self, section: Section, others: tuple[Section, ...]) -> Section:
        """Put a section behind the others, and the record on the disk."""
        notes = [f"device: {self.context.runtime.device}", *self.context.inputs]
        if self.missing:
            notes.append(f"not installed: {', '.join(self.missing)}")
        self.record = replace(self.record, sections=(*others, section), notes=tuple(notes))
        save(self.record, self.path)
        return section


def why_left_out(spec: SectionSpec, missing: tuple[str, ...], *, cuda: bool, late: bool) -> str:
    """Return the reason why a section is not run, "" where it is."""
    if lacks := [name for name in spec.needs if name in missing]:
        return f"{', '.join(lacks)} is not installed" if len(lacks) == 1 else f"{', '.join(lacks)} are not installed"
    if spec.cuda and not cuda:
        return "it needs a GPU"
    return "--minutes were over" if late else ""


class PeakMemory:
    """The most GPU memory in use since it was made: by torch at any time, by all programs at calls of `peaks`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._most = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peaks(self) -> tuple[int, int]:
        """Return torch's peak and that of all programs, in bytes; zeros on a CPU."""
        if self._device.type != "cuda":
            return 0, 0
        free, total = torch.cuda.mem_get_info(self._device)
        self._most = max(self._most, total - free)
        return torch.cuda.max_memory_allocated(self._device), self._most
