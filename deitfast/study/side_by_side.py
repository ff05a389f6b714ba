"""Train several runs of a study at once, each in a process of its own; they end with the study, however that ends."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import Queue

from deitfast.interrupt import catching_signals
from deitfast.runtime import Runtime
from deitfast.study.plan import PlannedRun, StudyPlan
from deitfast.study.run import Failures, missing, unfinished
from pipelines.errors import INTERRUPTED, UserError
from pipelines.files import file_lock

log = logging.getLogger("deitfast")


class Children:
    """Processes that train one run each."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ending = False

    def run(self, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        """Run a `deitfast` command to its end; return its exit code and what it wrote.

        Raises:
            KeyboardInterrupt: `end` was called.
        """
        line = [sys.executable, "-m", "deitfast.study.child", str(os.getpid()), *command]
        with self._lock:
            if self._ending:
                raise KeyboardInterrupt
            # a group of its own: of a Ctrl-C a run is told by `end` alone, for a second one would end it unsaved
            child = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
            self._running.add(child)
        written, _ = child.communicate()
        with self._lock:
            self._running.discard(child)
        return child.returncode, written

    def end(self) -> None:
        """Ask all to save and end, and start no others."""
        with self._lock:
            self._ending = True
            for child in self._running:
                child.send_signal(signal.SIGTERM)


def train_side_by_side(
    plan: StudyPlan, jobs: int, devices: int, told: Callable[[Failures], None], runtime: Runtime
) -> Failures:
    """Train as many runs at once, each in a process of its own and, where there are GPUs, on one of its own.

    A run starts when there is a place and what it needs is trained. Where the study is asked to end (Ctrl-C, SIGTERM,
    SIGHUP), all runs save and end first.

    Args:
        plan: the study.
        jobs: runs at once.
        devices: GPUs to deal out; 0: the CPU's cores are shared.
        told: as for `train_all`.
        runtime: this process's.

    Raises:
        KeyboardInterrupt: the study, or one of the runs, was asked to end.
    """
    failures: Failures = {}
    children, places = Children(), Queue[int]()
    for number in range(jobs):
        places.put(number)
    trained: dict[str, Future[None]] = {}

    def train_one(run: PlannedRun) -> None:
        for name in run.needs:
            if name in trained:  # it stands before this one, and so is under way
                trained[name].result()
        reason = missing(run, failures)
        if not reason:
            place = places.get()
            try:
                reason = _in_process(plan, run, children, _environment(place, jobs, devices))
            finally:
                places.put(place)
        if reason:
            log.error("%s failed: %s", run.name, reason)
            failures[run.name] = reason

    left = unfinished(plan)
    # a thread a run: most wait for a place, or for what they need, and hold up nobody meanwhile
    with ThreadPoolExecutor(max(1, len(left))) as pool, catching_signals(runtime) as stop:
        try:
            for run in left:
                trained[run.name] = pool.submit(train_one, run)
            with stop.interruptible():
                for done in as_completed(list(trained.values())):
                    done.result()
                    told(dict(failures))
        except KeyboardInterrupt:
            log.info("the runs save and end; the same command goes on with them")
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
    return failures


def _environment(place: int, jobs: int, devices: int) -> dict[str, str]:
    """Return the environment of a run: its GPU, or its share of the cores."""
    if devices:
        return {**os.environ, "CUDA_VISIBLE_DEVICES": str(place % devices)}
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}


def _in_process(plan: StudyPlan, run: PlannedRun, children: Children, environment: dict[str, str]) -> str:
    """Train a run by its command; return the last thing that it said if it failed."""
    _wait_for_its_folder(plan, run)
    _, *words = plan.command(run)
    log.info("%s: started", run.name)
    code, written = children.run([*words, "--device", plan.options.device], environment)
    if code in (INTERRUPTED, -signal.SIGTERM):
        raise KeyboardInterrupt
    log.info("%s: %s", run.name, "finished" if code == 0 else f"ended with {code}")
    lines = [line for line in written.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return "" if code == 0 else said.removeprefix("error: ") or f"exit code {code}"


def _wait_for_its_folder(plan: StudyPlan, run: PlannedRun) -> None:
    """Wait while another process is in a run's folder: one of a study that was killed may be saving there."""
    folder = plan.folder(run.name)
    try:
        with file_lock(folder, "run"):
            return
    except UserError as error:
        log.info("%s; waiting for it", str(error).partition("\n")[0])
    with file_lock(folder, "run", wait=True):
        pass
