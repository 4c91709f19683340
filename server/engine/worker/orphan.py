"""An engine process that outlives its gateway would hold memory and cores for nothing: it ends itself instead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

_POLL_S = 1.0


def end_with_parent() -> threading.Thread | None:
    """Watch the parent from a daemon thread and kill this process once it is gone (a gateway ended by kill -9 cannot say so).

    Does nothing in a process that multiprocessing did not start, such as an engine inside the gateway's own process.
    """
    if multiprocessing.parent_process() is None:
        return None
    thread = threading.Thread(target=_watch, args=(os.getppid(),), name="deltaworks-parent", daemon=True)
    thread.start()
    return thread


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
