"""Parse what the policy sampled in a turn as a message: text, reasoning and tool calls.

A tokenizer's own `response_template` reads it (transformers), or TRL's for the families whose chat templates it knows, TRL's
training versions of them included. For other chat templates a call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`;
for prompts that are plain text it is `[name(...)]`, with Python literals as arguments, or with the bare text for a tool of one
parameter: `[calculate(3 * 4)]`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_rlhf.contract.chat import function_of, opening_of, parsed_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]]
"""JSON schemas, as `transformers.utils.get_json_schema` makes them."""
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_BRACKETED = re.compile(r"\[([A-Za-z_]\w*)\((.*?)\)\]", re.DOTALL)
TAIL = 8
"""Tokens before a turn that are decoded with it: decoders of SentencePiece kind strip a text's first space."""


def parse_chat(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prefix: str, tools: Tools | None = None
) -> dict[str, Any]:
    """Return the message of a sampled turn; `prefix` is the text of its prompt, or the end of it from the assistant's header on.

    A turn that cannot be parsed, such as one with a malformed call, is its text, with the reason in `parse_error`.
    """
    template = getattr(tokenizer, "response_template", None) or _known_response_template(str(tokenizer.chat_template))
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    try:
        if template is None:
            return _tagged(opening_of(prefix) + _bare(tokenizer, ids).strip(), tools)
        parsed: Any = tokenizer.parse_response(text, template, prefix=prefix, tools=[*tools] if tools else None)
        content = str(parsed.get("content") or "").removesuffix(str(tokenizer.eos_token))
        message = {**parsed, "role": "assistant", "content": content}
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
        return message
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        content = opening_of(prefix) + _bare(tokenizer, ids)
        return {"role": "assistant", "content": content, "parse_error": str(error).partition("\n")[0]}


def parse_text(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int], tools: Tools | None = None
) -> dict[str, Any]:
    """Return the message of a turn after a prompt that is plain text; `before` are the tokens before it."""
    tail = list(before[-TAIL:])
    start, joint = _bare(tokenizer, tail), _bare(tokenizer, [*tail, *ids])
    content = joint.removeprefix(start) if joint.startswith(start) else _bare(tokenizer, ids)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if tools and (found := _BRACKETED.findall(content)):
        try:
            calls = [{"name": name, "arguments": _literals(name, given, tools)} for name, given in found]
        except ValueError as error:
            return {**message, "parse_error": str(error)}
        message |= {"content": _BRACKETED.split(content)[0], "tool_calls": [_call(call) for call in calls]}
    return message


def _bare(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


@cache
def _known_response_template(template: str) -> dict[str, Any] | None:
    """Return TRL's response template for a chat template that it ships, or for its training version; None for others."""
    import trl
    from trl import add_response_schema

    folder = Path(trl.__file__).parent / "chat_templates"
    for file in folder.glob("*_training.jinja"):
        if file.read_text(encoding="utf-8") == template:
            template = (folder / file.name.replace("_training", "")).read_text(encoding="utf-8")
            break
    holder: Any = SimpleNamespace(chat_template=template, response_template=None)
    try:
        add_response_schema(holder)
    except ValueError:
        return None
    return holder.response_template


def _tagged(text: str, tools: Tools | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tools and (found := _TAGGED.findall(text)):
        calls = [_call(json.loads(call)) for call in found]
        message |= {"content": _TAGGED.split(text)[0].strip(), "tool_calls": calls}
    return message


def _call(given: Any) -> dict[str, Any]:
    """Return a call with a name and a mapping of arguments. Raises `ValueError` without them."""
    function = function_of(given)
    arguments = parsed_arguments(function.get("arguments", function.get("parameters")))
    if not isinstance(name := function.get("name"), str) or not isinstance(arguments or {}, Mapping):
        raise ValueError(
            f"a tool call must have a name and a mapping of arguments, got {json.dumps(given, default=str):.200}"
        )
    rest = {key: given[key] for key in ("id",) if given.get(key) is not None}
    return {**rest, "type": "function", "function": {"name": name, "arguments": dict(arguments or {})}}


def _literals(name: str, given: str, tools: Tools) -> dict[str, Any]:
    """Return the arguments of `name(given)`: Python literals, by position or name, or the bare text of one parameter."""
    properties: Mapping[str, Any] = {}
    for tool in tools:
        if function_of(tool).get("name") == name:
            properties = (function_of(tool).get("parameters") or {}).get("properties") or {}
    names = list(properties)
    bare = {names[0]: given.strip()} if len(names) == 1 and given.strip() else None
    try:
        call = ast.parse(f"f({given})", mode="eval").body
        if isinstance(call, ast.Call) and len(call.args) <= len(names):
            values = [ast.literal_eval(value) for value in call.args]
            if (
                bare
                and len(values) == 1
                and properties[names[0]].get("type") == "string"
                and not isinstance(values[0], str)
            ):
                return bare
            named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            return dict(zip(names, values, strict=False)) | named
    except (SyntaxError, ValueError):
        if bare:
            return bare
    raise ValueError(f"the arguments of {name}({given:.80}) must be Python literals")
