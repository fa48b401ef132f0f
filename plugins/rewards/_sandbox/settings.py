"""Settings of a sandbox, for every plugin that runs the policy's programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hf_rlhf.axes import Count

from ..._http import check_url
from .backend import MIB, Backend, Limits
from .bubblewrap import Bubblewrap
from .engine import Engine
from .remote import Remote
from .rlimits import Rlimits

READ_BY = {
    "image": ("docker", "podman"),
    "url": ("remote",),
    "token_env": ("remote",),
    "python": ("bubblewrap", "rlimits"),
}
"""Sandboxes that read each setting."""


NOT_A_SANDBOX = "NOT A SANDBOX: the model's programs run with this process's rights, under resource limits alone"


@dataclass(kw_only=True)
class SandboxSettings:
    """Which sandbox runs programs, and their limits."""

    sandbox: Literal["bubblewrap", "docker", "podman", "remote", "rlimits"] = "bubblewrap"
    """Sandbox that runs the program. `rlimits` limits time and memory of each process and is not a sandbox."""
    i_understand_this_is_not_a_sandbox: bool = False
    """Required for `rlimits`: the model's programs can then read, change and send whatever this process can."""
    image: str | None = None
    """Image for docker and podman with Python 3.11 or newer; None: python:3.12-slim. It is never pulled."""
    url: str | None = None
    """URL of the runner for `remote`."""
    token_env: str | None = None
    """Environment variable with the runner's token, sent as `Authorization: Bearer ...`."""
    python: str | None = None
    """Interpreter for programs under bubblewrap and rlimits, such as one of a virtual environment, with its packages. None:
    this process's own with the standard library alone."""
    program_memory_mib: Count = 512
    """Address space of each process of a program in MiB; docker and podman limit their sum."""
    processes: Count = 8
    """Concurrent processes and threads of a program; not limited by `rlimits`."""
    disk_mib: Count = 32
    """Size in MiB of the temporary folder, the only writable place; under `rlimits`, of each file."""
    output_kib: Count = 1024
    """Total output of the tests, in KiB."""

    def check_sandbox(self) -> None:
        """Raise `ValueError` for settings that do not fit each other."""
        for setting, sandboxes in READ_BY.items():
            if getattr(self, setting) is not None and self.sandbox not in sandboxes:
                raise ValueError(f"{setting} needs sandbox {' or '.join(sandboxes)}, got {self.sandbox}. Remove it")
        if self.sandbox == "rlimits" and not self.i_understand_this_is_not_a_sandbox:
            raise ValueError(
                "`rlimits` is not a sandbox: the model's programs can read, change and send whatever this process can. "
                "Choose bubblewrap, docker, podman or remote, or set i_understand_this_is_not_a_sandbox: true"
            )
        if self.sandbox == "remote":
            if self.url is None:
                raise ValueError("sandbox `remote` needs url, the address of its runner (docs/sandbox.md)")
            check_url("url", self.url)

    def limits(self, seconds: float, each: float) -> Limits:
        """Return the limits of a program: seconds for all of its questions, and for each."""
        return Limits(
            seconds=seconds,
            test_seconds=each,
            memory=self.program_memory_mib * MIB,
            processes=self.processes,
            disk=self.disk_mib * MIB,
            files=128 * self.disk_mib,
            output=self.output_kib << 10,
        )

    @cached_property
    def backend(self) -> Backend:
        """The sandbox."""
        match self.sandbox:
            case "bubblewrap":
                return Bubblewrap(self.python)
            case "rlimits":
                return Rlimits(self.python)
            case "remote":
                assert self.url is not None
                return Remote(self.url, self.token_env)
        return Engine(self.sandbox, self.image)
