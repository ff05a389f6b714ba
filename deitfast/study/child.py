"""A run of a study, which ends with it, also where that is killed: `python -m deitfast.study.child PARENT COMMAND`."""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when the thread that started it ends."""


def main() -> None:
    """Run a `deitfast` command; a study that ends first ends it as SIGTERM does: it saves, and can be resumed."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        sys.exit(128 + signal.SIGTERM)
    sys.argv = ["deitfast", *command]
    runpy.run_module("deitfast", run_name="__main__")


if __name__ == "__main__":
    main()
