"""vLLM servers that a run starts itself: children of its first process, which end with it, also when it is killed.

Each is kept by a thread: one that ends in mid-run is started again, with the weights of its command line, which its version
shows, so that the run's are sent again. A child looks for its parent twice a second (`hf_rlhf_vllm_worker`).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hf_rlhf.axes import LoraSettings, ModelSettings, Positive

if TYPE_CHECKING:
    from hf_rlhf.axes import Context

logger = logging.getLogger(__name__)

HERE = ("127.0.0.1", "localhost", "::1")
SECONDS = 0.5
"""Seconds between two looks at a server."""
STARTS = 3
"""Consecutive starts without an answer after which a child is not started again."""
GRACE = 10.0
"""Seconds in which a child may end by itself, and in which a port that the last run's server had becomes free."""
LINES = 15
DISTRIBUTED = (
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|ACCELERATE_.*|VIRTUAL_ENV|PYTHONHOME"
)
"""Variables of the training's processes, which vLLM would take for its own."""
PARENT = "HF_RLHF_PARENT"
"""Variable with the process that a child ends with."""


@dataclass(kw_only=True)
class Serve:
    """VLLM servers that a run starts on the machine of its first process."""

    python: str
    """Python of the environment that vLLM is installed in."""
    devices: list[int] | None = None
    """Numbers of the GPUs that the servers get, in equal shares; None: all that the training's process sees."""
    args: list[str] = field(default_factory=list)
    """Further arguments of `vllm serve`, such as --gpu-memory-utilization."""
    timeout: Positive = 600.0
    """Seconds in which a server has to answer, loading its model included."""

    def problems(self, urls: Sequence[str]) -> list[str]:
        """Return why these servers cannot be started."""
        found = [
            f"serve starts a server on this machine, and url names {url}. Set url=http://127.0.0.1:8000, or leave serve out"
            for url in urls
            if urlsplit(url).hostname not in HERE
        ]
        if self.devices is not None and (not self.devices or len(self.devices) % len(urls)):
            found.append(
                f"serve.devices must be as many for each of {len(urls)} servers, got {len(self.devices)}. Set serve.devices=[0]"
            )
        return found

    def placed(self, number: int, of: int) -> tuple[dict[str, str], list[str]]:
        """Return variables and further arguments of server `number` of several."""
        if self.devices is None:
            return {}, self.args
        each = len(self.devices) // of
        own = self.devices[number * each : (number + 1) * each]
        names = {word.partition("=")[0] for word in self.args}
        split = each > 1 and not names & {"--tensor-parallel-size", "-tp"}
        parallel = ["--tensor-parallel-size", str(each)] if split else []
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}, [*parallel, *self.args]


def expanded(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with a server's variables; its PYTHONPATH stands before the one that is there."""
    found = {name: value for name, value in os.environ.items() if not re.fullmatch(DISTRIBUTED, name)}
    for name, value in variables.items():
        found[name] = os.environ.get(value[1:], "") if re.fullmatch(r"\$\w+", value) else value
    if "PYTHONPATH" in variables and os.environ.get("PYTHONPATH"):
        found["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return found


def served(context: Context, folder: Path) -> ModelSettings:
    """Return the model that a server starts with: the policy's own folder or name, or what is saved into `folder`."""
    policy, tokenizer = context.policy, context.tokenizer
    assert policy is not None
    assert tokenizer is not None
    path, commit = policy.config.name_or_path, getattr(policy.config, "_commit_hash", None)
    if not path or not (Path(path).is_dir() or commit):
        if hasattr(policy, "peft_config"):
            raise ValueError(
                "rollout.serve needs the folder or name of the model below an adapter, got none. Set model.path"
            )
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return ModelSettings(path=str(folder))
    known = Path(tokenizer.name_or_path).is_dir() or "/" in tokenizer.name_or_path
    adapters = getattr(policy, "peft_config", {}).values()
    return ModelSettings(
        path=path,
        revision=None if Path(path).is_dir() else commit,
        tokenizer=tokenizer.name_or_path if known else None,
        lora=LoraSettings(r=max(adapter.r for adapter in adapters)) if adapters else None,
    )


def answers(url: str) -> bool:
    """Return whether the server at a URL of this machine is healthy."""
    import httpx

    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Child:
    """A server that is started, kept and ended."""

    def __init__(self, url: str, words: Sequence[str], variables: Mapping[str, str], log: Path, timeout: float) -> None:
        self.url, self.words, self.log, self.timeout = url, list(words), log, timeout
        self.variables = {**expanded(variables), PARENT: str(os.getpid())}
        self.starts = 0
        self._read = False
        self.problem: str | None = None
        """Reason for not starting it again."""
        self._closing, self._ready = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="vLLM", daemon=True)

    def start(self) -> None:
        """Start it. Raises `ValueError` where something else has its port, or there is no such Python."""
        until = time.monotonic() + GRACE
        while answers(self.url):  # the server of a run that was killed a moment ago ends
            if time.monotonic() > until:
                raise ValueError(
                    f"rollout.serve starts a server at {self.url}, where one answers already. End it, choose another port "
                    "in rollout.url, or leave rollout.serve out"
                )
            time.sleep(SECONDS)
        self._begin()
        self._thread.start()

    def _begin(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    self.words,
                    env=self.variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise ValueError(f"rollout.serve.python={self.words[0]} cannot be run: {error.strerror}") from error

    def _keep(self) -> None:
        silent = 0
        while True:
            assert self._process is not None
            while (code := self._process.poll()) is None:
                if self._closing.wait(SECONDS):
                    return
                if not self._ready.is_set() and answers(self.url):
                    self._ready.set()
            self._kill()  # what it started may be left
            silent = 0 if self._ready.is_set() else silent + 1
            said = f"the vLLM server at {self.url} ended with status {code}. Its last lines:\n{self.tail()}"
            if silent == STARTS or self.starts == silent:
                self.problem = said
                return
            self._ready.clear()
            if self._closing.is_set():
                return
            logger.warning("%s\nIt is started again", said)
            self._begin()

    def wait(self) -> None:
        """Return when it answers. Raises `RuntimeError` with its last lines if it ends before, or does not in time."""
        until = time.monotonic() + self.timeout
        while not self._ready.wait(SECONDS):
            if self.problem is not None:
                raise RuntimeError(f"rollout.serve: {self.problem}")
            if time.monotonic() > until:
                raise RuntimeError(
                    f"rollout.serve: the vLLM server at {self.url} did not answer within rollout.serve.timeout={self.timeout:g} "
                    f"s. Its last lines:\n{self.tail()}"
                )

    def is_back(self, starts: int) -> bool:
        """Return whether it was started again after its start number `starts`, and answers, which is waited for."""
        until = time.monotonic() + self.timeout
        while self.problem is None and (self.starts > starts or not self._ready.is_set()) and time.monotonic() < until:
            if self._ready.wait(SECONDS):
                return True
        return False

    def tail(self) -> str:
        """Return the last lines that it wrote, and where the others are; the log is then kept."""
        self._read = True
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([*lines[-LINES:], f"(all of its lines: {self.log})"])

    def close(self) -> None:
        """End it and what it started."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        self._kill()
        if not self._read:
            self.log.unlink(missing_ok=True)

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Children:
    """The servers of a run, in a folder with their logs."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hf_rlhf-vllm-")
        self.folder = Path(self._folder.name)
        self.all: list[Child] = []

    def start(self, serve: Serve, urls: Sequence[str], commands: Sequence[tuple[dict[str, str], list[str]]]) -> None:
        """Start all of them, and return when all answer. Those that were started end if one does not."""
        try:
            for i, (url, (variables, arguments)) in enumerate(zip(urls, commands, strict=True)):
                more, flags = serve.placed(i, len(urls))
                log = Path(tempfile.gettempdir()) / f"{self.folder.name}-{i}.log"
                words = [serve.python, *arguments, *flags]
                self.all.append(Child(url, words, {**variables, **more}, log, serve.timeout))
                self.all[-1].start()
            for child in self.all:
                child.wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End them."""
        for child in self.all:
            child.close()
        self.all.clear()
        self._folder.cleanup()
