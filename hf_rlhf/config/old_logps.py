"""The source of the sampling policy's log-probs: `update.old_logps`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Algorithm = Any
"""`hf_rlhf.config.algorithm.Algorithm`, which imports this module."""


def readers_before_update(a: Algorithm) -> list[str]:
    """Return what reads them before the first update; with `lazy`, what cannot wait for it."""
    several, source = a.steps_per_rollout > 1, a.update.old_logps
    # in a single step the ratio is 1, and the update's own log-probs serve
    waits = [f"kl.{i}.estimator" for i, kl in enumerate(a.kl) if kl.places <= {"loss"}] if not several else []
    waits += ["rollout_correction"] if source == "lazy" else []
    found = [
        path
        for path, p in a.plugins()
        if "old_logps" in p.needs and not path.startswith("policy_loss") and path not in waits
    ]
    found += [f"kl.{kl.name} in the {place}" for place in ("reward", "advantage") for _, kl in a.kl_in(place)]
    if a.compares_sampler and "sampler_logps" not in a.needs and source != "lazy":
        found.append(f"the comparison with rollout={a.rollout.name}")
    if several and "old_logps" in a.policy_loss.needs:
        found.append(f"policy_loss ({a.steps_per_rollout} optimizer steps per rollout)")
    elif "selected" in a.policy_loss.needs:
        found.append("policy_loss (it selects tokens before the updates)")
    elif source == "sampler" and "old_logps" in a.policy_loss.needs:
        found.append("policy_loss (its ratio to the sampler)")
    return found


def old_logps_problems(a: Algorithm) -> Iterator[str]:
    """Yield why an algorithm cannot have them from where its settings say, with the fix."""
    chosen, auto = f"update.old_logps={a.update.old_logps}", "update.old_logps=auto"
    if a.update.old_logps == "lazy" and a.steps_per_rollout > 1:
        yield f"{chosen} needs one optimizer step per rollout, got {a.steps_per_rollout}. Set {auto}, or fewer steps"
    elif a.update.old_logps == "lazy" and (readers := readers_before_update(a)):
        yield f"{chosen} has them in the update alone, and {'; '.join(readers)} reads them before it. Set {auto}"
    if a.update.old_logps == "sampler" and "sampler_logps" not in a.rollout.provides:
        yield f"{chosen} takes log-probs that rollout={a.rollout.name} does not report. Set {auto}"
    if a.update.old_logps == "sampler" and "sampler_logps" in a.rollout_correction.needs:
        yield (
            f"{chosen} makes the policy loss's ratio the correction, and rollout_correction={a.rollout_correction.name} would "
            f"correct again. Set rollout_correction.use=none, or {auto}"
        )
