"""What becomes of the other ranks when one fails: they hear why, and end within a minute.

A rank that raises puts its message into the store that all ranks reach. A rank that is killed stops its heartbeat.
Either way every other rank knows which one it was, even where it is blocked in a collective: a thread looks for it.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from torch.distributed.distributed_c10d import Store

from pipelines.errors import DeitfastError
from pipelines.workers import local_rank

BEAT_SECONDS = 1.0
"""How often a rank says that it lives, and looks for the others."""
LOST_SECONDS, SUSPECT_SECONDS = 30.0, 5.0
"""A rank that has said nothing for so long is taken for dead; the second where a collective has failed already."""
LEAVE_SECONDS = 10.0
"""Time that a rank has to end by itself once another has failed; then its watch ends it."""
FAILED, DONE = "failed", "done"


class RankFailedError(DeitfastError):
    """Another rank failed, or was lost."""


@dataclass(frozen=True)
class RankFailure:
    """Which rank ended the run, and why."""

    rank: int
    host: str
    message: str
    exit_code: int = 1


class RankWatch:
    """A thread on every rank: sends this rank's heartbeat, and notices when another rank failed or was lost."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        """Watch the ranks 0 .. `world` - 1, of which this is `rank`, through `store`."""
        self._store, self.rank = store, rank
        self._peers = [number for number in range(world) if number != rank]
        self._over, self._known = Event(), Event()
        self._patience = LOST_SECONDS
        self._failure: RankFailure | None = None
        self._thread = Thread(target=self._run, name="deitfast-rank-watch", daemon=True)

    def __enter__(self) -> "RankWatch":
        self._store.set(f"beat/{self.rank}", "0")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS)
        with suppress(RuntimeError):  # the store's own process may have left before
            self._store.set(f"beat/{self.rank}", DONE)

    def publish(self, message: str, exit_code: int) -> bool:
        """Tell all ranks that this one failed; return whether it is the first."""
        own = json.dumps(asdict(RankFailure(self.rank, socket.gethostname(), message, exit_code)))
        with suppress(RuntimeError):
            return self._store.compare_set(FAILED, "", own) == own.encode()
        return True

    def failure(self, seconds: float) -> RankFailure | None:
        """Return which rank failed, waiting for so long to know it; None: none is known."""
        if seconds:
            self._patience = SUSPECT_SECONDS
        self._known.wait(seconds)
        return self._failure

    def _run(self) -> None:
        beats, seen = 0, {peer: (b"", time.monotonic()) for peer in self._peers}
        reached = time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            beats += 1
            now = time.monotonic()
            try:
                self._store.set(f"beat/{self.rank}", str(beats))
                failure = self._published()
                for peer in self._peers:
                    if not self._store.check([f"beat/{peer}"]):
                        continue
                    beat = self._store.get(f"beat/{peer}")
                    if beat != seen[peer][0]:
                        seen[peer] = beat, now
                reached = now
            except RuntimeError as error:  # the store is gone, and with it the process or machine that keeps it
                failure = None
                if now - reached > self._patience:
                    failure = RankFailure(0, "?", f"its store cannot be reached: {str(error).splitlines()[0]}")
            silent = {peer: now - when for peer, (beat, when) in seen.items() if beat != DONE.encode()}
            lost = [peer for peer, seconds in silent.items() if seconds > self._patience]
            if failure is None and lost:
                message = f"no sign of life for {silent[lost[0]]:.0f} s: it was killed, or its machine is gone"
                failure = RankFailure(lost[0], "?", message)
            if failure:
                self._failure = failure
                self._known.set()
                if not self._over.wait(LEAVE_SECONDS):
                    tell(failure)
                    os._exit(failure.exit_code)
                return

    def _published(self) -> RankFailure | None:
        """Return what another rank has published, if any."""
        if not self._store.check([FAILED]):
            return None
        found = RankFailure(**json.loads(self._store.get(FAILED)))
        return found if found.rank != self.rank else None


@contextmanager
def failures_named(watch: RankWatch) -> Iterator[None]:
    """Have an error in the block reach all ranks, and be told once: by the rank that it happened on.

    Raises:
        RankFailedError: another rank is why the block could not go on; on rank 0 of each other machine.
        SystemExit: the same, on all other ranks: silent, as the message stands elsewhere.
    """
    try:
        yield
    except KeyboardInterrupt as request:  # all ranks have agreed on it
        _write_torchrun_file(f"{request}: stopped; the same command with --resume continues the run")
        raise
    except Exception as error:
        lost = _is_connection_error(error)
        if lost:  # torchrun ends all ranks when one dies, and this one still has something to say
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # a collective fails on every rank when one of them goes: give that one's message time to come
        blamed = watch.failure(LOST_SECONDS if lost else 0)
        if blamed is None:
            text = str(error) if isinstance(error, DeitfastError) else f"{type(error).__name__}: {error}"
            if watch.publish(text, getattr(error, "exit_code", 1)):
                _write_torchrun_file(f"rank {watch.rank}: {text}")
                raise
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        if blamed.host == socket.gethostname() or local_rank() != 0:
            raise SystemExit(blamed.exit_code) from None
        remedy = "mend the cause, then start the same command with --resume"
        told = RankFailedError(sentence(blamed), remedy=remedy)
        _write_torchrun_file(str(told))
        raise told from None


def sentence(failure: RankFailure) -> str:
    """Return a failure in a sentence."""
    where = f" on {failure.host}" if failure.host != "?" else ""
    return f"rank {failure.rank}{where} failed, and all ranks stop: {failure.message}"


def tell(failure: RankFailure) -> None:
    """Write a failure to standard error, from a process that cannot end in any other way."""
    sys.stderr.write(f"error: {sentence(failure)}\n")
    sys.stderr.flush()


def _is_connection_error(error: Exception) -> bool:
    text = str(error).lower()
    return (
        not isinstance(error, DeitfastError)
        and isinstance(error, RuntimeError)
        and any(word in text for word in ("connection", "gloo", "nccl", "peer", "socket", "timed out", "store"))
    )


def _write_torchrun_file(text: str) -> None:
    """Have torchrun's own last lines show the message instead of an exit code."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        tree = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(json.dumps(tree))
