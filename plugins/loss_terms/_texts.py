"""Texts from a file or a dataset on the Hub, with errors that name the column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def is_file(path: str) -> bool:
    """Return True if `path` names a text file rather than a dataset."""
    return path.endswith((".txt", ".jsonl"))


def read_texts(path: str, column: str, split: str) -> list[str]:
    """Read all texts of a .txt file (one per line), a .jsonl file or a dataset's split, skipping empty lines.

    Raises `ValueError` if a row has no text in `column`.
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
            f"loss_terms.ptx: a row of {path!r} has no text in column {column!r}; its columns: {there}. Set column to a "
            "text column"
        )
    return text
