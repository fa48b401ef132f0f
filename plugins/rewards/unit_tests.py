"""Share of a row's tests that a completion's program passes, run in a sandbox.

The program is the completion's last code block. The sandbox gets it with the tests' expressions and inputs and returns
plain values and printed texts, which are compared here: expected values never enter it, and neither an exit status nor the
program's own `==` passes a test. docs/sandbox.md documents what each sandbox prevents, and what it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Count, NonNegative, Positive, RewardSource
from hf_rlhf.batch import Rollouts

from .._http import check_url
from ._sandbox.backend import MIB, Backend, Limits, SandboxError
from ._sandbox.bubblewrap import Bubblewrap
from ._sandbox.cases import cases_of, program_of
from ._sandbox.engine import Engine
from ._sandbox.remote import Remote
from ._sandbox.rlimits import Rlimits

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm

READ_BY = {
    "image": ("docker", "podman"),
    "url": ("remote",),
    "token_env": ("remote",),
    "python": ("bubblewrap", "rlimits"),
}
"""Sandboxes that read each setting."""


@dataclass(kw_only=True)
class UnitTests(RewardSource):
    """Passed tests over all tests, or 1.0 if all passed and else 0.0; no score if the row has no tests.

    A program that does not compile, exceeds a limit or kills its sandbox fails the remaining tests. A sandbox that does not
    start raises an error, which is not a score. Each program and each test runs separately.
    """

    name = "unit_tests"
    verifier = True
    rowwise = True

    column: str = "tests"
    """Dataset column: a list of {call, expected}, of {stdin, stdout}, or of texts "assert EXPRESSION == LITERAL"; or its JSON."""
    score: Literal["share", "all"] = "share"
    """Share of passed tests, or 1 only if all passed."""
    without_fence: Literal["whole", "fail"] = "whole"
    """Treat a completion without a code block as a program, or let it fail."""
    tolerance: NonNegative = 1e-6
    """Largest difference of equal floats, absolute or relative to the larger one."""
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
    time_limit: Positive = 10.0
    """Seconds for all tests of a completion; tests without an answer by then fail."""
    test_time_limit: Positive = 5.0
    """Seconds for one test."""
    program_memory_mib: Count = 512
    """Address space of each process of a program in MiB; docker and podman limit their sum."""
    processes: Count = 8
    """Concurrent processes and threads of a program; not limited by `rlimits`."""
    disk_mib: Count = 32
    """Size in MiB of the temporary folder, the only writable place; under `rlimits`, of each file."""
    output_kib: Count = 1024
    """Total output of the tests, in KiB."""
    workers: Literal["inline", "threads", "processes", "ray"] = "threads"
    """Runner that starts and awaits the sandboxes, which are separate processes anyway."""
    timeout: Positive | None = 120.0
    """Seconds for a row; must exceed `time_limit`, so that it stops only a hanging sandbox."""

    def __post_init__(self) -> None:
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
        if self.timeout is not None and self.timeout <= self.time_limit + 1:
            raise ValueError(
                f"timeout must be more than a second above time_limit={self.time_limit:g}, got {self.timeout:g}: a row that "
                "reaches timeout has no score, while a program that reaches time_limit fails its tests"
            )

    def columns(self) -> set[str]:
        return {self.column}

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        problem = self._backend.problem()
        return [problem] if problem else []

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.sandbox == "rlimits":
            yield "NOT A SANDBOX: the model's programs run with this process's rights, under resource limits alone"

    def setup(self, context: Context) -> None:
        problem = self._backend.problem()
        if problem:
            raise SandboxError(problem)

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        tests = rollouts.column(self.column)
        return [
            self._score(row, text, value)
            for row, (text, value) in enumerate(zip(rollouts.completions, tests, strict=True))
        ]

    def answer(self, completion: str) -> str | None:
        """Return the completion's program."""
        program = program_of(completion, self.without_fence)
        return program and program.strip()

    def _score(self, row: int, completion: str, value: object) -> float | None:
        cases = cases_of(value, f"rewards.unit_tests: row {row}: column {self.column!r}")
        if not cases:
            return None
        program = program_of(completion, self.without_fence)
        if program is None:
            return 0.0
        answers = self._backend.run(program, [case.question for case in cases], self._limits)
        passed = [case.passed(answer, self.tolerance) for case, answer in zip(cases, answers, strict=True)]
        return sum(passed) / len(passed) if self.score == "share" else float(all(passed))

    @cached_property
    def _limits(self) -> Limits:
        return Limits(
            seconds=self.time_limit,
            test_seconds=self.test_time_limit,
            memory=self.program_memory_mib * MIB,
            processes=self.processes,
            disk=self.disk_mib * MIB,
            files=128 * self.disk_mib,
            output=self.output_kib << 10,
        )

    @cached_property
    def _backend(self) -> Backend:
        match self.sandbox:
            case "bubblewrap":
                return Bubblewrap(self.python)
            case "rlimits":
                return Rlimits(self.python)
            case "remote":
                assert self.url is not None
                return Remote(self.url, self.token_env)
        return Engine(self.sandbox, self.image)


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [UnitTests]
