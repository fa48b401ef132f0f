"""Each epoch's rows in a new random order, none dropped in between.

A dataset read as a stream is shuffled in a window of 1,000 instead, and `dataset.shuffle: false` keeps the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import PromptSampler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


@dataclass(kw_only=True)
class Shuffled(PromptSampler):
    """Each epoch's rows in a new random order."""

    name = "shuffled"
    words = "each epoch in a new random order"
    random_access = False

    def __post_init__(self) -> None:
        self._left: list[int] = []  # of the epoch, the next one last

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        drawn: list[int] = []
        while len(drawn) < count:
            if not self._left:
                order = list(range(rows))
                rng.shuffle(order)
                self._left = order[::-1]
            drawn.append(self._left.pop())
        return drawn

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin an epoch: the order is drawn again from its seed, so that a checkpoint need not hold it."""
        self._left = []


@hookimpl
def sampler() -> list[type[PromptSampler]]:
    return [Shuffled]
