"""Logs of runs that go wrong in one way each, as entries for the run doctor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Entries = list[dict[str, float]]
SCORED = {"reward/total/mean": 0.1, "reward/total/std": 0.3}


def labels(recipe: Mapping[str, Any], verifiers: bool = False) -> list[str]:
    """The labels of the sources that pay, or of the verifiers."""
    from hf_rlhf.metrics.doctor import sources_of

    found = sources_of(recipe)
    return [label for label, source in found.items() if (source.verifier if verifiers else source.weight)]


def per_rollout(recipe: Mapping[str, Any]) -> int:
    update = recipe.get("update") or {}
    return int(update.get("mini_batches", 1)) * int(update.get("epochs", 1))


def dead(recipe: Mapping[str, Any]) -> Entries:
    means, stds = (
        {f"reward/{label}/{x}": value for label in labels(recipe)} for x, value in (("mean", 0.5), ("std", 0.0))
    )
    return [{**stds, **means, "rollout/rows": 8.0}] * 10


def at_war(recipe: Mapping[str, Any]) -> Entries:
    first, second, *_ = [*labels(recipe), "", ""]
    return [{f"reward/{first}/corr/{second}": -0.9}] * 5 if second else []


def no_answer(recipe: Mapping[str, Any]) -> Entries:
    found = labels(recipe, verifiers=True)[:1]
    return [{f"reward/{x}/mean": 0.0, f"reward/{x}/answered_frac": 0.0} for x in found] * 10


LOGS: dict[str, Callable[[Mapping[str, Any]], Entries]] = {
    "no_spread": lambda recipe: [{"reward/zero_std_frac": 0.9, **SCORED}] * 5,
    "cut_off": lambda recipe: [{"rollout/truncated_frac": 0.5}] * 5,
    "kl_explodes": lambda recipe: [{"kl/ref": 50.0, "rollout/length/mean": 20.0}] * 5,
    "ratio_explodes": lambda recipe: [{"policy/approx_kl": 0.5, "policy/ratio": 1.1}] * 5,
    "entropy_collapse": lambda recipe: [{"policy/entropy": 0.01, **SCORED}] * 5,
    "length_explodes": lambda recipe: (
        [{"rollout/length/mean": 10.0, **SCORED}] * 5
        + [{"rollout/length/mean": 30.0, **SCORED, "reward/total/mean": 0.9}] * 5
    ),
    "dead_reward": dead,
    "rewards_at_war": at_war,
    "useless_critic": lambda recipe: [{"value/explained_var": -0.5}] * 15,
    "sampler_apart": lambda recipe: [{"rollout/sampler_gap/mean": 0.5}] * 5,
    "nothing_moves": lambda recipe: [{"kl/ref": 0.0, "learning_rate": 1e-10}] * 15,
    "no_answer": no_answer,
    "out_of_range": lambda recipe: [{"value/clip_frac": 0.9, "health/empty_rollout": 1.0}] * 5,
    "overfits": lambda recipe: [{"eval_loss": x, "loss": 0.1} for x in (1.0, 0.9, 1.0, 1.1, 1.2)],
}
"""Pattern -> entries that are just enough for it in a run of a resolved recipe, one a rollout, the metric that it is about
first; none where it does not apply."""


def findings(recipe: Mapping[str, Any], entries: Entries, pattern: str | None = None) -> list[Any]:
    """What the doctor finds in a log, of one pattern or of all."""
    from hf_rlhf.metrics.doctor import Doctor, core_ranges

    doctor = Doctor(recipe, core_ranges())
    steps = per_rollout(recipe)
    for step, entry in enumerate((entry for entry in entries for _ in range(steps)), 1):
        doctor.add(step, entry)
    return [finding for finding in doctor.findings if pattern in (None, finding.pattern)]
