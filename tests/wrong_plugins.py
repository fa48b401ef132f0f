"""Plugins that break one promise each, with the words in which the conformance kit must say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.axes import (
    AdvantageEstimator,
    Aggregation,
    Filter,
    KLEstimator,
    KLPlacement,
    PolicyLoss,
    Reference,
    RewardSource,
    RolloutCorrection,
)
from hf_rlhf.batch import Credit, Rollouts, Scored


def settings(cls: type) -> Any:
    return dataclass(kw_only=True)(cls)


class Estimator(AdvantageEstimator):
    """A right estimator, to be made wrong."""

    name = "wrong"

    def __call__(self, scored: Scored) -> Tensor | Credit:
        return scored.returns()[:, None] * scored.mask


class OffMask(Estimator):
    """Leaves the mask out."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns()[:, None].expand(scored.mask.shape)


class PerRow(Estimator):
    """Gives one number per row."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns()


class Single(Estimator):
    """Falls back to float32."""

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.returns()[:, None] * scored.mask).float()


class Width(Estimator):
    """Divides by the padded width."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.returns()[:, None] * scored.mask / scored.mask.shape[1]


class Neighbours(Estimator):
    """Takes each two neighbours for a group."""

    def __call__(self, scored: Scored) -> Tensor:
        means = scored.returns().unfold(0, 2, 2).mean(1).repeat_interleave(2)
        return (scored.returns() - means)[:, None] * scored.mask


class Stepping(Estimator):
    """Discounts across tool tokens."""

    def __call__(self, scored: Scored) -> Tensor:
        powers = 0.9 ** torch.arange(scored.mask.shape[1], dtype=scored.mask.dtype)
        return (scored.token_rewards * powers).sum(1, keepdim=True) * scored.mask


class PeekingAtPadding(Estimator):
    """Takes the last column's value for the row's."""

    needs = frozenset({"values"})

    def __call__(self, scored: Scored) -> Credit:
        assert scored.values is not None
        advantages = (scored.returns() - scored.values.mean(1))[:, None] * scored.mask
        return Credit(advantages=advantages, returns=advantages)


class NoTargets(Estimator):
    """Needs values and gives the critic no targets."""

    needs = frozenset({"values"})


class InPlace(Estimator):
    """Writes into the token rewards."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.token_rewards.mul_(2)


class Random(Estimator):
    """Draws random numbers."""

    def __call__(self, scored: Scored) -> Tensor:
        torch.rand(1)
        return scored.token_rewards * scored.mask


class Standardised(Estimator):
    """Divides by a deviation that may be 0."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        return ((returns - scored.group_mean(returns)) / scored.group_std(returns))[:, None] * scored.mask


class ByLabel(Estimator):
    """Computes with the group's number."""

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.group_ids[:, None] * scored.mask).to(scored.mask.dtype)


@settings
class Undocumented(Estimator):
    """Has a setting that nobody explains."""

    strength: float = 1.0


class Undecorated(Estimator):
    """Forgets the decorator."""

    strength: float = 1.0
    """How much."""


@settings
class NameAsSetting(Estimator):
    """Makes its name a setting."""

    name: str = "oops"  # type: ignore[misc]
    """Oops."""


@settings
class Forgetful(Estimator):
    """Saves a count and does not take it back."""

    def __post_init__(self) -> None:
        self._count = torch.rand(1).item()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def __deepcopy__(self, memo: dict[int, Any]) -> Forgetful:
        return type(self)()


class Unsafe(Estimator):
    """Puts an object into its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("/")}


@settings
class Uncopied(Estimator):
    """Loses its settings in copies."""

    rule: Any = None
    """A rule."""

    def __reduce__(self) -> Any:
        return (type(self), ())


class Loss(PolicyLoss):
    """A right loss, to be made wrong."""

    name = "wrong"

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss((logps - old_logps).exp(), logps, advantages, mask), {}

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio * advantages


class Ascending(Loss):
    """Forgets the sign."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return ratio * advantages


class Detached(Loss):
    """Cuts the gradient off."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio.detach() * advantages


class HalfDetached(Loss):
    """Stops a gradient on purpose."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio.detach() * advantages * logps


class BatchWhitened(Loss):
    """Whitens within the micro-batch."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio * (advantages - advantages.mean())


class Reduced(Loss):
    """Averages by itself."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return (-ratio * advantages).mean()


class Bare(Loss):
    """Returns no metrics."""

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        return -advantages * logps


class Offset(KLEstimator):
    """Is not 0 where policy and reference agree."""

    name = "wrong"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return (ref_logps - logps).exp() + logps - ref_logps


class Squashed(KLPlacement):
    """Sums its penalty over the tokens."""

    name = "wrong"
    places = frozenset({"reward"})

    def reward_penalty(self, kl: Tensor) -> Tensor:
        return kl.sum(-1)


class Undefined(KLPlacement):
    """Declares a place and no penalty for it."""

    name = "wrong"
    places = frozenset({"loss"})


class Negative(Aggregation):
    """Weighs some tokens negatively."""

    name = "wrong"

    def __call__(self, mask: Tensor) -> Tensor:
        return mask * (mask.sum(1, keepdim=True) - 2)


class EmptyRows(Aggregation):
    """Divides by a length that may be 0."""

    name = "wrong"

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / mask.sum(1, keepdim=True)


class Mask(Filter):
    """Gives numbers instead of booleans."""

    name = "wrong"

    def __call__(self, scored: Scored) -> Tensor:
        return scored.mask.max(1).values


class Inverse(RolloutCorrection):
    """Adds 1 to the ratio."""

    name = "wrong"

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        return 1 + (old_logps - sampler_logps).exp()


class Shared(Reference):
    """Takes the policy itself for the reference."""

    name = "wrong"

    def build(self, policy: Any) -> Any:
        return policy


class Reward(RewardSource):
    """A right reward, to be made wrong."""

    name = "wrong"

    def __call__(self, rollouts: Rollouts) -> Any:
        return [float(len(text)) for text in rollouts.completions]


class Short(Reward):
    """Forgets a row."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return [1.0] * (len(rollouts) - 1)


class Texts(Reward):
    """Gives texts."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return rollouts.completions


class Alone(Reward):
    """Gives one number for all."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return 0.5


class Clearing(Reward):
    """Writes into the completions."""

    def __call__(self, rollouts: Rollouts) -> Any:
        scores = [float(len(text)) for text in rollouts.completions]
        rollouts.completions[0] = "seen"
        return scores


class Ranked(Reward):
    """Scores a row by its place."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return list(range(len(rollouts)))


class Infinite(Reward):
    """Gives an infinity."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return [float("inf")] * len(rollouts)


class OtherColumn(Reward):
    """Reads a column that is not there."""

    def __call__(self, rollouts: Rollouts) -> Any:
        return rollouts.column("solution")


def k1() -> Any:
    return load_plugin("kl_estimator", "k1")


WRONG: list[tuple[Any, str]] = [
    (OffMask, "not 0 off the mask"),
    (PerRow, r"shape \(10,\); \(10, 8\) is due"),
    (Single, "float32 for torch.float64 input"),
    (Width, "padding were added"),
    (Neighbours, "rows were shuffled"),
    (Stepping, "step over it"),
    (PeekingAtPadding, "numbers off the mask changed"),
    (NoTargets, "Credit is due"),
    (InPlace, "changes its input token_rewards"),
    (Random, "global random generator"),
    (Standardised, "not finite for equal rewards|not finite for no reward"),
    (ByLabel, "groups got other ids"),
    (Undocumented, "without a docstring below them: strength"),
    (Undecorated, "no dataclass"),
    (NameAsSetting, "name became a setting"),
    (Forgetful, "load_state_dict turned"),
    (Unsafe, "more than numbers"),
    (lambda: Uncopied(rule="other"), "copied, it is"),
    (Ascending, "is a sign missing"),
    (Detached, "no gradient reaches logps"),
    (HalfDetached, "finite_differences=False"),
    (BatchWhitened, "computed alone"),
    (Reduced, r"shape \(\)"),
    (Bare, "a pair"),
    (Offset, "policy and reference agree"),
    (lambda: Squashed(estimator=k1()), "reward_penalty has the shape"),
    (lambda: Undefined(estimator=k1()), "does not define loss_penalty"),
    (Negative, "negative somewhere"),
    (EmptyRows, "not finite for completions of one token"),
    (Mask, "torch.bool is due"),
    (Inverse, "its factors are not 1"),
    (Shared, "parameters that would learn"),
    (Short, "3 numbers for 4 rows"),
    (Texts, "neither a number nor None"),
    (Alone, "gives a float"),
    (Clearing, "changes rollouts.completions"),
    (Ranked, "rows backwards score"),
    (Infinite, "is infinite"),
    (OtherColumn, "pass rollouts="),
]
