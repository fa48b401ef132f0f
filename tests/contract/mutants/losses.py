"""Wrong policy losses, aggregations, rollout corrections and loss terms; see `base`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import (
    Aggregation,
    LossTerm,
    PolicyLoss,
    RolloutCorrection,
    TextTerm,
)
from tests.contract.mutants.base import Mutant


class Loss(PolicyLoss):
    """A right loss, to be made wrong."""

    name = "wrong"

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = (logps - old_logps).masked_fill(mask == 0, 0.0).exp()
        return self.loss(ratio, logps, advantages, mask), {}

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio * advantages


class Ascending(Loss):
    """Forgets the sign."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return ratio * advantages


class ClippedAbove(Loss):
    """Clips what rises and forgets what falls."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -torch.minimum(ratio * advantages, ratio.clamp(max=1.2) * advantages)


class ClippedBelow(Loss):
    """Clips what falls and forgets what rises."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -torch.minimum(ratio * advantages, ratio.clamp(min=0.8) * advantages)


class ClippedAlways(Loss):
    """Clips the ratio whatever the sign of the advantage."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio.clamp(0.8, 1.2) * advantages


class Detached(Loss):
    """Cuts the gradient off."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio.detach() * advantages


class HalfDetached(Loss):
    """Drops the ratio's gradient, and does not say that it is meant."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio.detach() * advantages * logps


class MicroBatchMean(Loss):
    """Divides by the tokens of its micro-batch, not of the step (PrimeIntellect-ai/prime-rl#583)."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio * advantages / mask.sum().clamp(min=1)


class MicroBatchWhitened(Loss):
    """Normalises the advantages of its micro-batch."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        mean = (advantages * mask).sum() / mask.sum().clamp(min=1)
        return -ratio * (advantages - mean)


class CentredColumns(Loss):
    """Centres log-ratios over the rows beside it (MakazhanAlpamys/Soup#735)."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -(ratio - ratio.mean(0, keepdim=True) + 1) * advantages


class Exponential(PolicyLoss):
    """Takes the exponential first and masks after it: inf x 0 (NVIDIA-NeMo/RL#4120)."""

    name = "wrong"

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -(logps - old_logps).exp() * advantages * mask, {}


class PaddedSequence(PolicyLoss):
    """Sums a row's log-ratio over padding and tool output too (areal-project/AReaL#1346 did so with advantages)."""

    name = "wrong"

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d = ((logps - old_logps).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).clamp(-1, 1)
        return -d.exp() * advantages * mask, {}


class WideMean(PolicyLoss):
    """Divides a row's log-ratio by the padded width."""

    name = "wrong"

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d = (logps - old_logps).masked_fill(mask == 0, 0.0).mean(1, keepdim=True)
        return -d.exp() * advantages * mask, {}


class Bonus(Loss):
    """Also raises log-probs that no advantage asks for, and says that it does not."""

    zero_without_advantage = True

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -ratio * (advantages + 0.1 * advantages.sign() + 1e-3) * mask


class RowRatio(Loss):
    """Weighs a token by its row, and says that it does not."""

    token_level = True
    stops_gradient = True

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        row = (ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return -row.detach().clamp(max=2) * ratio * advantages * mask


class Reduced(Loss):
    """Averages by itself."""

    def loss(self, ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return (-ratio * advantages).mean()


class Bare(Loss):
    """Returns no metrics."""

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        return -advantages * logps


class Untaken(Loss):
    """Needs what it does not take."""

    needs = frozenset({"old_logps", "entropy"})


class Greedy(Loss):
    """Takes what it does not need."""

    def __call__(  # type: ignore[override]
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, entropy: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super().__call__(logps, old_logps, advantages * (1 + entropy.masked_fill(mask == 0, 0.0)), mask)


# Aggregations, corrections, terms


class Weights(Aggregation):
    """Every token alike, to be made wrong."""

    name = "wrong"

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / mask.sum().clamp(min=1)


class Negative(Weights):
    """Weighs some tokens negatively."""

    def __call__(self, mask: Tensor) -> Tensor:
        return mask * (mask.sum(1, keepdim=True) - 4)


class EmptyRows(Weights):
    """Divides by a length that may be 0 (fla-org/flash-linear-attention#189)."""

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / mask.sum(1, keepdim=True)


class AllColumns(Weights):
    """Divides by every column of the step, padding included: a global mean for a masked one."""

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / mask.numel()


class Spilled(Weights):
    """Weighs the tokens of cut or tool output too, only its sum is of the mask (huggingface/trl#6654)."""

    def __call__(self, mask: Tensor) -> Tensor:
        return torch.ones_like(mask) / mask.sum().clamp(min=1)


class Correction(RolloutCorrection):
    """exp(trainer - sampler), at most 2, to be made wrong."""

    name = "wrong"

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        return (old_logps - sampler_logps).detach().masked_fill(mask == 0, 0.0).clamp(-20, 20).exp().clamp(max=2)


class Shifted(Correction):
    """Adds 1 to the ratio."""

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        return 1 + super().__call__(old_logps, sampler_logps, mask)


class Rejecting(Correction):
    """Rejects large ratios by multiplying with 0: inf x 0 (OpenRLHF/OpenRLHF#1314)."""

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        ratio = (old_logps - sampler_logps).detach().masked_fill(mask == 0, 0.0).exp()
        return ratio * (ratio <= 2)


class Term(LossTerm):
    """Raises every log-prob, to be made wrong."""

    name = "wrong"

    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        return -logps.masked_fill(mask == 0, 0.0)


class OwnMean(Term):
    """Averages over its micro-batch."""

    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        return super().__call__(logps, mask) / mask.sum().clamp(min=1)


class Positive(Term):
    """Imitates the rows with a reward, and divides by their tokens where there are none."""

    needs = frozenset({"total_score"})

    def __call__(self, logps: Tensor, mask: Tensor, *, total_score: Tensor) -> Tensor:  # type: ignore[override]
        return super().__call__(logps, mask) * (total_score > 0)[:, None]

    def weights(self, mask: Tensor, *, total_score: Tensor) -> Tensor:  # type: ignore[override]
        chosen = mask * (total_score > 0)[:, None]
        return chosen / chosen.sum()


class Counting(TextTerm):
    """Gives the next texts at each call, so that a resume trains on others."""

    name = "wrong"

    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        return -logps.masked_fill(mask == 0, 0.0)

    def texts(self, step: int) -> list[list[int]]:
        self._calls = getattr(self, "_calls", 0) + 1
        return [[3, 4, 5 + self._calls]]


class OneToken(Counting):
    """Gives texts of one token, which have nothing to predict."""

    def texts(self, step: int) -> list[list[int]]:
        return [[3]]


MUTANTS = [
    Mutant(Ascending, "climbs", "Check the sign"),
    Mutant(ClippedAbove, "clips", "and not of those with a negative advantage"),
    Mutant(ClippedBelow, "clips", "and not of those with a positive advantage"),
    Mutant(ClippedAlways, "clips", "nothing brings them back"),
    Mutant(Detached, "gradient", "no gradient reaches logps"),
    Mutant(HalfDetached, "differences", "stops_gradient = True"),
    Mutant(MicroBatchMean, "split", "computed alone", ("processes",)),
    Mutant(MicroBatchWhitened, "split", "computed alone", ("processes",)),
    Mutant(CentredColumns, "split", "computed alone", ("processes",)),
    Mutant(Bonus, "silent", "zero_without_advantage"),
    Mutant(RowRatio, "token", "token_level"),
    Mutant(Exponential, "off", "Fill them before an exponential", ("gradient",)),
    Mutant(PaddedSequence, "off", "values off the mask changed", ("split", "clips")),
    Mutant(WideMean, "padding", "Count with the mask", ("tools", "split")),
    Mutant(Reduced, "shape", r"got \(\)"),
    Mutant(Bare, "shape", "a pair"),
    Mutant(Untaken, "needs", "accept what it needs"),
    Mutant(Greedy, "needs", "Name in `needs` what it reads"),
    Mutant(Negative, "factors", "must be non-negative"),
    Mutant(EmptyRows, "degenerate", "not finite for a row without sampled tokens"),
    Mutant(AllColumns, "padding", "Count with the mask", ("tools",)),
    Mutant(Spilled, "mask", "Multiply by the mask last"),
    Mutant(Shifted, "one", "its factors are not 1"),
    Mutant(Rejecting, "far", "far off"),
    Mutant(OwnMean, "split", "computed alone", ("processes",)),
    Mutant(Positive, "few", "not finite for no reward at all"),
    Mutant(Counting, "texts", "as after a resume"),
    Mutant(OneToken, "texts", "two or more"),
]
