"""The command line. Heavy imports stay inside the commands, so that --help comes at once."""

import errno
import io
import os
import sys

import typer

from deitfast.cli import data, evaluate, inspect, study, train
from deitfast.cli.app import app, err, sort_commands
from deitfast.cli.arguments import check_arguments, check_launcher, expand_home
from pipelines.errors import INTERRUPTED, DeitfastError
from pipelines.files import DISK_FULL, TOO_MANY_FILES, os_remedy

__all__ = ["data", "evaluate", "inspect", "main", "study", "train"]  # importing them is what gives the app its commands
ClickException = typer.BadParameter.__bases__[0].__bases__[0]  # click's own, or the copy that newer Typer carries

sort_commands()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.

    Every error becomes a short message and an exit code; with --debug a traceback comes instead.
    """
    arguments = [expand_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class may have a name that the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    code = 1
    try:
        check_arguments(arguments)
        check_launcher()
        code = int(app(arguments, prog_name="deitfast", standalone_mode=False) or 0)
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this code
            err.print("interrupted")
    except BaseException as error:
        if debug or isinstance(error, SystemExit):
            raise
        code = _tell(error)
    sys.exit(code)


def _tell(error: BaseException) -> int:
    """Say what went wrong and return the exit code."""
    from rich.markup import escape

    if isinstance(error, DeitfastError):
        err.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return error.exit_code
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        err.print("interrupted")
        return INTERRUPTED
    if isinstance(error, ClickException):
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit stays quiet
        return 1
    if isinstance(error, MemoryError):
        return _tell(DeitfastError("out of memory", found=str(error), remedy="free some, or lower --batch"))
    if isinstance(error, OSError) and error.errno in (*DISK_FULL, *TOO_MANY_FILES, errno.ENOMEM, errno.EIO):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return _tell(DeitfastError(what, remedy=os_remedy(error)))  # of the machine, wherever it was met
    err.print(f"[red]error:[/red] {escape(f'{type(error).__name__}: {error}')}", highlight=False, soft_wrap=True)
    err.print("  internal error, please report; rerun with --debug for a traceback", highlight=False)
    return 1
