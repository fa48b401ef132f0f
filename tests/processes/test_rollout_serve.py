"""Servers that a run starts itself: they end with it, also when it is killed, and one that is killed comes back.

The module `vllm` of the server's environment is a few lines that run the stub.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hf_rlhf_plugins import _http
from hf_rlhf_plugins.rollout import _vllm_child
from tests.helpers import runs
from tests.helpers.paths import ROOT
from tests.helpers.processes import free_port
from tests.helpers.runs import parameters
from tests.helpers.waits import until

STANDS_IN = """
import json, os, sys, threading
from pathlib import Path
from tests.helpers.vllm_stub import Stub
def main():
    words = sys.argv[1:]
    (Path(__file__).parents[3] / f"started-{os.getpid()}").write_text(json.dumps([words, dict(os.environ)]))
    if "--fails" in words:
        sys.exit("no such model")
    with Stub(Path(words[1]), port=int(words[words.index("--port") + 1])):
        threading.Event().wait()
"""
RUN = """
import sys
from pathlib import Path
from tests.helpers import runs
rollout = {{**runs.SAMPLED, "use": "vllm", "url": {url!r}, "serve": {{"python": sys.executable}}}}
made = runs.trainer(Path({folder!r}), rollout=rollout, training={{"max_steps": 100000, "learning_rate": 0.1}})
print("ready", flush=True)
made.train()
"""


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Where a child finds the module that stands in for vLLM."""
    folder = tmp_path / "path" / "vllm" / "entrypoints" / "cli"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(STANDS_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), str(ROOT)]))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(_vllm_child, "SECONDS", 0.05)


def started(tmp_path: Path) -> list[int]:
    """Processes that were started as servers, in their order."""
    files = sorted((tmp_path / "path").glob("started-*"), key=lambda path: path.stat().st_mtime_ns)
    return [int(path.name.partition("-")[2]) for path in files]


def runs_now(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def trainer(folder: Path, args: tuple[str, ...] = (), **settings: Any) -> Any:
    serve = {"python": sys.executable, "args": list(args)}
    rollout = {**runs.SAMPLED, "use": "vllm", "url": f"http://127.0.0.1:{free_port()}", "serve": serve, **settings}
    return runs.trainer(folder, rollout=rollout, training={"max_steps": 4, "learning_rate": 2.0, "save_strategy": "no"})


@pytest.fixture
def whole(tmp_path) -> Any:
    made = trainer(tmp_path / "whole")
    made.train()
    made.close()
    return parameters(made)


def test_a_server_is_started_and_ended_and_one_that_is_killed_in_mid_run_comes_back_and_changes_nothing(
    tmp_path, whole
):
    (first,) = started(tmp_path)
    assert not runs_now(first), "close ends it"
    made = trainer(tmp_path / "run")
    collect = made.collector.collect

    def killing(index: int) -> Any:
        if index == 1:
            os.killpg(started(tmp_path)[-1], signal.SIGKILL)
        return collect(index)

    made.collector.collect = killing
    made.train()
    made.close()
    _, second, third = started(tmp_path)
    assert not runs_now(second)
    assert not runs_now(third)
    assert torch.equal(whole, parameters(made))


def test_a_server_ends_when_the_training_is_killed(tmp_path):
    script = RUN.format(url=f"http://127.0.0.1:{free_port()}", folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (server,) = started(tmp_path)
    assert runs_now(server)
    process.kill()
    process.wait()
    until(lambda: not runs_now(server), 10, 0.05, "the server did not end")


def test_a_server_that_does_not_start_ends_the_setup_with_its_last_lines(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with status 1. Its last lines:\n(.*\n)*no such model"):
        trainer(tmp_path / "run", ("--fails",))
    assert len(started(tmp_path)) == 1, "a first start is not repeated"


def test_a_port_with_another_server_and_a_python_that_is_missing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_vllm_child, "GRACE", 0.1)
    made = trainer(tmp_path / "run")
    with pytest.raises(ValueError, match="where one answers already"):
        trainer(tmp_path / "other", url=made.algorithm.rollout.url)
    made.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{made.algorithm.rollout.url}/health")
    with pytest.raises(ValueError, match=r"serve.python=/nowhere cannot be run: No such file"):
        trainer(tmp_path / "third", serve={"python": "/nowhere"})
