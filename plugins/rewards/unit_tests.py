"""Share of a row's tests that a completion's program passes, run in a sandbox.

The program is the completion's last code block. The sandbox gets it with the tests' expressions and inputs and returns
plain values and printed texts, which are compared here: expected values never enter it, and neither an exit status nor the
program's own `==` passes a test. docs/sandbox.md documents what each sandbox prevents, and what it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, NonNegative, Positive, RewardSource
from hf_rlhf.batch import Rollouts

from ._sandbox.backend import SandboxError
from ._sandbox.cases import cases_of, program_of
from ._sandbox.settings import NOT_A_SANDBOX, SandboxSettings

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class UnitTests(SandboxSettings, RewardSource):
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
    time_limit: Positive = 10.0
    """Seconds for all tests of a completion; tests without an answer by then fail."""
    test_time_limit: Positive = 5.0
    """Seconds for one test."""
    workers: Literal["inline", "threads", "processes", "ray"] = "threads"
    """Runner that starts and awaits the sandboxes, which are separate processes anyway."""
    timeout: Positive | None = 120.0
    """Seconds for a row; must exceed `time_limit`, so that it stops only a hanging sandbox."""

    def __post_init__(self) -> None:
        self.check_sandbox()
        if self.timeout is not None and self.timeout <= self.time_limit + 1:
            raise ValueError(
                f"timeout must be more than a second above time_limit={self.time_limit:g}, got {self.timeout:g}: a row that "
                "reaches timeout has no score, while a program that reaches time_limit fails its tests"
            )

    def columns(self) -> set[str]:
        return {self.column}

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        problem = self.backend.problem()
        return [problem] if problem else []

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.sandbox == "rlimits":
            yield NOT_A_SANDBOX

    def setup(self, context: Context) -> None:
        problem = self.backend.problem()
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
        answers = self.backend.run(
            program, [case.question for case in cases], self.limits(self.time_limit, self.test_time_limit)
        )
        passed = [case.passed(answer, self.tolerance) for case, answer in zip(cases, answers, strict=True)]
        return sum(passed) / len(passed) if self.score == "share" else float(all(passed))


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [UnitTests]
