"""Conversations, and a policy that samples what a chat template writes for them."""

from __future__ import annotations

from typing import Any

from hf_rlhf.contract.chat import Conversation, chat_of, messages_of
from tests.helpers.chats import chat_tokenizer, text_of

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "Words."}},
            "required": ["query"],
        },
    },
}
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|return|>", "<|call|>", "<|tool_response>", "<|user|>",
        "<|observation|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|end|>")  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def calls(*queries: str, **fields: Any) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": "search", "arguments": {"query": query}}} for query in queries]
    return {"role": "assistant", "content": None, "tool_calls": made, **fields}


def found(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "search", "content": text}


PLAIN = [user("hi"), says("Hello there."), user("again"), says("Yes."), user("bye"), says("Bye.")]
TWO = [user("hi"), says("Hello."), {"role": "user", "content": " one\n"}, user("two"), says("x")]
TOOLS = [user("Berlin?"), calls("Berlin"), found("a city"), calls("more"), found("big"), says("It is big.")]
SIDE_BY_SIDE = [user("Both?"), calls("Berlin", "Rome"), found("a city"), found("older"), says("Cities.")]


def thinking(conversation: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """Return the conversation with reasoning in each turn of the assistant."""
    return [{**m, field: f"Thought {i}."} if m["role"] == "assistant" else m for i, m in enumerate(conversation)]


def episode_tokenizer(template: str, **kwargs: Any) -> Any:
    """Return a tokenizer with the template and the end tokens that occur in it."""
    ends = [end for end in ENDS if end in text_of(template)]
    inner = [token for token in ("<|END_RESPONSE|>", "<|START_RESPONSE|>") if token in text_of(template)]
    tokenizer = chat_tokenizer(template, special=(*ends, *inner), **kwargs)
    if ends and tokenizer.eos_token not in ends:
        tokenizer.eos_token = ends[0]
    return tokenizer


def rendering(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, end: Any = "answer") -> str:
    """Return a conversation as the template renders it, reasoning of earlier turns as it will have it."""
    kept = messages_of(messages, "c")
    shown = [{k: v for k, v in m.items() if k not in ("reasoning_content", "thinking")} for m in kept]
    chat = chat_of(tokenizer, Conversation(shown, end), tools=tools)
    return str(chat.apply(Conversation(kept, end), tokenize=False))


def turn_ids(tokenizer: Any, before: list[dict[str, Any]], message: dict[str, Any], tools: Any) -> list[int]:
    """Return the tokens of a turn as the template writes it, up to its end token."""
    start = rendering(tokenizer, before, tools)
    whole = rendering(tokenizer, [*before, message], tools, "complete")
    assert whole.startswith(start)
    ids = tokenizer(whole.removeprefix(start), add_special_tokens=False)["input_ids"]
    ends = {tokenizer.convert_tokens_to_ids(end) for end in ENDS} & {
        tokenizer.eos_token_id,
        *tokenizer.added_tokens_decoder,
    }
    channel = "<|channel|>" in whole and message.get("thinking")  # gpt-oss ends its thoughts with <|end|>
    inner = {tokenizer.convert_tokens_to_ids("<|end|>")} if channel else set()
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends - inner), len(ids))]
