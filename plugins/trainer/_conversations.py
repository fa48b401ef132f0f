"""Tokenization of rows as reward models read them: texts unchanged, conversations with the tokenizer's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import chat

from ..rewards._models.text import Span, row_in, row_of, text_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Named = tuple[str, Any]
"""Column of an answer, and the answer."""


def ids_of(tokenizer: PreTrainedTokenizerBase, prompt: Any, *answers: Named) -> list[list[int]]:
    """Tokenize a prompt (or None) with each of its answers: texts, or lists of messages, all rendered in one way.

    Raises `ValueError` for anything else.
    """
    if (prompt is not None and not isinstance(prompt, str)) or not all(
        isinstance(answer, str) for _, answer in answers
    ):
        _, conversations = conversations_of(prompt, *answers)
        texts = chat.render(tokenizer, *conversations, training=True)
        rows = [row_of(tokenizer, (text,), chat=True, limit=None).ids for text in texts]
    else:
        rows = [row_of(tokenizer, ((prompt or "") + answer,), chat=False, limit=None).ids for _, answer in answers]
    for (column, _), ids in zip(answers, rows, strict=True):
        if not ids:
            raise ValueError(f"prompt and {column} have no tokens")
    return rows


def conversations_of(prompt: Any, *answers: Named) -> tuple[chat.Messages, list[chat.Conversation]]:
    """Return the messages of a prompt (or None), and the conversation of each answer to it. Raises `ValueError`."""
    for column, answer in answers:
        if isinstance(prompt, str) and not isinstance(answer, str):
            raise ValueError(
                f"{column} must be a text, like prompt, got {answer!r:.80}. If it holds the whole conversation, set "
                "dataset.prompt_column=null"
            )
    messages = [] if prompt is None else chat.messages_of(prompt, "prompt")
    found = []
    for column, answer in answers:
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        found.append(chat.Conversation([*messages, *chat.messages_of(answer, column)]))
    return messages, found


def answers_to(tokenizer: PreTrainedTokenizerBase, prompt: Any, *answers: Named) -> tuple[str, list[str]]:
    """Render a conversation up to the assistant's turn, and with each answer to it. Raises `ValueError`."""
    messages, conversations = conversations_of(prompt, *answers)
    start = chat.Conversation(messages, "answer")
    before, *whole = chat.render(tokenizer, start, *conversations, training=True)
    if not all(text.startswith(before) for text in whole):
        raise ValueError(
            f"the chat template renders the prompt differently once it is answered ({before[-40:]!r} ends the prompt). Set "
            "model.chat_template to one that does not"
        )
    return before, whole


def ids_in(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: str
) -> tuple[list[int], list[Span | None]] | None:
    """Tokenize a prompt with its completion, and return for each token its characters in the completion, None outside.

    Returns None if a chat template changes the completion; as a reward the row has no score either.
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer does not report character offsets. Set model.tokenizer to a fast one")
    if prompt is not None and not isinstance(prompt, str):
        prompt = chat.messages_of(prompt, "prompt")
    text = text_in(tokenizer, prompt or "", completion)
    if text is None:
        return None
    row, spans = row_in(tokenizer, text, None)
    return row.ids, spans
