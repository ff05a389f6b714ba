"""What is done to arguments and environment before a command sees them."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import DeitfastError, UserError
from pipelines.workers import local_rank


def expand_home(argument: str) -> str:
    """Return an argument with the home folder for a leading ~, also behind a =, where a shell leaves it as it is."""
    return re.sub(r"(?<==)~(?=/|$)|^~(?=/|$)", lambda _: str(Path.home()), argument, count=1)


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what no option takes: an empty argument (a shell variable that is not set), or bytes that are no text.

    Raises:
        UserError: there is one.
    """
    for number, argument in enumerate(arguments):
        if not argument or re.fullmatch(r"--[a-z-]+=", argument):
            before = argument.rstrip("=") or (arguments[number - 1] if number else "deitfast")
            raise UserError(
                f"nothing is given after {before}", found='""', remedy="is a variable of the shell not set?"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # what Python makes of such bytes
            raise UserError(f"{argument!r} is no text in UTF-8", remedy="rename that file or folder")


def check_launcher() -> None:
    """Refuse the variables of a launcher that do not describe a process group: left over from another shell or job.

    Raises:
        UserError: they are no numbers, do not fit each other, or name no address to meet at.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return
    told = " ".join(f"{name}={value}" for name, value in found.items())
    remedy = f"unset {' '.join(found)} for a single process, or start with torchrun"
    try:
        world, rank = int(found.get("WORLD_SIZE", "1")), int(found.get("RANK", "0"))
        local, here = int(found.get("LOCAL_RANK", "0")), int(found.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        raise UserError("the launcher's variables are no numbers", found=told, remedy=remedy) from None
    if not 0 <= rank < world or local < 0 or here < 1:
        raise UserError(f"there is no rank {rank} among {world} processes", found=told, remedy=remedy)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {world}, but {' and '.join(missing)} not set: no launcher started these processes",
            found=told,
            remedy=remedy,
        )


@contextmanager
def told_once() -> Iterator[None]:
    """Have a mistake that every rank of a machine finds by itself be told by its first one alone.

    Raises:
        SystemExit: the mistake's exit code, on the others.
    """
    try:
        yield
    except DeitfastError as error:
        if local_rank() == 0:
            raise
        raise SystemExit(error.exit_code) from None
