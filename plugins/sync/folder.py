"""Weights through a folder that the servers can read: the first process writes safetensors, the servers load them in place.

It works on any device, with any number of servers and where one was started again. Of a policy with an adapter the adapter
alone is written, as peft saves it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, WeightSync

if TYPE_CHECKING:
    from hf_rlhf.axes import EngineServer, Weights

PREFIX, OWNER = "hf_rlhf-", "owner"
"""Beginning of the names of folders with weights, and the file in each that names the machine and process that wrote it."""


@dataclass(kw_only=True)
class Folder(WeightSync):
    """Sends the weights as files in a folder."""

    name = "folder"
    adapters = True

    path: str | None = None
    """Folder that every server can read; None: /dev/shm, or the folder for temporary files."""

    def __post_init__(self) -> None:
        self._first, self._adapter = True, False
        self._written: Path | None = None

    @property
    def base(self) -> Path:
        """The folder in which each set of weights gets a folder of its own."""
        shared = Path("/dev/shm")
        return Path(self.path or (shared if shared.is_dir() else tempfile.gettempdir())).absolute()

    def setup(self, context: Context) -> None:
        """Remove the weights of runs that were killed."""
        self._first = context.process_index == 0
        if self._first:
            _remove_left(self.base)

    def collect(self, weights: Weights) -> None:
        """Write the weights from the first process."""
        state = dict(weights.named())  # on every process
        model, old = weights.policy.model, self._written
        self._adapter = hasattr(model, "peft_config")
        self._written = self.base / f"{PREFIX}{hashlib.sha256(weights.version.encode()).hexdigest()[:16]}"
        if self._first:
            for folder in filter(None, (old, self._written)):
                shutil.rmtree(folder, ignore_errors=True)
            _save(model, self._written, state)

    async def send(self, server: EngineServer) -> None:
        """Let a server load the folder."""
        assert self._written is not None, "collect was not called"
        if self._adapter:
            await server.load_adapter(self._written)
        else:
            await server.call("hf_rlhf_load", str(self._written))

    def close(self) -> None:
        """Delete the weights."""
        if self._first and self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)


def _save(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Save the model as transformers or peft does, without a progress bar in every rollout."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        if shown:
            logging.enable_progress_bar()
    (folder / OWNER).write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")


def _remove_left(base: Path) -> None:
    """Remove the weights of runs on this machine that were killed: they take memory in /dev/shm."""
    for owner in base.glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            host, pid = owner.read_text(encoding="utf-8").split()
            if host == socket.gethostname() and not _is_running(int(pid)):
                shutil.rmtree(owner.parent, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@hookimpl
def sync() -> list[type[WeightSync]]:
    return [Folder]
