"""Check that a chat template writes earlier turns of a conversation as they were sampled, and tool calls as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hf_rlhf.contract.chat import (
    EMPTY_THOUGHT,
    ChatError,
    Conversation,
    chat_of,
    function_of,
    opening_of,
    squeezed,
    training_template,
)
from hf_rlhf.data.turn_parsing import Tools, parse_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Follower = Literal["user", "tool"]
ANSWER, THOUGHT = "PlainAnswer", "PlainThought"
_FIX = "Set model.chat_template to that of a model for tools"
_USER = {"role": "user", "content": "PlainQuestion"}
_TURN = re.compile(rf".*(?:{ANSWER}|PlainValue).*?(?:<[^<>]+>|\Z)", re.DOTALL)
"""A turn up to its end token; templates may write the end of a text after it."""
_CLOSED_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")


class _Probe(NamedTuple):
    """A turn of the assistant."""

    name: str
    message: dict[str, Any]
    sampled: str | None = None
    """Text that the policy samples; None: what the template writes for the message."""


def rewriting(
    tokenizer: PreTrainedTokenizerBase, followers: Sequence[Follower] = ("user",), tools: Tools | None = None
) -> str | None:
    """Describe an earlier turn that the chat template writes differently from how it was sampled; None if there is none.

    Turns of text alone, with reasoning where the template has a place for it, and with tool calls where there are `tools`, are
    followed by a message of each of the roles that are given. Raises `ChatError` where the template cannot render them.
    """
    for follower in followers:
        for probe in _probes(tokenizer, follower, tools):
            if _differs(tokenizer, probe, follower, tools):
                return f"{probe.name} followed by a message of the role {follower}"
    return None


def check_history(
    tokenizer: PreTrainedTokenizerBase, followers: Sequence[Follower] = ("user",), tools: Tools | None = None
) -> None:
    """Refuse a chat template that rewrites earlier turns. Raises `ChatError` with the way out."""
    if (found := rewriting(tokenizer, followers, tools)) is None:
        return
    file = _keeping(tokenizer, followers, tools)
    way = f"{file}, TRL's version of it, which keeps them" if file is not None else "a template that keeps them"
    raise ChatError(
        f"an episode keeps the tokens of earlier turns, and the chat template rewrites them: {found}. "
        f"Set model.chat_template to {way}, or environment.0.history=as_rendered, which makes a fork of each such turn"
    )


def check_calls(tokenizer: PreTrainedTokenizerBase, tools: Tools) -> None:
    """Check that the chat template shows tools, and that a call as it writes it is read as one. Raises `ChatError`."""
    name = str(function_of(tools[0]).get("name"))
    call = {"type": "function", "function": {"name": name, "arguments": {"PlainKey": "PlainValue"}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "name": name, "content": "PlainResult"}
    try:
        prompt, turn = _text(tokenizer, [_USER], tools, answer=True), _text(tokenizer, [_USER, message], tools)
        after = _text(tokenizer, [_USER, message, result], tools, answer=True)
    except ChatError as error:
        raise ChatError(f"the chat template does not write tool calls and results ({error!s:.200}). {_FIX}") from error
    if name not in prompt or "PlainResult" not in after:
        raise ChatError(f"the chat template does not show tools and their results to the model. {_FIX}")
    sampled = turn.removeprefix(prompt)
    ids = tokenizer(sampled, add_special_tokens=False)["input_ids"]
    if [call] != parse_chat(tokenizer, ids, prompt, tools).get("tool_calls"):
        raise ChatError(
            f"tool calls as the chat template writes them cannot be read: {sampled!r:.200}. {_FIX}, or give the tokenizer a "
            "response_template, which transformers reads"
        )


def _keeping(tokenizer: PreTrainedTokenizerBase, followers: Sequence[Follower], tools: Tools | None) -> Path | None:
    """Return the file of TRL's training version of the template, if that keeps earlier turns."""
    import trl

    if (template := training_template(tokenizer)) is None:
        return None
    proxy: Any = _WithTemplate(tokenizer, template)
    try:
        if rewriting(proxy, followers, tools) is not None:
            return None
    except ChatError:
        return None
    files = (Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")
    return next((file for file in files if file.read_text(encoding="utf-8") == template), None)


class _WithTemplate(SimpleNamespace):
    """A tokenizer with another chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        super().__init__(tokenizer=tokenizer, chat_template=template)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def apply_chat_template(self, messages: Any, chat_template: str | None = None, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=chat_template or self.chat_template, **options
        )


def _probes(tokenizer: PreTrainedTokenizerBase, follower: Follower, tools: Tools | None) -> Iterator[_Probe]:
    prompt = _text(tokenizer, [_USER], tools, answer=True)
    opened, closed = opening_of(prompt), bool(_CLOSED_THOUGHT.search(prompt))
    call = {"type": "function", "function": {"name": "PlainTool", "arguments": {"PlainKey": "PlainValue"}}}
    turns: list[tuple[str, dict[str, Any]]] = []
    if follower == "user":
        turns.append(("a turn", {"role": "assistant", "content": ANSWER}))
    if tools:
        turns.append(("a tool call", {"role": "assistant", "content": None, "tool_calls": [call]}))
    for name, message in turns:
        if not opened:
            yield _Probe(name, message)
        if closed:
            continue
        for field in ("reasoning_content", "thinking"):
            thinking = {**message, field: THOUGHT}
            if THOUGHT in _text(tokenizer, [_USER, thinking], tools):
                yield _Probe(f"{name} with reasoning", thinking)
                break
        else:
            if message["content"] and (opened or "</think>" in str(tokenizer.chat_template)):
                full = f"{opened or '<think>'}\n{THOUGHT}\n</think>\n\n{ANSWER}"
                yield _Probe(f"{name} with reasoning", {**message, "content": full}, full.removeprefix(opened))


def _differs(tokenizer: PreTrainedTokenizerBase, probe: _Probe, follower: Follower, tools: Tools | None) -> bool:
    prompt = _text(tokenizer, [_USER], tools, answer=True)
    role = {"role": follower, "content": "PlainFollow"} | ({"name": "PlainTool"} if follower == "tool" else {})
    after = squeezed(_text(tokenizer, [_USER, probe.message, role], tools, answer=True))
    if probe.sampled is not None:
        return not after.startswith(squeezed(prompt + probe.sampled))
    turn = _text(tokenizer, [_USER, probe.message], tools)
    if not turn.startswith(prompt):
        return True
    sampled = _TURN.match(turn, len(prompt))
    texts = [sampled[0], EMPTY_THOUGHT.sub("", sampled[0], count=1)] if sampled else [turn[len(prompt) :]]
    return not any(
        after.startswith(squeezed(prompt + text)) for text in texts
    )  # a policy may leave an empty thought out


def _text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Tools | None, answer: bool = False
) -> str:
    """Render messages; reasoning may be dropped, nothing else."""
    kept = [{k: v for k, v in m.items() if k not in ("reasoning_content", "thinking")} for m in messages]
    for message in kept:
        if THOUGHT in str(message["content"]):
            message["content"] = ANSWER
    chat = chat_of(tokenizer, Conversation(kept, "answer" if answer else "complete"), tools=tools)
    return str(chat.apply(Conversation(messages, "answer" if answer else "complete"), tokenize=False))
