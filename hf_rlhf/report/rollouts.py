"""Completions to browse in a report, as many as fit."""

from __future__ import annotations

from typing import Any

from hf_rlhf.report.page import packed

LIMITS = ((4, None), (2, None), (1, None), (1, 2048), (1, 512), (1, 64), (0, 0))
"""(groups of a step, tokens of a completion) to try in turn."""


def fitted(data: dict[str, Any], rollouts: list[list[dict[str, Any]]], room: int) -> str:
    """Return `data` packed with the rollouts of each run under the first of `LIMITS` that keeps it within `room` bytes."""
    for groups, tokens in LIMITS:
        chosen = [[_cut(step, groups, tokens) for step in run] for run in rollouts] if groups else []
        found = packed({**data, "rollouts": chosen})
        if len(found) <= room:
            break
    return found


def _cut(step: dict[str, Any], groups: int, tokens: int | None) -> dict[str, Any]:
    chosen = step["groups"][:groups]
    if tokens is not None:
        chosen = [{**group, "rows": [_shortened(row, tokens) for row in group["rows"]]} for group in chosen]
    return {**step, "groups": chosen}


def _shortened(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a row without the tokens after the first ones; numbers of the others are not read."""
    left = len(row["pieces"]) - tokens
    return row if left <= 0 else {**row, "pieces": row["pieces"][:tokens], "left_out": left}
