"""Environments in the form that TRL documents for `environment_factory`: classes whose methods are tools.

`reset(**row)` begins an episode with the row's columns, and may return text that is added to the last message of the prompt;
public methods with type hints and a docstring are tools; `get_reward()`, if there is one, is called once at the end. Methods
may be async. As in TRL instances are made once and reset often, and of several factories the row's column `environment` names
one. Departures: an episode that runs out of turns or tokens is scored, too; a tool that hangs ends its episode without a score
(`timeout`); a failing tool is read as `error: ...`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Count, Environment, Message, Outcome, Task

from .._functions import load_function
from ._calls import Conversation, ToolUnavailable, is_infrastructure, schema_of

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm

COLUMN = "environment"
"""Dataset column that names the factory of a row, where there are several."""


@dataclass(kw_only=True)
class OfTRL(Environment):
    """Plays a class whose methods are tools: the policy calls them until a turn without a call."""

    name = "trl"
    words = "episodes of {factory}"
    followers = ("tool",)

    factory: str | Callable[[], Any] | dict[str, str | Callable[[], Any]]
    """`file.py:Class`, `package.module:Class`, or a mapping of names, which the column `environment` has, to them."""
    max_result: Count = 4000
    """Most characters of a result; the rest is left out, and the policy reads so."""

    def __post_init__(self) -> None:
        self._idle: dict[str | None, list[Any]] = {}

    def columns(self) -> set[str]:
        return {COLUMN} if isinstance(self.factory, dict) else set()

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield reasons why classes are not of that form."""
        try:
            self.tool_schemas()
        except ValueError as error:
            yield str(error)

    def setup(self, context: Context) -> None:
        _ = self._schemas

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Return the tools of all classes as JSON schemas. Raises `ValueError` for a class that is not of that form."""
        return [schema for schemas in self._schemas.values() for schema in schemas]

    def play(self, task: Task, model: Any) -> Outcome:
        """Play in a thread of its own, as methods may block."""
        return asyncio.run(self._play(task, model))

    async def _play(self, task: Task, model: Callable[..., Message]) -> Outcome:
        row = {"prompt": task.messages, **task.columns}
        name = row.pop(COLUMN) if isinstance(self.factory, dict) else None
        if name not in self._factories:
            raise ValueError(f"column {COLUMN!r} must be one of {', '.join(map(repr, self._factories))}, got {name!r}")
        schemas, idle = self._schemas[name], self._idle[name]
        instance = idle.pop() if idle else self._factories[name]()
        seen = await _awaited(instance.reset(**row))
        said = Conversation(
            messages=_begun(task.messages, seen),
            schemas=schemas,
            call=lambda tool, arguments: _call(getattr(instance, tool), arguments),
            max_result=self.max_result,
            names=[schema["function"]["name"] for schema in schemas],
        )

        async def ask(messages: Sequence[Message], **options: Any) -> Message:
            return model(messages, **options)

        await said.play(ask)
        reward = await _awaited(instance.get_reward()) if hasattr(instance, "get_reward") else None
        idle.append(instance)
        return Outcome(reward=reward, columns={"answer": said.answer, "calls": said.calls, "failed_calls": said.failed})

    @cached_property
    def _factories(self) -> dict[str | None, Callable[[], Any]]:
        given: Any = self.factory if isinstance(self.factory, dict) else {None: self.factory}
        return {name: load_function(made, "factory") if isinstance(made, str) else made for name, made in given.items()}

    @cached_property
    def _schemas(self) -> dict[str | None, list[dict[str, Any]]]:
        return {name: self._schemas_of(name, factory) for name, factory in self._factories.items()}

    def _schemas_of(self, name: str | None, factory: Callable[[], Any]) -> list[dict[str, Any]]:
        instance = factory()
        members = dict(inspect.getmembers(type(instance), inspect.isfunction))
        if "reset" not in members:
            raise ValueError(
                f"factory {type(instance).__name__} must make instances with a method reset, as TRL documents"
            )
        self._idle.setdefault(name, []).append(instance)
        tools = [tool for tool in members if not tool.startswith("_") and tool not in ("reset", "get_reward")]
        return [schema_of(getattr(instance, tool)) for tool in tools]


async def _awaited(given: Any) -> Any:
    return await given if inspect.isawaitable(given) else given


async def _call(method: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return await _awaited(method(**arguments))
    except Exception as error:
        if is_infrastructure(error):
            raise ToolUnavailable(f"{method.__name__}: {type(error).__name__}: {error}") from error
        raise


def _begun(messages: list[Message], seen: Any) -> list[Message]:
    """Return the prompt with what `reset` returned added to its last message."""
    if seen is None:
        return list(messages)
    *before, last = messages
    content = last["content"]
    if not (isinstance(content, str) and isinstance(seen, str)):
        content, seen = ([{"type": "text", "text": x}] if isinstance(x, str) else x for x in (content, seen))
    return [*before, {**last, "content": content + seen}]


@hookimpl
def environment() -> list[type[Environment]]:
    return [OfTRL]
