"""Reward for completions similar to the reference, by RapidFuzz."""

from dataclasses import dataclass
from typing import Literal

from rapidfuzz import fuzz, utils

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts


@dataclass(kw_only=True)
class Similarity(RewardSource):
    """Similarity of the completion and the reference, 0 to 1; no score without a reference."""

    name = "similarity"
    rowwise = True

    column: str = "answer"
    """Dataset column of the reference."""
    scorer: Literal["ratio", "partial_ratio", "token_sort_ratio", "token_set_ratio", "WRatio"] = "ratio"
    """Function of `rapidfuzz.fuzz`: `ratio` counts edits, `partial_ratio` finds the reference inside a longer text, the
    `token_` ones ignore the order of words."""
    exact: bool = False
    """Compare exact characters; otherwise ignore case and punctuation."""

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        compare = getattr(fuzz, self.scorer)
        plain = None if self.exact else utils.default_process
        rows = zip(rollouts.completions, rollouts.column(self.column), strict=True)
        return [None if ref is None else compare(text, str(ref), processor=plain) / 100 for text, ref in rows]

    def columns(self) -> set[str]:
        return {self.column}


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Similarity]
