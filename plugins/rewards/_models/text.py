"""Rows as text for a reward model, and their tokens with positions in the completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: list[Any], completion: str) -> str:
    """Render the conversation and the completion with the tokenizer's chat template."""
    answer = {"role": "assistant", "content": completion}
    return str(tokenizer.apply_chat_template([*prompt, answer], tokenize=False))


def text_in(tokenizer: PreTrainedTokenizerBase, prompt: list[Any] | str, completion: str) -> Text | None:
    """Join prompt and completion to one text; returns None if a chat template changes the completion.

    A template may strip whitespace around the completion.
    """
    if isinstance(prompt, str):
        return Text(prompt + completion, len(prompt), len(prompt + completion), 0, False)
    around, text = rendered(tokenizer, prompt, MARK), rendered(tokenizer, prompt, completion)
    start = around.rfind(MARK)
    if start < 0 or text[:start] != around[:start]:
        return None
    front = len(completion) - len(completion.lstrip())
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
    kept = list(range(len(ids)))
    if limit is not None and len(ids) > limit:
        front = int(limit > 1 and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
        kept = kept[:front] + kept[len(ids) - limit + front :]
    types = encoded.get("token_type_ids")
    return Row([ids[i] for i in kept], types and [types[i] for i in kept], len(kept) < len(ids)), kept
