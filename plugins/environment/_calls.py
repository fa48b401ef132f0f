"""Tool calls of a conversation: those of one turn side by side, failures as what the policy observes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf.axes import Message, Over

Call = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
"""Runs the tool of a name with arguments."""
INFRASTRUCTURE = frozenset(
    {"ConnectionError", "TimeoutError", "gaierror", "TransportError", "ClientConnectionError", "RequestException"}
)
"""Names of exceptions, and of their base classes, that say nothing of the policy: of Python, httpx, aiohttp, requests."""


class Observed(Exception):
    """Raised for a failed call with the words that the policy reads."""


class ToolUnavailable(RuntimeError):
    """Raised where a tool cannot be reached, whatever the policy asked of it: the episode has no score."""


def is_infrastructure(error: BaseException) -> bool:
    """Return whether an error of a tool says nothing of the policy."""
    return any(base.__name__ in INFRASTRUCTURE for base in type(error).__mro__)


def in_words(error: BaseException) -> str:
    """Return the text of an error that the policy observes."""
    if isinstance(error, Observed):
        return f"error: {error}"
    return f"error: {type(error).__name__}: {error}" if str(error) else f"error: {type(error).__name__}"


def as_text(result: Any) -> str:
    """Return a tool's result as the text that the policy reads: texts as they are, lists and mappings as JSON."""
    if isinstance(result, str):
        return result
    return json.dumps(result, ensure_ascii=False, default=str) if isinstance(result, list | dict) else str(result)


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function as a JSON schema. Raises `ValueError` naming it."""
    from transformers.utils import get_json_schema

    try:
        return dict(get_json_schema(function))
    except Exception as error:  # of docstrings and of type hints, each a class of its own
        raise ValueError(
            f"tool {function.__name__!r} must have type hints and a docstring with `Args:`, a line for each parameter: {error}"
        ) from error


@dataclass(kw_only=True)
class Conversation:
    """A conversation in which the policy calls tools, until a turn without a call."""

    messages: list[Message]
    schemas: list[dict[str, Any]]
    call: Call
    max_result: int
    """Most characters of a result."""
    calls: int = 0
    failed: int = 0
    turns: int = 0
    names: Sequence[str] = field(default_factory=list)

    async def play(self, model: Callable[..., Awaitable[Message]]) -> bool:
        """Let the policy speak and answer its calls. Return whether it ended, rather than turns or tokens."""
        try:
            while True:
                answer = await model(self.messages, tools=self.schemas)
                self.turns += 1
                self.messages.append(answer)
                if not answer.get("tool_calls"):
                    return answer.get("finish_reason") != "length"
                self.messages += await asyncio.gather(*map(self._answer, answer["tool_calls"]))
        except Over:
            return False

    @property
    def answer(self) -> str | None:
        """Return the text of the last turn, or None if that was a call."""
        last = self.messages[-1]
        return str(last["content"] or "") if last["role"] == "assistant" and not last.get("tool_calls") else None

    async def _answer(self, call: Mapping[str, Any]) -> Message:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        self.calls += 1
        try:
            if name not in self.names:
                raise Observed(f"there is no tool {name!r}; the tools are: {', '.join(self.names)}")
            text = as_text(await self.call(name, arguments))
        except ToolUnavailable:
            raise
        except (Exception, SystemExit) as error:  # the policy's mistake is what it observes
            self.failed += 1
            text = in_words(error)
        if len(text) > self.max_result:
            text = f"{text[: self.max_result]} ... ({len(text) - self.max_result} more characters)"
        identity = {"tool_call_id": call["id"]} if call.get("id") else {}
        return {"role": "tool", "name": name, "content": text, **identity}
