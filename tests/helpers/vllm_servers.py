"""Real vLLM servers, started by `hf-rlhf serve-engine --run` with the Python that the variable VLLM_PYTHON names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.helpers.processes import free_port
from tests.helpers.waits import until

FLAGS = ("--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "64")
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def python_of_vllm() -> str:
    """The Python of vLLM's environment. Skips where there is none."""
    python = os.environ.get("VLLM_PYTHON", "")
    if not python:
        pytest.skip("VLLM_PYTHON names no environment with vLLM: run `make test-engine`")
    return str(Path(python).absolute())


class Vllm:
    """A vLLM server of a model, on a port that it keeps."""

    def __init__(self, model: str, log: Path, *words: str) -> None:
        self.model, self.log, self.port, self.words = model, log, free_port(), words
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["serve-engine", "quickstart", "rollout.use=vllm", f"rollout.url={self.url}", "--model", self.model]
        words += [*self.words, "--python", python_of_vllm(), "--run", *FLAGS]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hf_rlhf", *words],
                env={**os.environ, **VARIABLES},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when it answers."""
        until(self._answers, 300, 0.5, f"vLLM did not start, see {self.log}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"vLLM ended:\n{self.log.read_text()[-3000:]}"
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it at once, with all of its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def serving(model: str, log: Path, *words: str) -> Iterator[Vllm]:
    """A server that answers, while the context is open. `words`: overrides of the recipe that it is started for."""
    server = Vllm(model, log, *words)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
