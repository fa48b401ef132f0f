"""Metrics of held-out pairs for a policy and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ._measures import of_pairs, wilson

Logps = Sequence[tuple[float, float]]
"""Log-probs of the chosen and rejected completions of each row."""


def of_policy(
    policy: Logps, reference: Logps, rewards: Logps, chosen_tokens: Sequence[int], rejected_tokens: Sequence[int]
) -> dict[str, float]:
    """Return `pairs/` metrics of the implicit rewards, as for a reward model; how often the chosen completion is likelier
    under the policy; and the distance from the reference in nats per completion: `drift/k2` is the mean of half the squared
    log-ratio."""
    chosen, rejected = ([pair[i] for pair in rewards] for i in (0, 1))
    ratios = [[p[i] - r[i] for p, r in zip(policy, reference, strict=True)] for i in (0, 1)]
    likelier = fmean(0.5 if c == r else float(c > r) for c, r in policy)
    low, high = wilson(likelier, len(policy))
    return {
        **of_pairs(chosen, rejected, chosen_tokens, rejected_tokens),
        "likelihood/accuracy": likelier,
        "likelihood/accuracy_low": low,
        "likelihood/accuracy_high": high,
        "drift/chosen": fmean(ratios[0]),
        "drift/rejected": fmean(ratios[1]),
        "drift/k2": fmean(x * x / 2 for x in [*ratios[0], *ratios[1]]),
    }
