"""Tokens as text: the part that each token adds, and the runs of tokens that do and do not train."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

LONGEST = 4
"""Most tokens of a character."""


class Span(NamedTuple):
    """Adjacent tokens of a completion with the same mask."""

    mask: int
    tokens: int
    text: str


def spans_of(tokenizer: Any, ids: Sequence[int], mask: Sequence[float]) -> list[Span]:
    """Return a completion as runs of tokens with mask 1, which train, and mask 0, with special tokens in their texts."""
    (pieces,) = pieces_of(tokenizer, [list(ids)])
    runs = [[*run] for _, run in groupby(zip(pieces, mask, strict=True), key=lambda pair: pair[1])]
    return [Span(int(run[0][1]), len(run), "".join(piece for piece, _ in run)) for run in runs]


def pieces_of(tokenizer: Any, rows: list[list[int]]) -> list[list[str]]:
    """Return the text that each token adds to its row; of a character of several tokens, the last one has it."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    ids = sorted({i for row in rows for i in row})
    if not ids:
        return [[] for _ in rows]
    start = ids[0]
    (before,) = tokenizer.batch_decode([[start]], **options)
    after = tokenizer.batch_decode([[start, i] for i in ids], **options)  # a text's first space may be stripped
    known = {i: text[len(before) :] for i, text in zip(ids, after, strict=True)}
    first = dict(zip(ids, tokenizer.batch_decode([[i] for i in ids], **options), strict=True))
    found = []
    for row, whole in zip(rows, tokenizer.batch_decode(rows, **options), strict=True):
        pieces = [first[row[0]], *(known[i] for i in row[1:])] if row else []
        found.append(
            pieces if "".join(pieces) == whole and "\ufffd" not in whole else _in_turn(tokenizer, row, options)
        )
    return found


def _in_turn(tokenizer: Any, row: list[int], options: dict[str, Any]) -> list[str]:
    """Decode token by token, each after the tokens of the last whole character."""
    pieces: list[str] = []
    start = own = 0  # first token of the last whole character, and of the one after it
    for i in range(len(row)):
        before, text = tokenizer.batch_decode([row[start:own], row[start : i + 1]], **options)
        if text.endswith("\ufffd") and i + 1 < len(row) and i - own < LONGEST:
            pieces.append("")
        else:
            pieces.append(text[len(before) :])
            start, own = own, i + 1
    return pieces
