"""What the plan says of a KL: the gradient that is expected of it where it stands, on tokens that the policy sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._probe import KL, Trial, is_exponential, same, trial

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm, KLPlacement

STATES = " state by state, the visits held fixed"


def of_the_value(kl: KLPlacement) -> Iterator[str]:
    """What may happen to the number, wherever it goes."""
    if kl.level == "sequence" and is_exponential(kl.estimator):
        yield f"{kl.estimator.name} at level sequence is the exponential of a sum and may overflow"
    if kl.clamp is not None:
        yield (
            f"clamp={kl.clamp:g} biases the KL where it bites, and beyond it the gradient is 0; clamp_frac in the logs says "
            "how often"
        )


def of_the_score(kl: Any, algorithm: Algorithm, place: str) -> Iterator[str]:
    """In the reward, where it counts for every token before it, or (`place`) in the advantage of its own token."""
    estimator, tried, sequence = kl.estimator, trial(kl.estimator), kl.level == "sequence"
    if "old_logps" in estimator.needs:
        yield f"{estimator.name} in the {place}: its ratio is 1 there, where the policy is the one that rolled out"
    if tried is None:
        yield from _not_tried(kl)
        return
    whole = sequence or place == "reward"  # at level token an advantage reaches no other token
    if (whole and same(tried.score, tried.divergences[KL])) or _has_partner(kl, algorithm, "loss", tried):
        return
    name, one_token = _score_name(tried, estimator.name), same(tried.score, 0 * tried.score)
    yield (
        f"{estimator.name} in the {place}: alone, its expected gradient is that of {name}{'' if sequence else STATES}, "
        f"and not that of the KL (k1's in the reward is, exactly)"
        + ("; it is 0 for completions of one token" if one_token else "")
        + ("; with the same estimator and beta in the loss it is" if place == "reward" and _is_half(tried) else "")
    )


def of_the_loss(kl: Any, algorithm: Algorithm) -> Iterator[str]:
    """In the loss, where its slope counts."""
    estimator, tried, sequence = kl.estimator, trial(kl.estimator), kl.level == "sequence"
    if tried is None:
        yield from _not_tried(kl)
        return
    name = tried.named(tried.loss)
    if not (sequence and name == KL) and not _has_partner(kl, algorithm, "reward", tried):
        other = "the KL" if name == KL else KL
        yield (
            f"{estimator.name} in the loss: its expected gradient is "
            + (f"that of {name}" if name else "that of no divergence that is tried here")
            + ("" if sequence or not name else STATES)
            + f", and not that of {other}"
            + (" (level=sequence gives it)" if name == KL and "full_distribution" not in estimator.needs else "")
        )
    steps = algorithm.steps_per_rollout
    if steps > 1 and not same(tried.stale, tried.loss):
        yield (
            f"{estimator.name} in the loss: with {steps} optimizer steps per rollout the tokens are the current policy's in "
            "the first only, and its expected gradient is biased after it; with the ratio (k1_is, k3_is) it is not"
        )


def _score_name(tried: Trial, estimator: str) -> str:
    """E[e grad log p] as the gradient of one thing, or of one minus another."""
    if name := tried.named(tried.score):
        return name
    if rest := tried.named(tried.divergences[KL] - tried.score):
        return f"the KL minus that of {rest}"
    return f"its mean minus that of {tried.named(tried.loss) or f'{estimator} in the loss'}"


def _is_half(tried: Trial) -> bool:
    """Whether reward and loss together make the gradient of the KL, and neither does alone."""
    of_kl = tried.divergences[KL]
    return not same(tried.score, of_kl) and same(tried.loss + tried.score, of_kl)


def _has_partner(kl: Any, algorithm: Algorithm, place: str, tried: Trial) -> bool:
    """Whether another KL of the recipe, at `place`, is the half that this one lacks."""
    mine = (kl.estimator, kl.level, kl.clamp, kl.beta, kl.controller)
    others = [other for other in algorithm.kl if other is not kl and place in other.places]
    return _is_half(tried) and any(
        (x.estimator, x.level, x.clamp, getattr(x, "beta", None), getattr(x, "controller", None)) == mine
        for x in others
    )


def _not_tried(kl: KLPlacement) -> Iterator[str]:
    needs = ", ".join(sorted(kl.estimator.needs))
    yield f"{kl.estimator.name} needs {needs}, so its expected gradient was not tried; k1's in the reward is the KL's"
