"""Completions to browse in a report, as many as fit."""

from __future__ import annotations

from typing import Any

from hf_rlhf.report.page import packed

LIMITS = (
    *((4, None), (3, None), (2, None), (1, None)),
    *((1, 3072), (1, 1536), (1, 768), (1, 384), (1, 96)),
)
"""(groups of a step, tokens of a completion) to try in turn; numbers of tokens are divisible by 3, as base64 is cut there."""
NUMBERS = ("advantage", "kl", "logp")


def fitted(rollouts: list[list[dict[str, Any]]], room: int) -> str:
    """Return the rollouts of each run packed, under the first of `LIMITS` that keeps them within `room` bytes."""
    by_token = 0.0
    for groups, tokens in LIMITS:
        chosen = [[_cut(step, groups, tokens) for step in run] for run in rollouts]
        count = _tokens(chosen)
        if count * by_token < 1.2 * room:  # what is far too much need not be packed
            found = packed(chosen)
            if len(found) <= room:
                return found
            by_token = len(found) / max(count, 1)
    return packed([])


def _tokens(rollouts: list[list[dict[str, Any]]]) -> int:
    return sum(
        len(row["pieces"]) for run in rollouts for step in run for group in step["groups"] for row in group["rows"]
    )


def _cut(step: dict[str, Any], groups: int, tokens: int | None) -> dict[str, Any]:
    chosen = step["groups"][:groups]
    if tokens is not None:
        chosen = [{**group, "rows": [_shortened(row, tokens) for row in group["rows"]]} for group in chosen]
    return {**step, "groups": chosen}


def _shortened(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a row with its first tokens and their numbers."""
    left = len(row["pieces"]) - tokens
    if left <= 0:
        return row
    numbers = {name: {**row[name], "data": row[name]["data"][: tokens // 3 * 4]} for name in NUMBERS if row.get(name)}
    return {**row, **numbers, "pieces": row["pieces"][:tokens], "left_out": left}
