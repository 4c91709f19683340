"""An engine process ends when its parent is killed without a word."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from server.engine.worker.orphan import end_with_parent


def engine(pipe) -> None:
    assert end_with_parent() is not None
    pipe.send(os.getpid())
    time.sleep(60)


def gateway(pipe) -> None:
    multiprocessing.get_context("spawn").Process(target=engine, args=(pipe,)).start()
    time.sleep(60)


@pytest.mark.slow
def test_a_killed_gateway_takes_its_engine_along():
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    parent = spawn.Process(target=gateway, args=(theirs,))
    parent.start()
    assert ours.poll(30)
    child = ours.recv()
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(child):
        time.sleep(0.1)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_main_process_is_left_alone():
    assert end_with_parent() is None


STALLED = """
import multiprocessing, os, signal, threading, time
from pathlib import Path
from server.config import EngineSettings
from server.engine.vllm import VLLMEngine

child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
starting = threading.Thread(target=child.start)  # as vLLM's core is started
starting.start()
starting.join()
os.kill(child.pid, signal.SIGSTOP)
VLLMEngine(Path(), EngineSettings()).kill()
child.join(10)
assert child.exitcode == -signal.SIGKILL, child.exitcode
"""


def test_an_engine_that_hangs_can_be_killed():
    """In a process of its own: no other engine of the tests is to go along."""
    subprocess.run([sys.executable, "-c", STALLED], check=True, timeout=60)
