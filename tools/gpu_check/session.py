"""One call of tools/gpu_check: its sections in order, what of them can run, and the record, written as it grows."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from deitfast.environment import environment
from tools.gpu_check import alternatives, augmentation, loading, peer, small, suite, training
from tools.gpu_check.lab import Lab
from tools.gpu_check.record import FORMAT, Figure, Note, Record, Section, save

Run = Callable[[Lab], Iterator[Figure | Note]]


@dataclass(frozen=True)
class Part:
    """A section that may be run."""

    run: Run
    needs: tuple[str, ...] = ()
    """Modules."""
    cuda: bool = False
    """Whether it says anything only on a GPU."""
    alone: bool = False
    """Whether the photographs' bench has to be closed before."""


PARTS: dict[str, Part] = {
    "together": Part(training.together),
    "waiting": Part(training.waiting),
    "trace": Part(training.trace),
    "step": Part(training.step),
    "loader": Part(loading.loader, needs=("nvidia.dali",)),
    "pixels": Part(loading.pixels, needs=("nvidia.dali",)),
    "kernels": Part(augmentation.equality, needs=("triton",)),
    "augment": Part(augmentation.times, needs=("triton",), cuda=True),
    "evaluation": Part(training.evaluation),
    "teacher": Part(peer.teacher),
    "peer": Part(peer.peer, needs=("timm",)),
    "alternatives": Part(alternatives.alternatives),
    "graphs": Part(training.graphs, cuda=True),
    "cifar": Part(small.cifar, alone=True),
    "cifar_ungraphed": Part(small.cifar_ungraphed, alone=True),
    "tests": Part(suite.tests, needs=("pytest", "hypothesis"), alone=True),
}
"""In the order in which they run: what matters most comes first, as time may end."""


@dataclass(frozen=True)
class Wish:
    """What to run, and how long at most."""

    only: tuple[str, ...] = ()
    minutes: float = 0.0
    """After which no section is begun; 0: no limit."""
    command: tuple[str, ...] = ()
    dry: bool = False


class Session:
    """The record as it grows."""

    def __init__(self, lab: Lab, wish: Wish, missing: tuple[str, ...], path: Path, tell: Callable[[Section], None]):
        self.lab, self.wish, self.path, self.tell = lab, wish, path, tell
        self.began = time.monotonic()
        self.record = Record(
            format=FORMAT,
            made=datetime.now().astimezone().isoformat(timespec="seconds"),
            command=wish.command,
            dry=wish.dry,
            device=str(lab.runtime.device),
            machine=json.loads(json.dumps(environment())),
            data={},
            missing=missing,
        )

    def run(self) -> Record:
        """Run what is wished for and possible; a section that fails does not keep the next from running."""
        with closing(self.lab):
            for name, part in PARTS.items():
                if self.wish.only and name not in self.wish.only:
                    continue
                section = self._run(name, part)
                self.tell(section)
        return self.record

    def _run(self, name: str, part: Part) -> Section:
        if reason := left_out(part, self.record.missing, cuda=self.lab.cuda, late=self._late()):
            return self._keep(Section(name, "left out", reason))
        section = Section(name, "failed", "it was under way when this was written")
        others, began = self.record.sections, time.monotonic()
        memory = Memory(self.lab.runtime.device)
        try:
            if part.alone:
                self.lab.release()
            for found in part.run(self.lab):
                section = _with(section, found, time.monotonic() - began, memory)
                self._keep(section, others)
            section = replace(section, outcome="done", reason="")
        except Exception:  # recorded: the next section may still tell something
            section = replace(section, reason=traceback.format_exc())
        return self._keep(replace(section, seconds=time.monotonic() - began), others)

    def _late(self) -> bool:
        return bool(self.wish.minutes) and time.monotonic() - self.began > 60 * self.wish.minutes

    def _keep(self, section: Section, others: tuple[Section, ...] | None = None) -> Section:
        """Put a section behind the `others` (None: all there are), and the record on the disk."""
        others = self.record.sections if others is None else others
        self.record = replace(self.record, data=dict(self.lab.what), sections=(*others, section))
        save(self.record, self.path)
        return section


def left_out(part: Part, missing: tuple[str, ...], *, cuda: bool, late: bool) -> str:
    """Return the reason why a section is not run, "" where it is."""
    if lacks := [name for name in part.needs if name in missing]:
        return f"{', '.join(lacks)} is not installed" if len(lacks) == 1 else f"{', '.join(lacks)} are not installed"
    if part.cuda and not cuda:
        return "it needs a GPU"
    return "--minutes were over" if late else ""


class Memory:
    """The most GPU memory in use since it was made, by torch at any time and by everybody as often as it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._most = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def most(self) -> tuple[int, int]:
        """Return torch's most and everybody's, in bytes; zeros on a CPU."""
        if self._device.type != "cuda":
            return 0, 0
        free, total = torch.cuda.mem_get_info(self._device)
        self._most = max(self._most, total - free)
        return torch.cuda.max_memory_allocated(self._device), self._most


def _with(section: Section, found: Figure | Note, seconds: float, memory: Memory) -> Section:
    own, everybodys = memory.most()
    section = replace(section, seconds=seconds, torch_bytes=own, device_bytes=everybodys)
    if isinstance(found, Note):
        return replace(section, notes=section.notes | {found.name: found.value})
    return replace(section, figures=(*section.figures, found))
