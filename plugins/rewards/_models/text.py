"""A row as text for a reward model, and its tokens with their places in the completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .batches import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000"
"""A character of the private use area that stands for the completion in a chat template."""

Span = tuple[int, int]


class Text(NamedTuple):
    """What the model reads of a row, and where the completion lies in it."""

    text: str
    start: int
    stop: int
    stripped: int
    """Characters that the chat template took from the front of the completion."""
    chat: bool


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: list[Any], completion: str) -> str:
    """The conversation with its answer, by the tokenizer's chat template."""
    answer = {"role": "assistant", "content": completion}
    return str(tokenizer.apply_chat_template([*prompt, answer], tokenize=False))


def text_in(tokenizer: PreTrainedTokenizerBase, prompt: list[Any] | str, completion: str) -> Text | None:
    """Prompt and completion as one text; None where a chat template does not give the completion back whole.

    A template may strip white space around the completion.
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
    """The tokens of one text, or of two that the tokenizer puts a separator between. A chat template's text brings its own
    special tokens."""
    return _row(tokenizer, tokenizer(*texts, add_special_tokens=not chat), limit)[0]


def row_in(tokenizer: PreTrainedTokenizerBase, text: Text, limit: int | None) -> tuple[Row, list[Span | None]]:
    """The tokens of a text, and for each its characters in the completion, None outside of it."""
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
    """The row that the model sees, and the places of its tokens in the whole text: the end, behind a BOS or [CLS]."""
    ids = encoded["input_ids"]
    kept = list(range(len(ids)))
    if limit is not None and len(ids) > limit:
        front = int(limit > 1 and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
        kept = kept[:front] + kept[len(ids) - limit + front :]
    types = encoded.get("token_type_ids")
    return Row([ids[i] for i in kept], types and [types[i] for i in kept], len(kept) < len(ids)), kept
