"""Samplers of prompts that are wrong; see `base`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from hf_rlhf.axes import PromptSampler
from tests.contract.mutants.base import Mutant


@dataclass(kw_only=True)
class Recent(PromptSampler):
    """Right: half of the rows come from those that the last rollout did not solve."""

    name = "recent"

    def __post_init__(self) -> None:
        self._hard: list[int] = []

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        again = rng.sample(self._hard, min(count // 2, len(self._hard)))
        return again + rng.sample(range(rows), count - len(again))

    def observe(self, rows: Sequence[int], scores: Sequence[float]) -> None:  # type: ignore[override]
        self._hard = sorted({row for row, score in zip(rows, scores, strict=True) if score < 1})

    def state_dict(self) -> dict[str, Any]:
        return {"hard": self._hard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._hard = list(state.get("hard", ()))


class Greedy(Recent):
    """Returns one row too many, from what it has drawn ahead."""

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        return super().next(min(count + 1, rows), rows, rng)


class Numbered(Recent):
    """Counts rows from 1, as the dataset's viewer does."""

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        return [row + 1 for row in super().next(count, rows, rng)]


class Ranked(Recent):
    """Draws its process's share."""

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return [(row + rank) % rows for row in super().next(count, rows, rng)]


class Global(Recent):
    """Draws from Python's generator, which reward sources use too."""

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        return random.sample(range(rows), count)


class Impatient(Recent):
    """Divides by the rows that had a score."""

    def observe(self, rows: Sequence[int], scores: Sequence[float]) -> None:  # type: ignore[override]
        super().observe(rows, scores)
        known = [score for score in scores if score == score]
        self.mean = sum(known) / len(known)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": getattr(self, "mean", 0.0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean = state.get("mean", 0.0)


class Forgetful(Recent):
    """Remembers what it drew, and a checkpoint does not."""

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        last = getattr(self, "_last", set())
        found = [row for row in super().next(count, rows, rng) if row not in last]
        found += [row for row in range(rows) if row not in {*found, *last}][: count - len(found)]
        self._last = set(found) if rows > 2 * count else set()
        return found


MUTANTS = [
    Mutant(Greedy, "draws", "must return 1 row numbers", ("equal draws", "own generator", "late", "same draws")),
    Mutant(Numbered, "draws", "from 0 to 22, got", ("equal draws", "own generator", "late", "same draws")),
    Mutant(Ranked, "equal draws", "process 0 draws"),
    Mutant(Global, "own generator", "Draw from rng", ("equal draws", "same draws")),
    Mutant(Impatient, "late", "division by zero"),
    Mutant(Forgetful, "same draws", "Return from state_dict what it remembers"),
]
