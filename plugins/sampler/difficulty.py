"""Prompts that are solved about half of the time come more often: their completions differ most (arXiv:2504.03380).

The variance p (1 - p) of a binary score bounds what a policy gradient learns from a prompt with pass rate p. The paper drops
prompts outside a band of pass rates; here every prompt keeps a weight, since the policy, and with it p, changes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Algorithm, Count, PromptSampler

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from random import Random


@dataclass(kw_only=True)
class Difficulty(PromptSampler):
    """Draw prompts with weight floor + (1 - floor) 4 p (1 - p), p the running pass rate; 1 for a prompt not seen yet.

    Drawn without replacement from the prompts whose last draw has been observed, from all if those are too few.
    """

    name = "difficulty"
    needs = frozenset({"total_score"})
    words = "those that pass about half of the time come most (in the last {window} draws)"
    metrics = (
        Metric("pass_rate", "fraction", "mean of the running pass rates of the prompts seen so far"),
        Metric("seen", "count", "prompts with a running pass rate"),
        Metric("always_frac", "fraction", "prompts seen so far whose completions all pass"),
        Metric("never_frac", "fraction", "prompts seen so far none of whose completions pass"),
    )

    passes: float = 0.5
    """Score from which on a completion passes: the weighted total of the reward sources before clipping and normalization."""
    window: Count = 4
    """Last draws of a prompt that count in its pass rate."""
    warmup: Annotated[int, Ge(0)] = 8
    """Rollouts at the start in which all prompts have the same weight."""
    floor: Annotated[float, Gt(0), Le(1)] = 0.1
    """Weight of a prompt that is always or never solved, relative to one that is solved half of the time."""

    def __post_init__(self) -> None:
        self._rollouts = 0
        self._passed: dict[int, deque[tuple[int, int]]] = {}  # row -> (passed, scored) of its last draws
        self._open: list[int] = []  # rows that are drawn and not observed

    def rates(self) -> dict[int, float]:
        """Return row number -> running pass rate."""
        return {row: sum(n for n, _ in seen) / sum(n for _, n in seen) for row, seen in self._passed.items()}

    def weights(self, rows: int) -> Any:
        """Return the weight of each row, an array (rows,)."""
        import numpy as np

        weights = np.ones(rows)
        if self._rollouts >= self.warmup:
            for row, p in self.rates().items():
                if row < rows:
                    weights[row] = self.floor + (1 - self.floor) * 4 * p * (1 - p)
        return weights

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        import numpy as np

        weights, late = self.weights(rows), np.zeros(rows)
        late[[row for row in self._open if row < rows]] = 1
        # the smallest of exponential times with these rates: without replacement (Efraimidis and Spirakis, 2006)
        times = -np.log1p(-np.random.default_rng(rng.getrandbits(128)).random(rows)) / weights
        drawn: list[int] = np.lexsort((times, late))[:count].tolist()
        self._open += drawn
        return drawn

    def observe(self, rows: Sequence[int], scores: Sequence[float]) -> None:  # type: ignore[override]
        counts: dict[int, tuple[int, int]] = {}
        for row, score in zip(rows, scores, strict=True):
            if score == score:
                passed, scored = counts.get(row, (0, 0))
                counts[row] = passed + (score >= self.passes), scored + 1
        for row, count in counts.items():
            self._passed.setdefault(row, deque(maxlen=self.window)).append(count)
        seen = set(rows)
        self._open = [row for row in self._open if row not in seen]
        self._rollouts += 1

    def report(self) -> Mapping[str, float]:
        rates = list(self.rates().values())
        if not rates:
            return {}
        return {
            "pass_rate": sum(rates) / len(rates),
            "seen": len(rates),
            "always_frac": rates.count(1.0) / len(rates),
            "never_frac": rates.count(0.0) / len(rates),
        }

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.floor == 1:
            yield "floor=1 gives every prompt the same weight: pass rates have no effect. Lower sampler.floor"

    def state_dict(self) -> dict[str, Any]:
        passed = [[row, [list(count) for count in seen]] for row, seen in self._passed.items()]
        return {"rollouts": self._rollouts, "passed": passed, "open": list(self._open)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rollouts, self._open = state.get("rollouts", 0), list(state.get("open", ()))
        given = state.get("passed", ())
        self._passed = {row: deque(((n, of) for n, of in seen), maxlen=self.window) for row, seen in given}


@hookimpl
def sampler() -> list[type[PromptSampler]]:
    return [Difficulty]
