"""Base class of the axis `sampler`: which prompts come next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Plugin


@dataclass(kw_only=True)
class PromptSampler(Plugin, ABC):
    """Choose the prompts of each rollout. Axis `sampler`.

    Called with the same arguments on every process, so that all draw the same rows. Its state is saved with the position in
    the dataset; a sampler whose `state_dict()` is empty is asked again, on resume, for all rows of the epoch so far.
    """

    axis = Axis(section="Rollouts", metric_prefix="sampler", default="shuffled")

    random_access: ClassVar[bool] = True
    """False where a dataset read as a stream, or with `dataset.shuffle: false`, may replace its order, without being asked."""

    @abstractmethod
    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        """Return the next `count` row numbers, from 0 to `rows` - 1.

        An epoch is as many draws as the dataset has rows, and no call reaches beyond its end. `rng` is seeded by run, epoch
        and position in it: the source of all random numbers.
        """

    def observe(self, rows: Sequence[int], scores: Sequence[float]) -> None:  # type: ignore[override]
        """Take the row number and the score of each completion of a rollout, once per rollout, those of dropped rows included.

        A score is the weighted total of the reward sources before clipping, normalization and KL, NaN where none applied. With
        rollouts ahead of the updates it observes late: rows of several rollouts may be drawn before the first is observed.
        """
