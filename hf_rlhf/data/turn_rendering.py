"""The text that a chat template writes around the turns of a conversation, and its tokens.

What is new is found by template difference: the conversation is rendered with placeholders in place of what the assistant
said, so that no sampled text can confuse a template, and the text after the last placeholder is what follows that turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf.contract.chat import ChatError, Conversation, Messages, chat_of, function_of, one_bos
from hf_rlhf.data.turn_parsing import Tools, parse_chat, parse_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "Xq7zPlaceholder"


@dataclass(frozen=True)
class ChatTurns:
    """Turns of a conversation that a chat template renders."""

    tokenizer: PreTrainedTokenizerBase

    def opening(self, messages: Messages, tools: Tools | None) -> str:
        """Return the text of a whole conversation up to the start of the assistant's turn."""
        end: Literal["open", "answer"] = "open" if messages[-1]["role"] == "assistant" else "answer"
        conversation = Conversation(messages, end)
        return chat_of(self.tokenizer, conversation, tools=tools).text(conversation)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a whole rendered conversation."""
        return one_bos(self.tokenizer, self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def addition(
        self, before: Messages, added: Messages, tools: Tools | None, sampled: Sequence[int]
    ) -> tuple[str, list[int]]:
        """Return what follows a sampled turn up to the start of the next one, as text and tokens.

        `before` ends with the message of that turn, and `sampled` are its tokens: the template's closing of the turn comes
        first, less the end token that was sampled.
        """
        turn, after = self._around(before, added, tools)
        end = self._end(sampled)
        if end and end in turn and end in after:
            text = after.partition(end)[2]
        elif before[-1].get("tool_calls") and after.startswith(turn):  # cut, maybe inside a call: close it as a text
            text = self._around([*before[:-1], _without_calls(before[-1])], [], tools)[0] + after.removeprefix(turn)
        else:
            text = after
        return text, self._following(text)

    def rendered(self, messages: Messages, tools: Tools | None) -> str:
        """Return a conversation with what the assistant said, as the template renders it; it may drop text of earlier turns."""
        shape = Conversation(_shaped(messages), "answer")
        return str(chat_of(self.tokenizer, shape, tools=tools).apply(Conversation(messages, "answer"), tokenize=False))

    def message(self, ids: Sequence[int], before: Sequence[int], prefix: str, tools: Tools | None) -> dict[str, Any]:
        """Return the message of a sampled turn; `before` and `prefix` are the tokens before it and the end of their text."""
        return parse_chat(self.tokenizer, ids, prefix, tools)

    def _around(self, before: Messages, added: Messages, tools: Tools | None) -> tuple[str, str]:
        """Return what the template writes after the text of a turn that is the last message, and of one that is not."""
        shape = _shaped(before)
        whole = Conversation([*shape, *added], "answer")
        chat = chat_of(self.tokenizer, whole, tools=tools)
        texts = [str(chat.apply(Conversation(shape), tokenize=False)), chat.text(whole)]
        if not all(PLACEHOLDER in text for text in texts):
            raise ChatError(
                "the chat template drops what the assistant said. Set model.chat_template to one that keeps it"
            )
        turn, after = (text.rpartition(PLACEHOLDER)[2] for text in texts)
        return turn, after

    def _end(self, sampled: Sequence[int]) -> str | None:
        """Return the text of a turn's last token if it is a special one."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return str(self.tokenizer.decode([sampled[-1]])) if sampled and sampled[-1] in special else None

    def _following(self, text: str) -> list[int]:
        """Return the tokens of a text that follows a special token."""
        end = str(self.tokenizer.eos_token)
        first = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        both = self.tokenizer(end + text, add_special_tokens=False)["input_ids"]
        if both[: len(first)] == first:
            return both[len(first) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class TextTurns:
    """Turns after a prompt that is plain text: contents follow each other as they are, tool results on lines of their own."""

    tokenizer: PreTrainedTokenizerBase

    def opening(self, messages: Messages, tools: Tools | None) -> str:
        return _joined(messages)

    def encode(self, text: str) -> list[int]:
        return one_bos(self.tokenizer, self.tokenizer(text)["input_ids"])

    def addition(
        self, before: Messages, added: Messages, tools: Tools | None, sampled: Sequence[int]
    ) -> tuple[str, list[int]]:
        text = _joined(added)
        return text, self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def rendered(self, messages: Messages, tools: Tools | None) -> str:
        return _joined(messages)

    def message(self, ids: Sequence[int], before: Sequence[int], prefix: str, tools: Tools | None) -> dict[str, Any]:
        return parse_text(self.tokenizer, ids, before, tools)


Turns = ChatTurns | TextTurns


def turns_of(tokenizer: PreTrainedTokenizerBase, text: bool) -> Turns:
    """Return the rendering of conversations by the chat template, or of prompts that are plain text. Raises `ChatError`."""
    if text:
        return TextTurns(tokenizer)
    if not tokenizer.chat_template:
        raise ChatError("conversations need a tokenizer with a chat template. Set model.chat_template")
    return ChatTurns(tokenizer)


def _joined(messages: Messages) -> str:
    return "".join(
        f"\n{message['content']}\n" if message["role"] == "tool" else str(message["content"] or "")
        for message in messages
    )


def _shaped(messages: Messages) -> Messages:
    """Put placeholders in place of what the assistant said, keeping the names of tool calls; a turn after its start is one."""
    shaped: Messages = []
    for message in messages:
        if message["role"] != "assistant":
            shaped.append(message)
            continue
        if shaped and shaped[-1]["role"] == "assistant":
            shaped.pop()
        made: dict[str, Any] = {"role": "assistant", "content": PLACEHOLDER}
        if message.get("tool_calls"):
            made = {"role": "assistant", "content": None, "tool_calls": list(map(_shaped_call, message["tool_calls"]))}
        shaped.append(made)
    return shaped


def _shaped_call(call: Any) -> dict[str, Any]:
    rest = {key: value for key, value in call.items() if key == "id"}
    function = {"name": function_of(call).get("name"), "arguments": {"x": PLACEHOLDER}}
    return {**rest, "type": "function", "function": function}


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "tool_calls"}
