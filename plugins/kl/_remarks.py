"""Remarks in the plan about a KL: its expected gradient at its placement, on tokens that the policy sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._probe import KL, Trial, is_exponential, same, trial

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm, KLPlacement

STATES = " state by state, with the visited states held fixed"


def of_the_value(kl: KLPlacement) -> Iterator[str]:
    """Yield remarks about the value of the KL, for any placement."""
    if kl.level == "sequence" and is_exponential(kl.estimator):
        yield f"{kl.estimator.name} at level sequence is the exponential of a sum, which may overflow"
    if kl.clamp is not None:
        yield (
            f"clamp={kl.clamp:g} biases the KL where it binds, and the gradient beyond it is 0; clamp_frac in the logs is "
            "the share of clamped tokens"
        )


def of_the_score(kl: Any, algorithm: Algorithm, place: str) -> Iterator[str]:
    """Yield remarks about a KL in the reward, which credits every earlier token, or in its own token's advantage."""
    estimator, tried, sequence = kl.estimator, trial(kl.estimator), kl.level == "sequence"
    if "old_logps" in estimator.needs:
        yield f"{estimator.name} in the {place}: its ratio is always 1 there, as it is computed by the rollout policy"
    if tried is None:
        yield from _not_tried(kl)
        return
    whole = sequence or place == "reward"  # at level token an advantage affects no other token
    if (whole and same(tried.score, tried.divergences[KL])) or _has_partner(kl, algorithm, "loss", tried):
        return
    name, one_token = _score_name(tried, estimator.name), same(tried.score, 0 * tried.score)
    yield (
        f"{estimator.name} in the {place}: alone, its expected gradient is that of {name}{'' if sequence else STATES}, "
        f"not that of the KL (k1 in the reward gives exactly that)"
        + ("; it is 0 for completions of one token" if one_token else "")
        + ("; with the same estimator and beta in the loss it is" if place == "reward" and _is_half(tried) else "")
    )


def of_the_loss(kl: Any, algorithm: Algorithm) -> Iterator[str]:
    """Yield remarks about a KL in the loss, where its slope counts."""
    estimator, tried, sequence = kl.estimator, trial(kl.estimator), kl.level == "sequence"
    if tried is None:
        yield from _not_tried(kl)
        return
    name = tried.named(tried.loss)
    if name is None and "full_distribution" in estimator.needs:  # no token is sampled in it
        name = estimator.in_words()
    if not (sequence and name == KL) and not _has_partner(kl, algorithm, "reward", tried):
        other = "the KL" if name == KL else KL
        yield (
            f"{estimator.name} in the loss: its expected gradient is "
            + (f"that of {name}" if name else "that of none of the known divergences")
            + ("" if sequence or not name else STATES)
            + f", not that of {other}"
            + (" (level=sequence gives it)" if name == KL and "full_distribution" not in estimator.needs else "")
        )
    steps = algorithm.steps_per_rollout
    if steps > 1 and not same(tried.stale, tried.loss):
        yield (
            f"{estimator.name} in the loss: with {steps} optimizer steps per rollout, its expected gradient is biased after "
            "the first, because the tokens are no longer the current policy's; k1_is and k3_is correct for it by the ratio"
        )


def _score_name(tried: Trial, estimator: str) -> str:
    """Describe E[e grad log p] as the gradient of one quantity, or of a difference of two."""
    if name := tried.named(tried.score):
        return name
    if rest := tried.named(tried.divergences[KL] - tried.score):
        return f"the KL minus that of {rest}"
    return f"its mean minus that of {tried.named(tried.loss) or f'{estimator} in the loss'}"


def _is_half(tried: Trial) -> bool:
    """Return True if reward and loss together give the gradient of the KL, and neither alone does."""
    of_kl = tried.divergences[KL]
    return not same(tried.score, of_kl) and same(tried.loss + tried.score, of_kl)


def _has_partner(kl: Any, algorithm: Algorithm, place: str, tried: Trial) -> bool:
    """Return True if another KL of the recipe, at `place`, is the half that this one lacks."""
    mine = (kl.estimator, kl.level, kl.clamp, kl.beta, kl.controller)
    others = [other for other in algorithm.kl if other is not kl and place in other.places]
    return _is_half(tried) and any(
        (x.estimator, x.level, x.clamp, getattr(x, "beta", None), getattr(x, "controller", None)) == mine
        for x in others
    )


def _not_tried(kl: KLPlacement) -> Iterator[str]:
    needs = ", ".join(sorted(kl.estimator.needs))
    yield f"{kl.estimator.name} needs {needs}, so its expected gradient is unknown; k1 in the reward gives the KL's"
