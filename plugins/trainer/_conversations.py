"""Tokenization of rows as reward models read them: texts unchanged, conversations with the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..rewards._models.text import Span, row_in, row_of, text_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ids_of(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any, column: str) -> list[int]:
    """Tokenize a prompt (or None) with its answer: texts, or lists of messages. Raises `ValueError` for anything else."""
    if isinstance(prompt, str) and not isinstance(answer, str):
        raise ValueError(f"{column} must be a text, like prompt, got {answer!r:.80}")
    if isinstance(answer, str) and not isinstance(prompt, list):
        ids = row_of(tokenizer, ((prompt or "") + answer,), chat=False, limit=None).ids
    else:
        messages = [] if prompt is None else _messages(prompt, "prompt")
        messages += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _messages(answer, column)
        _check_template(tokenizer)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        ids = row_of(tokenizer, (text,), chat=True, limit=None).ids
    if not ids:
        raise ValueError(f"prompt and {column} have no tokens")
    return ids


def ids_in(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: str
) -> tuple[list[int], list[Span | None]] | None:
    """Tokenize a prompt with its completion, and return for each token its characters in the completion, None outside.

    Returns None if a chat template changes the completion; as a reward the row has no score either.
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer does not report character offsets. Set model.tokenizer to a fast one")
    if prompt is not None and not isinstance(prompt, str):
        prompt = _messages(prompt, "prompt")
        _check_template(tokenizer)
    text = text_in(tokenizer, prompt or "", completion)
    if text is None:
        return None
    row, spans = row_in(tokenizer, text, None)
    return row.ids, spans


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError("conversations need a tokenizer with a chat template. Set model.chat_template")


def _messages(given: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given or not all(isinstance(m, Mapping) and "role" in m for m in given):
        raise ValueError(f"{column} must be a text or a list of messages with role and content, got {given!r:.80}")
    return [{key: value for key, value in message.items() if value is not None} for message in given]
