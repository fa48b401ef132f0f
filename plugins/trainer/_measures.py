"""Metrics of held-out rows: accuracy with its interval, simple baselines on the same rows, and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pvariance

Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
BINS = 10


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate observed in `count` trials (Wilson 1927); (0, 1) for none."""
    if count == 0:
        return 0.0, 1.0
    middle = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(probabilities: Sequence[float], outcomes: Sequence[float], low: float) -> float:
    """Return the expected calibration error over ten equal bins of [low, 1], weighted by their rows."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for p, outcome in zip(probabilities, outcomes, strict=True):
        place = min(BINS - 1, int((p - low) / (1 - low) * BINS))
        bins.setdefault(place, []).append((p, outcome))
    gaps = [abs(sum(p - outcome for p, outcome in members)) for members in bins.values()]
    return sum(gaps) / len(probabilities)


def of_pairs(
    chosen: Sequence[float], rejected: Sequence[float], chosen_tokens: Sequence[int], rejected_tokens: Sequence[int]
) -> dict[str, float]:
    """Return metrics of scored pairs: how often the chosen completion scores higher, and how often it is longer or shorter.

    A tie counts half. Confidence is the probability that the scores give to the completion they prefer.
    """
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    right = [_share(c, r) for c, r in zip(chosen, rejected, strict=True)]
    longer = fmean(_share(c, r) for c, r in zip(chosen_tokens, rejected_tokens, strict=True))
    confidence = [_sigmoid(abs(margin)) for margin in margins]
    return {
        **_rate("pairs/accuracy", right),
        "pairs/longer_wins": longer,
        "pairs/shorter_wins": 1 - longer,
        "pairs/margin": fmean(margins),
        "pairs/log_loss": fmean(_softplus(-margin) for margin in margins),
        "pairs/confidence": fmean(confidence),
        "pairs/calibration_error": calibration_error(confidence, right, 0.5),
        "pairs/score_mean": fmean([*chosen, *rejected]),
    }


def of_labels(area: str, log_odds: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return metrics of log-odds of good against labels from 0 (bad) to 1 (good): accuracy, and the share of good labels,
    which is the accuracy of always predicting good."""
    good = [float(label > 0.5) for label in labels]
    probabilities = [_sigmoid(x) for x in log_odds]
    right = [_share(x, 0.0) if y else 1 - _share(x, 0.0) for x, y in zip(log_odds, good, strict=True)]
    share = fmean(good)
    return {
        **_rate(f"{area}/accuracy", right),
        f"{area}/all_good": share,
        f"{area}/all_bad": 1 - share,
        f"{area}/log_loss": fmean(
            y * _softplus(-x) + (1 - y) * _softplus(x) for x, y in zip(log_odds, labels, strict=True)
        ),
        f"{area}/calibration_error": calibration_error(probabilities, list(labels), 0.0),
    }


def of_values(area: str, found: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """Return the mean squared error of predictions, and the share of the labels' variance that they explain."""
    error = fmean((x - y) ** 2 for x, y in zip(found, wanted, strict=True))
    variance = pvariance(wanted)
    explained = {f"{area}/explained_var": 1 - error / variance} if variance > 0 else {}
    return {f"{area}/squared_error": error, **explained}


def _rate(name: str, right: Sequence[float]) -> dict[str, float]:
    rate = fmean(right)
    low, high = wilson(rate, len(right))
    return {name: rate, f"{name}_low": low, f"{name}_high": high, f"{name.partition('/')[0]}/count": len(right)}


def _share(a: float, b: float) -> float:
    """Return 1 if a is larger, 0 if b is, 0.5 if they are equal."""
    return 0.5 if a == b else float(a > b)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
