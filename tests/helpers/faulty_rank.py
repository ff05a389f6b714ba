"""Runs deitfast with a fault planted on one rank, under torchrun: faulty_rank.py FAULT RANK COMMAND..."""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from deitfast.cli import main
from deitfast.distill.teacher import Teacher
from deitfast.train import checkpointer, trainer
from deitfast.train.step import TrainStep
from pipelines.errors import DeitfastError

AT = 3
"""The fault comes at this step, from 1, counted in the process."""


def plant(fault: str) -> None:
    """Make this process meet `fault`."""
    step, calls = TrainStep.step, []

    def faulty(self: TrainStep, *arguments):
        calls.append(None)
        if fault == "nan forever" and len(calls) >= AT:
            return step(self, *arguments) * float("nan")
        if len(calls) != AT:
            return step(self, *arguments)
        match fault:
            case "nan loss":
                return step(self, *arguments) * float("nan")
            case "nan gradient":
                weight = next(weight for weight in self.model.parameters() if weight.ndim > 1)
                handle = weight.register_hook(lambda gradient: gradient * float("nan"))
                try:
                    return step(self, *arguments)
                finally:
                    handle.remove()
            case "error":
                raise DeitfastError("planted: an image cannot be read")
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "interrupted":
                os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    def full(*arguments: object) -> None:
        raise DeitfastError("planted: the disk is full")

    def faulty_teacher(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        if fault == "teacher" and len(calls) == AT:
            raise DeitfastError("planted: the teacher fails")
        found = logits(self, pixels)
        if fault == "teacher nan":
            self._not_finite += 1
        return found

    TrainStep.step = faulty
    if fault.startswith("teacher"):
        logits, Teacher.logits = Teacher.logits, faulty_teacher
    if fault == "full disk":
        checkpointer.checkpoint.save = full
    if fault == "evaluation":
        trainer.evaluate = full


if __name__ == "__main__":
    planted, rank, *command = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        plant(planted)
    main(command)
