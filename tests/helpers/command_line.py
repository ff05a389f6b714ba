"""Runs the command line in this process."""

import pytest

from deitfast.cli import main
from deitfast.progress import LOGGERS


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run deitfast in this process; return exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    for logger in LOGGERS:
        logger.handlers = []  # they write to this test's streams, which end with it
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    return int(stopped.value.code or 0), printed.out, printed.err
