"""Texts from a file or a dataset on the Hub, with errors that name the column and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def is_file(path: str) -> bool:
    """Whether `path` names a file of texts, and not a dataset."""
    return path.endswith((".txt", ".jsonl"))


def read_texts(path: str, column: str, split: str) -> list[str]:
    """Every text of a .txt file (one per line), of a .jsonl file or of a dataset's split. Empty lines are skipped.

    Raises `ValueError` where a row has no text in `column`.
    """
    if not is_file(path):
        from datasets import load_dataset

        return [_text(row, column, path) for row in load_dataset(path, split=split)]
    lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip()]
    return lines if path.endswith(".txt") else [_text(json.loads(line), column, path) for line in lines]


def _text(row: Any, column: str, path: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        there = ", ".join(sorted(row)) if isinstance(row, dict) else repr(row)
        raise ValueError(
            f"loss_terms.ptx: a row of {path!r} has no text in column {column!r}; it has: {there}. Set column to one "
            "that holds texts"
        )
    return text
