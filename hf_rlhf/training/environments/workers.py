"""Episodes in processes: `play` runs in a worker, and asks the host for each turn of the policy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_rlhf.batch import Context
from hf_rlhf.contract.base import nested_of
from hf_rlhf.contract.environment import Environment, Message, Outcome, Over, Task, Turn
from hf_rlhf.contract.plugin_copy import close_copy, fresh, packed, set_up_copy, unpacked
from hf_rlhf.runtime.plain_text import format_traceback
from hf_rlhf.runtime.worker_pool import WorkerPool, WorkerStartError
from hf_rlhf.runtime.worker_process import worker_processes


def open_workers(environment: Environment, context: Context | None) -> None:
    """Start the processes of an environment, in which its copies are set up. Raises `WorkerError` if it cannot be sent."""
    title = f"environment={environment.name}"
    try:
        body = packed(fresh(environment), context)
    except Exception as error:
        reason = f"cannot send it to processes: {type(error).__name__}: {error}"
        raise WorkerStartError(
            f"{title}: {reason}. Name functions as file.py:name, or set environment.0.workers=inline"
        ) from error
    start = worker_processes(f"{PlayServer.__module__}:{PlayServer.__name__}", body, timeout=environment.timeout)
    advice = ". Set environment.0.workers=inline, or keep only plain data in the dataset's columns"
    environment.worker_pool = WorkerPool(title, start, count=environment.most_live or 1, advice=advice)


def close_workers(environment: Environment) -> None:
    """Stop the processes of an environment."""
    pool, environment.worker_pool = environment.worker_pool, None
    if pool is not None:
        pool.close()


def set_up_here(plugin: Any, context: Context) -> None:
    """Set up a plugin of this process, or the processes of an environment that plays in them."""
    if isinstance(plugin, Environment) and plugin.plays_in_processes:
        open_workers(plugin, context)
    else:
        plugin.setup(context)


def close_here(plugin: Any) -> None:
    """Close what `set_up_here` set up."""
    if isinstance(plugin, Environment) and plugin.plays_in_processes:
        close_workers(plugin)
    else:
        plugin.close()


def elsewhere(environments: Sequence[Environment]) -> set[int]:
    """Return the ids of plugins that are set up in the processes of environments alone."""
    return {id(x) for each in environments if each.plays_in_processes for x in nested_of(each)}


class PlayServer:
    """Plays in a worker process: a unit is a task."""

    def __init__(self, body: bytes) -> None:
        self.environment: Environment
        self.environment, given = unpacked(body)
        set_up_copy(self.environment, given)

    def run(self, state: bytes | None, task: Task, ask: Callable[[Any], Any]) -> dict[str, Any]:
        """Return an outcome, an error, or that the episode was over, as plain data."""
        model = _AwaitedModel(ask) if self.environment.asynchronous else _AskedModel(ask)
        try:
            given: Any = self.environment.play(task, model)
            if self.environment.asynchronous:
                given = asyncio.run(given)
            return _plain(given)
        except Over:
            return {"over": True}
        except BaseException as error:
            return {"error": f"raised {type(error).__name__}: {error}", "trace": format_traceback(error)}

    def close(self) -> None:
        """Close the environment."""
        close_copy(self.environment)


class _AskedModel:
    """The policy as a plain `play` in a worker gets it."""

    def __init__(self, ask: Callable[[Any], Any]):
        self._ask, self._lock = ask, threading.Lock()

    @property
    def url(self) -> str:
        """See `hf_rlhf.axes.Model`."""
        with self._lock:
            return str(self._ask({"url": True}))

    def __call__(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, **options: Any) -> Any:
        with self._lock:
            answer = self._ask({"messages": list(messages), "options": {"tools": _schemas(tools), **options}})
        if answer is None:
            raise Over
        return answer


class _AwaitedModel(_AskedModel):
    """The policy as an async `play` in a worker gets it."""

    async def __call__(self, messages: Sequence[Message], **options: Any) -> Any:
        return await asyncio.to_thread(super().__call__, messages, **options)


def _schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    if tools is None or all(isinstance(tool, Mapping) for tool in tools):
        return None if tools is None else list(tools)
    from transformers.utils import get_json_schema

    return [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]


def _plain(given: Any) -> dict[str, Any]:
    """Return what `play` returned as plain data; numbers of any kind become floats, what is no outcome its text."""
    if not isinstance(given, Outcome):
        return {"given": _number(given)}
    rewards = given.reward
    return {
        "reward": {k: _number(x) for k, x in rewards.items()} if isinstance(rewards, dict) else _number(rewards),
        "turns": None if given.turns is None else [[_number(turn.reward), turn.state] for turn in given.turns],
        "columns": given.columns,
    }


def _number(given: Any) -> Any:
    try:
        return given if given is None or isinstance(given, str) else float(given)
    except (TypeError, ValueError):
        return str(given)


def outcome_of(found: Mapping[str, Any]) -> Any:
    """Return what `play` returned, of plain data."""
    if "given" in found:
        return found["given"]
    turns = None if found["turns"] is None else [Turn(reward=reward, state=state) for reward, state in found["turns"]]
    return Outcome(reward=found["reward"], turns=turns, columns=found["columns"])
