"""DPO on the policy's own completions (arXiv:2402.04792): the better against the worse completions of a prompt.

The gradient of -logsigmoid(beta (d_w - d_l)), with d = log pi / pi_ref of a whole completion, is that of -A log pi summed
over both, with A = beta sigmoid(-beta (d_w - d_l)) on the tokens of w and -A on those of l. So a pair need not be in one
micro-batch: with `policy_loss: reinforce`, `aggregation: seq_mean_token_sum` and one optimizer step per rollout this is
the gradient of the mean over prompts of the mean loss of their pairs. Departures: completions are ranked by rewards (a
reward model or a rule) instead of a language model; completions that tie for best or worst are all paired.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Positive

from ._groups import others
from ._tokens import given

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class OnlineDPO(AdvantageEstimator):
    """Negative derivative of the pairs' loss by the row's log-prob, times the rows of the group, on each token.

    0 for a row in no pair, and for every row of a prompt whose total scores are all equal. Scores are taken before any KL.
    """

    name = "online_dpo"
    needs = frozenset({"groups", "old_logps", "ref_logps", "scores"})

    beta: Positive = 0.1
    """Strength of the constraint to the reference; larger keeps the policy closer."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of x = d_w - d_l: -logsigmoid(beta x), or (x - 1 / (2 beta))^2 (arXiv:2310.12036), not divided by lengths."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Pairs of the prompt's highest- and lowest-scoring completions, or all pairs with unequal total scores."""

    def in_words(self) -> str:
        name = "DPO" if self.loss_type == "sigmoid" else "IPO"
        pairs = "the best and the worst" if self.pairs == "best_worst" else "all unequal"
        return f"{name} between {pairs} completions of a prompt (beta {self.beta:g})"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if algorithm.steps_per_rollout > 1:
            yield (
                f"with {algorithm.steps_per_rollout} optimizer steps per rollout, pairs keep the weights computed under the "
                "rollout policy; with update.mini_batches=1 and update.epochs=1 the gradient is DPO's"
            )

    def __call__(self, scored: Scored) -> Tensor:
        log_ratios = given(scored.old_logps, "old_logps", self.name) - given(scored.ref_logps, "ref_logps", self.name)
        d = log_ratios.masked_fill(scored.mask == 0, 0.0).sum(1)
        totals = scored.totals()
        theirs, there = others(scored, totals)
        gap = d.unsqueeze(1) - others(scored, d)[0]
        sign = (totals.unsqueeze(1) - theirs).sign().masked_fill(~there, 0.0)
        if self.pairs == "best_worst":
            sign = sign * _extremes(totals, theirs, there)
        wins = scored.group_sum((sign > 0).sum(1).to(totals.dtype)).clamp(min=1)
        row = (sign * self._weight(sign * gap)).sum(1) * scored.group_size() / wins
        return row.unsqueeze(1) * scored.mask

    def _weight(self, x: Tensor) -> Tensor:
        """Return the negative derivative of a pair's loss by x."""
        return self.beta * (-self.beta * x).sigmoid() if self.loss_type == "sigmoid" else 1 / self.beta - 2 * x


def _extremes(totals: Tensor, theirs: Tensor, there: Tensor) -> Tensor:
    """Return (N, G): 1 where one of the row and the other is the best and one the worst of the group."""
    import torch

    own = totals.unsqueeze(1)
    top = torch.cat([own, theirs.masked_fill(~there, float("-inf"))], 1).amax(1, keepdim=True)
    bottom = torch.cat([own, theirs.masked_fill(~there, float("inf"))], 1).amin(1, keepdim=True)
    pair = ((own == top) & (theirs == bottom)) | ((own == bottom) & (theirs == top))
    return pair.to(totals.dtype)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [OnlineDPO]
