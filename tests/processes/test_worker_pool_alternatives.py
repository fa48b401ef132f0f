"""Faults that `hf_rlhf.runtime.worker_pool` survives and the pools of pebble and loky do not.

The other half of each fact, that our pool survives the fault, is in `test_runners`.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import TimeoutError as TimeUp
from pathlib import Path

import pytest

from tests.helpers.paths import environment

pebble = pytest.importorskip("pebble")
loky = pytest.importorskip("loky")


def start_child(file: str) -> None:
    """Start a process, write its id to a file, and hang."""
    Path(file).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)


def spin(file: str) -> None:
    """Write this process's id to a file, and never give up the CPU."""
    Path(file).write_text(str(os.getpid()))
    while True:
        pass


def length(text: str) -> int:
    time.sleep(0.2)
    return len(text)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pebble_leaves_the_children_of_a_call_that_took_too_long(tmp_path):
    """Ours: `test_a_killed_process_takes_its_children_with_it`."""
    file = tmp_path / "pid"
    with pebble.ProcessPool(1, context=multiprocessing.get_context("spawn")) as pool, pytest.raises(TimeUp):
        pool.schedule(start_child, args=[str(file)], timeout=5).result()
    child = int(file.read_text())
    assert is_running(child)
    os.kill(child, 9)


SCRIPT = """
import multiprocessing
import sys

import pebble
from tests.processes.test_worker_pool_alternatives import spin

if __name__ == "__main__":
    pool = pebble.ProcessPool(1, context=multiprocessing.get_context("spawn"))
    pool.schedule(spin, args=[sys.argv[1]], timeout=3).result()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_call_in_pebble_goes_on_when_the_run_is_killed(tmp_path):
    """Ours: `test_processes_give_way_when_their_parent_is_gone`."""
    script, file = tmp_path / "main.py", tmp_path / "pid"
    script.write_text(SCRIPT)
    run = subprocess.Popen([sys.executable, str(script), str(file)], env=environment())
    while not (file.exists() and file.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.wait()
    worker = int(file.read_text())
    time.sleep(5)  # its own limit was 3 s
    assert is_running(worker)
    os.kill(worker, 9)


UNGUARDED = """
import multiprocessing

import pebble
from tests.processes.test_worker_pool_alternatives import length

print("script")
with pebble.ProcessPool(1, context=multiprocessing.get_context("spawn")) as pool:
    print(type(pool.schedule(length, args=["row"]).exception()).__name__)
"""


def test_pebble_runs_the_training_script_again(tmp_path):
    """Ours starts plain interpreters: the script of `test_processes_give_way_when_their_parent_is_gone` has no guard."""
    script = tmp_path / "main.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=120)
    *runs, error = done.stdout.split()
    assert len(runs) > 1, "once more in each worker"
    assert error in ("RuntimeError", "BrokenProcessPool")


def test_loky_loses_every_row_when_one_process_dies():
    """Ours: `test_a_process_that_dies_is_replaced`. Nor has loky a time limit for a call."""
    with loky.ProcessPoolExecutor(2) as pool:
        calls = [pool.submit(os._exit, 139), *(pool.submit(length, text) for text in ("a", "row", "of", "four"))]
        lost = [type(call.exception()).__name__ for call in calls]
    assert lost == ["TerminatedWorkerError"] * 5
