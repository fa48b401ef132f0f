"""Python functions and MCP servers as tools: the policy calls them in its turns and reads their results, until it calls none.

Functions have type hints and a docstring (transformers' `get_json_schema`); the chat template shows them to the policy, and
its calls are read by the tokenizer's `response_template`, or TRL's for the families that it knows; other chat templates must
write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. After a prompt that is plain text, which shows no tools, a
call is `[name(...)]` with Python literals, or with the bare text for a tool of one parameter, `[calculate(3 * 4)]`, and its
result follows on a line of its own. Calls of one turn run side by side. A tool that fails, that does not exist or that takes
too long is what the policy observes; a malformed call is text. Departure from TRL: errors that say nothing of
the policy (connections, a process that dies) are tried again, and then the episode has no score.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Count, Environment, Model, Outcome, Positive, Task

from .._functions import load_function
from ..rewards._sandbox.settings import NOT_A_SANDBOX
from ._calls import Conversation, ToolUnavailable, is_infrastructure, schema_of
from ._mcp import MCPServer
from ._python import PythonTool
from ._tool_processes import ToolPool, took_too_long

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm

WAIT_S = 0.2
"""Seconds before the first retry; each later one waits twice as long."""


@dataclass(kw_only=True)
class Tools(Environment):
    """Lets the policy call Python functions. With `answer` an episode whose last turn is that text is worth 1, others 0."""

    name = "tools"
    followers = ("tool",)

    tools: list[str | Callable[..., Any]] = field(default_factory=list)
    """`file.py:name`, `package.module:name`, or functions themselves. A recipe's functions are imported and run."""
    mcp: list[str] = field(default_factory=list)
    """MCP servers whose tools are offered as well: a URL (streamable HTTP), or a command that is started (stdio). All episodes
    share a server."""
    python: PythonTool | None = None
    """A tool `python` as well, which runs a program in a sandbox: `python: {}`, or with settings of the sandbox."""
    answer: str | None = None
    """Dataset column with the right answer, compared as text without whitespace around it. None: no reward of its own."""
    workers: Literal["processes", "inline"] = "processes"
    """Run functions in processes, of which one that blocks is ended, or in this process. Async functions are awaited
    in this process."""
    num_workers: Count = 4
    """Most processes, and calls at a time."""
    tool_timeout: Positive = 20.0
    """Seconds for a call. A longer one is ended, and the policy reads so; inline functions are not."""
    retries: int = 2
    """Further tries of a call after an error of the infrastructure: of a connection, or a process that died."""
    max_result: Count = 4000
    """Most characters of a result; the rest is left out, and the policy reads so."""

    def in_words(self) -> str:
        named = [x.rpartition(":")[2] if isinstance(x, str) else x.__name__ for x in self.tools]
        named += [f"of {place}" for place in self.mcp] + (["python"] if self.python else [])
        return f"tools {', '.join(named)}"

    def __post_init__(self) -> None:
        if not (self.tools or self.mcp or self.python):
            raise ValueError(
                "tools must name at least one function, such as [my.py:search], or set mcp or python, got []"
            )
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}")

    @property
    def plays_in_processes(self) -> bool:
        return False  # its functions do

    def columns(self) -> set[str]:
        return set() if self.answer is None else {self.answer}

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield reasons why functions cannot be tools."""
        try:
            self.tool_schemas()
        except ValueError as error:
            yield str(error)
        if self.python is not None and (problem := self.python.backend.problem()):
            yield problem

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.python is not None and self.python.sandbox == "rlimits":
            yield NOT_A_SANDBOX

    def setup(self, context: Context) -> None:
        _ = self._schemas

    def close(self) -> None:
        for server in self._servers:
            server.close()
        if "_pool" in self.__dict__:
            self._pool.close()
            del self.__dict__["_pool"]

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Return the tools as JSON schemas. Raises `ValueError` for what cannot be a tool, and servers that are not there."""
        return self._schemas

    async def play(self, task: Task, model: Model) -> Outcome:
        said = Conversation(
            messages=list(task.messages),
            schemas=self._schemas,
            call=self._call,
            max_result=self.max_result,
            names=[schema["function"]["name"] for schema in self._schemas],
        )
        ended = await said.play(model)
        columns = {"answer": said.answer, "calls": said.calls, "failed_calls": said.failed}
        if self.answer is None:
            return Outcome(columns=columns)
        right = ended and (said.answer or "").strip() == str(task.columns[self.answer]).strip()
        return Outcome(reward=float(right), columns=columns)

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return await self._once(name, arguments)
            except ToolUnavailable:
                if attempt == self.retries:
                    raise
                await asyncio.sleep(WAIT_S * 2**attempt)
        raise AssertionError

    async def _once(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if name in self._remote:
            try:
                return await self._remote[name].call(name, arguments, self.tool_timeout)
            except TimeoutError:
                raise took_too_long(self.tool_timeout) from None
        function = self._functions[name]
        if self.python is not None and name == "python":
            return await asyncio.to_thread(function, **arguments)
        if not inspect.iscoroutinefunction(function) and self.workers == "processes":
            return await self._pool.call(name, arguments)
        try:
            if not inspect.iscoroutinefunction(function):
                return function(**arguments)
            running = asyncio.ensure_future(function(**arguments))
            done, _ = await asyncio.wait({running}, timeout=self.tool_timeout)
            if done:
                return running.result()
            running.cancel()
        except Exception as error:
            if is_infrastructure(error):
                raise ToolUnavailable(f"tool {name!r}: {type(error).__name__}: {error}") from error
            raise
        raise took_too_long(self.tool_timeout)

    @cached_property
    def _functions(self) -> dict[str, Callable[..., Any]]:
        loaded = [load_function(given, "tool") if isinstance(given, str) else given for given in self.tools]
        loaded += [self.python.function()] if self.python is not None else []
        _check_different([function.__name__ for function in loaded])
        return {function.__name__: function for function in loaded}

    @cached_property
    def _servers(self) -> list[MCPServer]:
        return [MCPServer(place) for place in self.mcp]

    @cached_property
    def _remote(self) -> dict[str, MCPServer]:
        return {schema["function"]["name"]: server for server in self._servers for schema in server.schemas()}

    @cached_property
    def _schemas(self) -> list[dict[str, Any]]:
        schemas = [schema_of(function) for function in self._functions.values()]
        schemas += [schema for server in self._servers for schema in server.schemas()]
        _check_different([schema["function"]["name"] for schema in schemas])
        return schemas

    @cached_property
    def _pool(self) -> ToolPool:
        given = dict(zip(self._functions, self.tools, strict=False))
        return ToolPool(given, self.num_workers, self.tool_timeout)


def _check_different(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tools must have different names, got {', '.join(twice)} twice")


@hookimpl
def environment() -> list[type[Environment]]:
    return [Tools]
