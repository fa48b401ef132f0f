"""The tokens of one agent of an episode: kept as they were sampled, and never made again from text.

A conversation that is one so far with messages added extends it: the new messages are encoded once, with mask 0. Any other
conversation is a fork. All turns are one row, in the order in which they were sampled: where the turn before is not what a turn
goes on from, its fork holds the tokens that stand before it. So each sampled token is in the row once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hf_rlhf.contract.chat import (
    REASONING,
    Messages,
    function_of,
    messages_of,
    parsed_arguments,
    squeezed,
)
from hf_rlhf.data.turn_parsing import Tools
from hf_rlhf.data.turn_rendering import turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

History = Literal["extend", "as_rendered"]


class Ask(NamedTuple):
    """A turn that the policy is asked for."""

    row: int
    ids: list[int]
    """All tokens of the row up to the start of the turn."""


@dataclass(kw_only=True)
class TranscriptRow:
    """The turns of one agent of an episode, which end with a sampled token."""

    prompt_ids: list[int]
    """Tokens before the first turn."""
    completion_ids: list[int]
    mask: list[int]
    """1 on tokens that train: sampled ones, but for those of turns with `train=False`."""
    logps: list[float]
    """Log-probs as the sampler reported them; 0 where it did not."""
    turns: list[int]
    """Number of the turn that sampled each token, from 0; -1 on the environment's."""
    messages: Messages
    """The conversation of the last turn, with its answer."""
    forks: list[tuple[int, list[int]]] = field(default_factory=list)
    """(start, tokens): from completion token `start` on, they stand before it, and not the tokens of the row."""


class _End(NamedTuple):
    """The state of a row after one of its turns."""

    messages: int
    tokens: int
    text: str
    sampled: list[int]


@dataclass(kw_only=True, eq=False)
class _Row:
    tools: Tools | None
    messages: Messages
    ids: list[int]
    text: str
    """Text of the tokens: rendered where that was encoded, decoded where it was sampled; with `as_rendered` alone."""
    prefix: str
    """Text of the last messages up to the start of the turn."""
    ends: list[_End] = field(default_factory=list)
    asked: bool = True


class _Turn(NamedTuple):
    """A sampled turn: tokens `start` to `stop` of its conversation."""

    row: _Row
    start: int
    stop: int
    mask: int
    logps: Sequence[float]


@dataclass(kw_only=True)
class Transcript:
    """The conversations of one agent of an episode. Raises `ChatError` where the chat template refuses one or drops its text.

    `history: extend` keeps sampled tokens in every later turn. `as_rendered` asks for each turn with the conversation as the
    template renders it: where it rewrites earlier turns, beyond whitespace, that is a fork.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: Messages
    """The task's messages."""
    prompt_ids: list[int] | None = None
    """Tokens of the task's messages, if they are known."""
    text: bool = False
    """The task is a plain text, the content of its one message, and no chat template is used."""
    history: History = "extend"
    tools: Sequence[Any] | None = None
    """Tools of every turn that names none: functions with type hints and docstrings, or JSON schemas."""
    opening: Callable[[], str] | None = None
    """Gives the text of the task's messages, once for all transcripts of a prompt."""

    def __post_init__(self) -> None:
        self.messages = messages_of(self.messages, "the task")
        self._turns = turns_of(self.tokenizer, self.text)
        self._rows: list[_Row] = []
        self._sampled: list[_Turn] = []
        self._tools = _schemas(self.tools)

    def ask(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> Ask:
        """Return the row and the tokens of a conversation up to the start of the assistant's turn."""
        given = messages_of(messages, "the conversation")
        schemas = self._tools if tools is None else _schemas(tools)
        found = self._find(given, schemas)
        row = self._start(given, schemas) if found is None else self._continue(given, *found)
        if row not in self._rows:
            self._rows.append(row)
        return Ask(self._rows.index(row), list(row.ids))

    def answer(
        self,
        row: int,
        ids: Sequence[int],
        logps: Sequence[float] | None = None,
        finish_reason: str = "stop",
        train: bool = True,
    ) -> dict[str, Any]:
        """Append a sampled turn to the row that was asked for it, and return its message.

        The message has role, content, and where there are any reasoning, `tool_calls`, and `parse_error` for a malformed call.
        """
        asked = self._rows[row]
        if not asked.asked:
            raise ValueError(f"row {row} was not asked for a turn")
        message = self._turns.message(ids, asked.ids, asked.prefix, asked.tools)
        start, told = len(asked.ids), [0.0] * len(ids) if logps is None else logps
        asked.ids += ids
        self._sampled.append(_Turn(asked, start, len(asked.ids), int(train), told))
        if self.history == "as_rendered":  # nothing else reads it
            asked.text += str(self.tokenizer.decode(list(ids), skip_special_tokens=self.text))
        asked.messages = [*asked.messages, message]
        asked.ends.append(_End(len(asked.messages), len(asked.ids), asked.text, list(ids)))
        asked.asked = False
        return {**message, "finish_reason": finish_reason}

    def as_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str | Messages:
        """Return a conversation in the form of the task: a text, or messages."""
        given = messages_of(messages, "the conversation")
        return "".join(str(message["content"] or "") for message in given) if self.text else given

    @property
    def trains(self) -> bool:
        """Return whether a turn trains."""
        return any(turn.mask for turn in self._sampled)

    @property
    def row(self) -> TranscriptRow | None:
        """Return all turns up to the last sampled token; None if there is none."""
        if not self._sampled:
            return None
        first = self._sampled[0]
        found = TranscriptRow(
            prompt_ids=first.row.ids[: first.start], completion_ids=[], mask=[], logps=[], turns=[], messages=[]
        )
        before = found.prompt_ids
        for number, turn in enumerate(self._sampled):
            ids, new = turn.row.ids, list[int]()
            if len(before) <= turn.start and ids[: len(before)] == before:
                new = ids[len(before) : turn.start]
            else:
                found.forks.append((len(found.completion_ids), ids[: turn.start]))
            size = turn.stop - turn.start
            found.completion_ids += new + ids[turn.start : turn.stop]
            found.mask += [0] * len(new) + [turn.mask] * size
            found.logps += [0.0] * len(new) + [*turn.logps]
            found.turns += [-1] * len(new) + [number] * size
            before = ids[: turn.stop]
        last = next(end for end in turn.row.ends if end.tokens == turn.stop)
        found.messages = turn.row.messages[: last.messages]
        return found

    def _find(self, messages: Messages, tools: Tools | None) -> tuple[_Row, _End] | None:
        """Return the row and its turn that the conversation continues: the latest turn, in the first row that has it."""
        best: tuple[_Row, _End] | None = None
        for row in self._rows:
            if row.tools != tools:
                continue
            for end in row.ends:
                if best is not None and end.messages <= best[1].messages:
                    continue
                if len(messages) >= end.messages and all(map(same_message, row.messages[: end.messages], messages)):
                    best = row, end
        return best

    def _start(self, messages: Messages, tools: Tools | None, text: str | None = None) -> _Row:
        is_task = text is None and messages == self.messages and tools == self._tools
        if text is None:
            text = self.opening() if is_task and self.opening else self._turns.opening(messages, tools)
        known = self.prompt_ids if is_task else None
        ids = self._turns.encode(text) if known is None else list(known)
        return _Row(tools=tools, messages=messages, ids=ids, text=text, prefix=text)

    def _continue(self, messages: Messages, row: _Row, end: _End) -> _Row:
        before, added = row.messages[: end.messages], messages[end.messages :]
        text, ids = self._turns.addition(before, added, row.tools, end.sampled)
        if self.history == "as_rendered":
            whole = self._turns.rendered(messages, row.tools)
            if squeezed(whole) != squeezed(end.text + text):
                return self._start(messages, row.tools, whole)
        if end is not row.ends[-1] or row.asked:
            ids = [*row.ids[: end.tokens], *ids]
            return _Row(tools=row.tools, messages=[*before, *added], ids=ids, text=end.text + text, prefix=text)
        row.ids += ids
        row.messages, row.text, row.prefix, row.asked = [*before, *added], end.text + text, text, True
        return row


def conversation_hash(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of a conversation that is equal for messages of equal normal form."""
    normal = json.dumps([_normal(message) for message in messages], sort_keys=True, default=str)
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()


def same_message(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare messages by normal form: role, stripped text, names and parsed arguments of tool calls.

    Reasoning that only one of them has does not count: programs that re-serialize a conversation drop it.
    """
    if _normal(one) != _normal(other):
        return False
    thoughts = [{str(m[name]).strip() for name in REASONING if m.get(name)} for m in (one, other)]
    return not all(thoughts) or bool(thoughts[0] & thoughts[1])


def _normal(message: Mapping[str, Any]) -> tuple[Any, ...]:
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else json.dumps(content or "", sort_keys=True, default=str)
    calls = [
        (function.get("name"), parsed_arguments(function.get("arguments")) or {})
        for function in map(function_of, message.get("tool_calls") or ())
    ]
    return message["role"], "" if text == '""' else text, calls


def _schemas(tools: Sequence[Any] | None) -> Tools | None:
    from transformers.utils import get_json_schema

    return [dict(tool) if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools] if tools else None
