"""The command line. Heavy imports stay inside the commands, so that --help comes at once."""

import io
import os
import sys

import typer

from deitfast.cli import data, evaluate, inspect, train
from deitfast.cli.app import app, err
from pipelines.errors import DeitfastError

__all__ = ["data", "evaluate", "inspect", "main", "train"]  # importing them is what gives the app its commands
ClickException = typer.BadParameter.__bases__[0].__bases__[0]  # click's own, or the copy that newer Typer carries
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class may have a name that the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    sys.exit(_run(arguments) if debug else _run_quietly(arguments))


def _run(arguments: list[str]) -> int:
    return int(app(arguments, standalone_mode=False) or 0)


def _run_quietly(arguments: list[str]) -> int:
    """Run without tracebacks: every error becomes a short message and an exit code."""
    try:
        code = _run(arguments)
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this code
            err.print("interrupted")
        return code
    except DeitfastError as error:
        err.print(f"[red]error:[/red] {_escaped(error)}", highlight=False, soft_wrap=True)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        err.print("interrupted")
        return INTERRUPTED
    except ClickException as error:  # pyright: ignore[reportGeneralTypeIssues]
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        return error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit stays quiet
        return 1
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        err.print(f"[red]error:[/red] {_escaped(message)}", highlight=False, soft_wrap=True)
        err.print("  this should not happen; --debug shows where it did", highlight=False)
        return 1


def _escaped(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))
