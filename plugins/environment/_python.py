"""The tool `python`: a program of the policy in the sandbox of the reward source `unit_tests`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_rlhf.axes import Positive

from ..rewards._sandbox.backend import Question, SandboxError
from ..rewards._sandbox.settings import SandboxSettings
from ._calls import Observed, ToolUnavailable

AROUND = """
import traceback
try:
    exec(compile({code!r}, "program", "exec"), {{"__name__": "__main__"}})
except Exception as error:
    print("".join(traceback.format_exception_only(error)), end="")
"""
"""Prints the error of a program after what it printed."""


@dataclass(kw_only=True)
class PythonTool(SandboxSettings):
    """Runs a program of the policy in a sandbox; what it prints is the result."""

    time_limit: Positive = 10.0
    """Seconds for a program. A longer one is ended, and the policy reads so."""

    def __post_init__(self) -> None:
        self.check_sandbox()

    def function(self) -> Callable[[str], str]:
        """Return the tool. It raises `Observed` for a program that is ended, and `ToolUnavailable` without a sandbox."""

        def python(code: str) -> str:
            """Run a Python program and return what it prints, and its error.

            Args:
                code: The program.
            """
            try:
                program, limits = AROUND.format(code=code), self.limits(self.time_limit, self.time_limit)
                (answer,) = self.backend.run(program, [Question("stdin", "")], limits)
            except SandboxError as error:
                raise ToolUnavailable(f"tool 'python': {error}") from error
            if answer.kind == "failed":
                raise Observed(answer.text)
            return answer.text

        return python
