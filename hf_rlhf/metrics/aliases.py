"""Names of other libraries for the same numbers, so that their dashboards work: `logging.metric_aliases`.

TRL's (1.16) names that are not listed have no counterpart here: lengths of completions that ended, extremes of the clipped
share, `num_tokens`, and names that belong to one loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hf_rlhf.contract.metric import Metric, pattern
from hf_rlhf.metrics.catalog import EVAL
from hf_rlhf.metrics.names import Named

if TYPE_CHECKING:
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.config.sections import Logging

SECTION = "Aliases"
"""Section of `Named`: no dashboard shows it, because the number has a panel under its own name."""
ENTROPY = "policy/entropy"
RENAMED: tuple[tuple[str, str], ...] = (
    ("reward/total/mean", "reward"),
    ("reward/total/std", "reward_std"),
    ("reward/<label>/mean", "rewards/<label>/mean"),
    ("reward/<label>/std", "rewards/<label>/std"),
    ("reward/zero_std_frac", "frac_reward_zero_std"),
    ("policy/loss", "policy_loss"),
    (ENTROPY, "entropy"),
    ("policy/clip_frac/low", "clip_ratio/low_mean"),
    ("policy/clip_frac/high", "clip_ratio/high_mean"),
    ("plugin/adaptive_entropy/coef", "entropy_coef"),
    ("rollout/length/mean", "completions/mean_length"),
    ("rollout/length/min", "completions/min_length"),
    ("rollout/length/max", "completions/max_length"),
    ("rollout/truncated_frac", "completions/clipped_ratio"),
    ("rollout/sampler_gap/mean", "sampling/sampling_logp_difference/mean"),
    ("rollout/sampler_gap/max", "sampling/sampling_logp_difference/max"),
    ("rollout/is_ratio/mean", "sampling/importance_sampling_ratio/mean"),
)
"""(our name, TRL's name of the same number); both may follow `eval_`."""
MADE: dict[str, tuple[tuple[str, ...], str, str]] = {
    "clip_ratio/region_mean": (
        ("policy/clip_frac/low", "policy/clip_frac/high"),
        "share of tokens",
        "`policy/clip_frac/low` + `policy/clip_frac/high`",
    ),
    "kl": (
        ("kl/<kl>/<estimator>",),
        "nats per token",
        "the first placement's estimate, per token and not summed over rows",
    ),
    "step_time": (
        ("time/update_s",),
        "seconds",
        "of an optimizer step with its share of the rollout, the forwards and what the rewards add to them",
    ),
}
"""TRL's name -> (its parts, its unit, its formula)."""
PHASES = ("time/rollout_s", "time/forward_s", "time/reward_wait_s", "time/update_s")


def aliased(
    logs: Mapping[str, float], counts: Mapping[str, float], algorithm: Algorithm, logging: Logging
) -> dict[str, float]:
    """Return a log entry's numbers under TRL's names; those made of several numbers in training entries only.

    `counts`: number of rows, tokens or phases behind each average.
    """
    if logging.metric_aliases == "none":
        return {}
    left_out = set() if entropy_is_exact(algorithm, logging) else {ENTROPY}
    found = {theirs: x for name, x in logs.items() if name not in left_out for theirs in renamed(name)}
    if "loss" not in logs:
        return found
    low, high = (logs.get(name) for name in MADE["clip_ratio/region_mean"][0])
    if low is not None and high is not None:
        found["clip_ratio/region_mean"] = low + high
    if (kl := per_token(logs, counts, algorithm)) is not None:
        found["kl"] = kl
    if counts.get("time/update_s"):
        seconds = sum(logs.get(name, 0.0) * counts.get(name, 0) for name in PHASES)
        found["step_time"] = seconds / counts["time/update_s"]
    return found


def entropy_is_exact(algorithm: Algorithm, logging: Logging) -> bool:
    """Return whether `policy/entropy` is exact, as TRL's is, not estimated from the sampled tokens."""
    return "entropy" in algorithm.needs or logging.entropy == "exact"


def per_token(logs: Mapping[str, float], counts: Mapping[str, float], algorithm: Algorithm) -> float | None:
    """Return the first placement's KL per token, from its mean over rows."""
    title = kl_of(algorithm)
    if title is None or title not in logs:
        return None
    tokens = counts.get(ENTROPY, 0.0)
    in_update = not algorithm.kl[0].places or "loss" in algorithm.kl[0].places
    if in_update:
        return logs[title] * counts.get(title, 0.0) / tokens if tokens else None
    length = logs.get("rollout/length/mean", 0.0)
    return logs[title] / length if length else None


def kl_of(algorithm: Algorithm) -> str | None:
    """Return the name of the first placement's KL."""
    for title, kl in algorithm.titled("kl"):
        return f"kl/{title}/{kl.estimator.name}"
    return None


def renamed(name: str) -> Iterator[str]:
    """Yield TRL's name of one of ours, if any."""
    prefix = EVAL if name.startswith(EVAL) else ""
    bare = name.removeprefix(prefix)
    for ours, theirs in RENAMED:
        if pattern(ours).fullmatch(bare):
            label = re.sub(r"^reward/|/(mean|std)$", "", bare)
            yield prefix + theirs.replace("<label>", label)
            return


def named(declared: list[Named], algorithm: Algorithm, logging: Logging) -> Iterator[Named]:
    """Yield the declared metrics under TRL's names."""
    if logging.metric_aliases == "none":
        return
    exact = entropy_is_exact(algorithm, logging)
    names = {each.name: each.metric for each in declared if exact or each.name != ENTROPY}
    for name, metric in names.items():
        for theirs in renamed(name):
            meaning = f"TRL's name of `{name}`" + (", where it is exact" if name == ENTROPY else "")
            yield Named(
                theirs, Metric(theirs, metric.unit, meaning, when=metric.when, optional=metric.optional), SECTION
            )
    for theirs, (parts, unit, meaning) in MADE.items():
        needed = [kl_of(algorithm)] if theirs == "kl" else parts
        if all(part in names for part in needed):
            yield Named(theirs, Metric(theirs, unit, f"TRL's name: {meaning}", when="step"), SECTION)
