"""Rows as text for a reward model, and their tokens with positions in the completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hf_rlhf.axes import chat

from .batches import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000"
"""Private-use character that marks the completion in a chat template."""

Span = tuple[int, int]


class Text(NamedTuple):
    """Text of a row as the model reads it, with the position of the completion."""

    text: str
    start: int
    stop: int
    stripped: int
    """Number of characters that the chat template stripped from the start of the completion."""
    chat: bool


def answered(prompt: chat.Messages, completion: str, opening: str = "") -> chat.Conversation:
    """Return a conversation with its answer, which continues the assistant's turn if the prompt ends inside one.

    `opening`: a tag that the policy's template wrote at the start of the assistant's turn.
    """
    *before, last = prompt
    if last["role"] == "assistant":
        return chat.Conversation([*before, {**last, "content": (last["content"] or "") + completion}])
    return chat.Conversation([*prompt, {"role": "assistant", "content": opening + completion}])


def text_in(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Any] | str, completion: str, opening: str = ""
) -> Text | None:
    """Join prompt and completion to one text; returns None if a chat template changes the completion.

    A template may strip whitespace around the completion. Raises `chat.ChatError` where it drops text.
    """
    if isinstance(prompt, str):
        return Text(prompt + completion, len(prompt), len(prompt + completion), 0, False)
    both = [answered(prompt, answer, opening) for answer in (MARK, completion)]
    around, text = chat.render(tokenizer, *both, training=True)
    start = around.rfind(MARK)
    front = len(completion) - len(completion.lstrip())
    if text[:start] != around[:start]:  # a template that writes an empty <think></think> for answers without thoughts
        start, kept = text.rfind(completion.strip()), completion.strip()
        return Text(text, start, start + len(kept), front, True) if start >= 0 and "</think>" in kept else None
    for stripped in (0, front):
        for kept in (completion[stripped:], completion[stripped:].rstrip()):
            if text[start:] == kept + around[start + len(MARK) :]:
                return Text(text, start, start + len(kept), stripped, True)
    return None


def row_of(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], chat: bool, limit: int | None) -> Row:
    """Tokenize one text, or two joined by the tokenizer's separator; text from a chat template has its special tokens."""
    return _row(tokenizer, tokenizer(*texts, add_special_tokens=not chat), limit)[0]


def row_in(tokenizer: PreTrainedTokenizerBase, text: Text, limit: int | None) -> tuple[Row, list[Span | None]]:
    """Tokenize a text and return for each token its characters in the completion, None outside of it."""
    encoded = tokenizer(text.text, add_special_tokens=not text.chat, return_offsets_mapping=True)
    row, kept = _row(tokenizer, encoded, limit)
    offsets = encoded["offset_mapping"]
    return row, [_within(text, *offsets[i]) for i in kept]


def _within(text: Text, start: int, end: int) -> Span | None:
    if end <= text.start or not (start < text.stop or end <= text.stop):
        return None
    shift = text.stripped - text.start
    return max(start, text.start) + shift, min(end, text.stop) + shift


def _row(tokenizer: PreTrainedTokenizerBase, encoded: Any, limit: int | None) -> tuple[Row, list[int]]:
    """Truncate a row to a BOS or [CLS] and its end, and return it with the indices of the kept tokens."""
    ids = encoded["input_ids"]
    length = len(chat.one_bos(tokenizer, ids))
    kept = list(range(len(ids) - length, len(ids)))
    if limit is not None and length > limit:
        front = int(limit > 1 and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
        kept = kept[:front] + kept[length - limit + front :]
    types = encoded.get("token_type_ids")
    return Row([ids[i] for i in kept], types and [types[i] for i in kept], len(kept) < length), kept
