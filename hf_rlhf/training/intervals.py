"""95 % intervals of an evaluation's metrics. Prompts are the sample; the completions of a prompt depend on each other."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

Z = NormalDist().inv_cdf(0.975)


def interval(sums: Tensor, share: bool) -> tuple[float, float] | None:
    """Return the interval of a quotient of sums; None where fewer than two prompts count.

    `sums` (P, 2): numerator and count by prompt. A share has Wilson's interval, with as many rows as independent ones of the
    same standard error would be (at 0 and 1: the prompts); a mean has Student's, with the standard error of a quotient.
    """
    numerator, count = sums[sums[:, 1] > 0].unbind(1)
    prompts = len(count)
    if prompts < 2:
        return None
    mean = (numerator.sum() / count.sum()).item()
    if not share:
        error = _quotient_deviations(sums).std().item() / math.sqrt(prompts)
        margin = student_quantile(prompts - 1) * error
        return mean - margin, mean + margin
    variance = _quotient_deviations(sums).var(correction=0).item() / prompts
    rows = prompts if mean in (0, 1) else min(count.sum().item(), mean * (1 - mean) / max(variance, 1e-12))
    return wilson(mean, rows)


def paired_interval(before: Tensor, after: Tensor, share: bool) -> tuple[float, float, float] | None:
    """Return the difference of two quotients on the same prompts, after - before, and its interval.

    `before`, `after` (P, 2): numerator and count by prompt. Prompts that do not count for both are left out; None where fewer
    than two are left. A difference of shares has Bonett's and Price's interval, which adds a prompt with each of +1 and -1
    (10.3102/1076998611411920), a difference of means Student's.
    """
    both = (before[:, 1] > 0) & (after[:, 1] > 0)
    before, after = before[both], after[both]
    prompts = len(before)
    if prompts < 2:
        return None
    sums_before, sums_after = before.sum(0), after.sum(0)
    difference = (sums_after[0] / sums_after[1] - sums_before[0] / sums_before[1]).item()
    deviations = _quotient_deviations(after) - _quotient_deviations(before)
    if not share:
        margin = student_quantile(prompts - 1) * deviations.std().item() / math.sqrt(prompts)
        return difference, difference - margin, difference + margin
    values = [*(difference + deviations).tolist(), 1.0, -1.0]
    middle = sum(values) / len(values)
    variance = sum((x - middle) ** 2 for x in values) / len(values)
    margin = Z * math.sqrt(variance / len(values))
    return difference, max(-1.0, middle - margin), min(1.0, middle + margin)


def wilson(share: float, rows: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of independent rows."""
    scale = 1 + Z * Z / rows
    middle = (share + Z * Z / (2 * rows)) / scale
    margin = Z * math.sqrt(share * (1 - share) / rows + Z * Z / (4 * rows * rows)) / scale
    return (0.0 if share == 0 else middle - margin), (1.0 if share == 1 else middle + margin)


def student_quantile(freedom: int) -> float:
    """Return the 0.975 quantile of Student's distribution, in closed form for 1 and 2 degrees of freedom, else within 4e-3."""
    if freedom < 3:
        return [math.tan(math.pi * 0.475), 0.95 / math.sqrt(2 * 0.975 * 0.025)][freedom - 1]
    z, n = Z, freedom  # Cornish-Fisher, Abramowitz and Stegun 26.7.5
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def _quotient_deviations(sums: Tensor) -> Tensor:
    """Return how far each prompt that counts moves the quotient (n,): their mean is 0, their deviation over √n its error."""
    numerator, count = sums[sums[:, 1] > 0].unbind(1)
    return (numerator - numerator.sum() / count.sum() * count) / count.mean()
