"""1 if the completion has a given format, else 0, such as the tags of DeepSeek-R1 (arXiv:2501.12948, section 2.2.2)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Positive, RewardSource
from hf_rlhf.batch import Rollouts

from ._answers import boxed
from ._patterns import compiled

R1 = r"\s*<think>.*</think>\s*<answer>.*</answer>"


@dataclass(kw_only=True)
class Format(RewardSource):
    r"""1.0 if the completion satisfies each of `pattern`, `tags` and `boxed` that is set, else 0.0.

    If none is set, the pattern is DeepSeek-R1's, \s*<think>.*</think>\s*<answer>.*</answer>. A tag that the prompt leaves
    open at its end, such as <think>, may count as the completion's first.
    """

    name = "format"
    rowwise = True

    pattern: str | None = None
    """Regular expression, in the syntax of the `regex` library, that must match the whole completion; `.` matches line
    breaks too. End it with `.*` to allow any suffix."""
    tags: tuple[str, ...] = ()
    """Names of tags, e.g. [think, answer]: each must open once and close once, in this order, with only whitespace before,
    between and after them."""
    boxed: bool = False
    r"""Require exactly one \\boxed{}, closed and not empty."""
    timeout: Positive | None = 5.0
    """Time limit in seconds for matching a row."""

    def __post_init__(self) -> None:
        if len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags must be distinct, got {', '.join(self.tags)}")
        if self._whole is not None:
            compiled("pattern", self._whole, dotall=True)

    def prepare(self) -> None:
        if self._whole is not None:
            compiled("pattern", self._whole, dotall=True)

    def __call__(self, rollouts: Rollouts) -> list[float]:
        rows = zip(rollouts.completions, rollouts.turns(), strict=True)
        return [
            float(self._meets(completion) or (completion != turn and self._meets(turn))) for completion, turn in rows
        ]

    def patterns(self) -> set[str]:
        return {*(f"<{name}></{name}>" for name in self.tags), self._whole or ""}

    @property
    def _whole(self) -> str | None:
        return R1 if self.pattern is None and not self.tags and not self.boxed else self.pattern

    def _meets(self, text: str) -> bool:
        if self.tags and not self._has_tags(text):
            return False
        if self.boxed and (text.count("\\boxed") != 1 or not (boxed(text) or "").strip()):
            return False
        if self._whole is None:
            return True
        return compiled("pattern", self._whole, dotall=True).fullmatch(text, timeout=self.timeout) is not None

    def _has_tags(self, text: str) -> bool:
        """Return True if the tags occur in order with nothing around them, and no others."""
        names = "|".join(map(re.escape, self.tags))
        pieces = re.split(rf"(</?(?:{names})>)", text)
        due = [mark for name in self.tags for mark in (f"<{name}>", f"</{name}>")]
        return pieces[1::2] == due and not "".join(pieces[0::4]).strip()


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Format]
