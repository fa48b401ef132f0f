"""The tokens of one episode: kept as they were sampled, and never made again from text.

A conversation that is one so far with messages added extends its row: the new messages are encoded once, with mask 0. Any
other conversation is a fork, a row of its own in the same episode, whose prompt holds what went before: so a sampled token has
mask 1 in the first row that holds it, and in no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
    """One row of an episode, which ends with a sampled token."""

    prompt_ids: list[int]
    """Tokens before the row's first turn."""
    completion_ids: list[int]
    mask: list[int]
    """1 on tokens that train: sampled ones, but for those of turns with `train=False`."""
    logps: list[float]
    """Log-probs as the sampler reported them; 0 where it did not."""
    turns: list[int]
    """Number of the episode's turn that sampled each token, from 0; -1 on the environment's."""
    messages: Messages


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
    """Text of the tokens: rendered where that was encoded, decoded where it was sampled."""
    prefix: str
    """Text of the last messages up to the start of the turn."""
    prompt: int = 0
    """Number of tokens before the first turn."""
    mask: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    ends: list[_End] = field(default_factory=list)
    asked: bool = True

    def extend(self, ids: Sequence[int], mask: int, logps: Sequence[float], turn: int) -> None:
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logps += logps
        self.turns += [turn] * len(ids)


@dataclass(kw_only=True)
class Transcript:
    """The rows of one episode. Raises `ChatError` where the chat template refuses a conversation or drops its text.

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

    def __post_init__(self) -> None:
        self.messages = messages_of(self.messages, "the task")
        self._turns = turns_of(self.tokenizer, self.text)
        self._rows: list[_Row] = []
        self._count = 0
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
        asked.extend(ids, int(train), [0.0] * len(ids) if logps is None else logps, self._count)
        asked.text += str(self.tokenizer.decode(list(ids), skip_special_tokens=self.text))
        asked.messages = [*asked.messages, message]
        asked.ends.append(_End(len(asked.messages), len(asked.ids), asked.text, list(ids)))
        asked.asked = False
        self._count += 1
        return {**message, "finish_reason": finish_reason}

    @property
    def rows(self) -> list[TranscriptRow]:
        """Return the rows with at least one turn, each up to its last sampled token."""
        return [self._made(row) for row in self._rows if row.ends]

    def _made(self, row: _Row) -> TranscriptRow:
        last = row.ends[-1]
        size = last.tokens - row.prompt
        return TranscriptRow(
            prompt_ids=row.ids[: row.prompt],
            completion_ids=row.ids[row.prompt : last.tokens],
            mask=row.mask[:size],
            logps=row.logps[:size],
            turns=row.turns[:size],
            messages=row.messages[: last.messages],
        )

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
        if text is not None:
            ids = self._turns.encode(text)
        else:
            text, ids = self._turns.opening(messages, tools)
            if self.prompt_ids is not None and messages == self.messages and tools == self._tools:
                ids = list(self.prompt_ids)
        return _Row(tools=tools, messages=messages, ids=ids, text=text, prefix=text, prompt=len(ids))

    def _continue(self, messages: Messages, row: _Row, end: _End) -> _Row:
        before, added = row.messages[: end.messages], messages[end.messages :]
        text, ids = self._turns.addition(before, added, row.tools, end.sampled)
        if self.history == "as_rendered":
            whole = self._turns.rendered(messages, row.tools)
            if squeezed(whole) != squeezed(end.text + text):
                return self._start(messages, row.tools, whole)
        if end is not row.ends[-1] or row.asked:
            ids = [*row.ids[: end.tokens], *ids]
            return _Row(
                tools=row.tools, messages=[*before, *added], ids=ids, text=end.text + text, prefix=text, prompt=len(ids)
            )
        row.extend(ids, 0, [0.0] * len(ids), -1)
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
