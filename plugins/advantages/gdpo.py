"""Group-normalized advantages per reward source (GDPO, arXiv:2601.05242).

Normalizing the sum of several rewards gives different mixtures of them the same advantage; here each source is normalized
separately. Departures: a source counts only the rows to which it applies, and a KL in the reward, which is not a source,
is subtracted last, from its token on and in the reward's unit. The paper has it in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Positive
from hf_rlhf.batch import Scored

from ._groups import centred, minus_kl
from ._tokens import given

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class GDPO(AdvantageEstimator):
    """Each source's score minus its group's mean, over its group's std; then their weighted sum over its std in the batch.

    A source gives 0 where it does not apply, and where its scores in the group are all equal or only one row has one.
    Per-step and per-token rewards count by their sum.
    """

    name = "gdpo"
    words = "each reward minus its group's mean, over its group's std; their weighted sum over its std"
    needs = frozenset({"groups", "scores"})
    across_groups = True

    eps: Positive = 1e-4
    """Added to the stds of each group and of the batch (ddof 1), so that nearly equal scores are not blown up."""

    def __call__(self, scored: Scored) -> Tensor:
        weights = scored.weights or {}
        combined = scored.mask.new_zeros(len(scored.mask))
        for source, score in given(scored.scores, "scores", "gdpo").items():
            combined = combined + weights.get(source, 1.0) * self._normalised(scored, score)
        # the mean is 0: every source sums to 0 over every group
        deviation = ((combined**2).sum() / max(len(combined) - 1, 1)).sqrt()
        return minus_kl((combined / (deviation + self.eps)).unsqueeze(1) * scored.mask, scored)

    def _normalised(self, scored: Scored, score: Tensor) -> Tensor:
        """Normalize scores (N,) over the rows that have one; 0 for the others."""
        rows = (~score.isnan()).nonzero().flatten()
        part = Scored(
            mask=scored.mask[rows], token_rewards=scored.token_rewards[rows], group_ids=scored.group_ids[rows]
        )
        given_scores = score[rows].to(scored.mask.dtype)
        normalised = centred(part, given_scores) / (part.group_std(given_scores) + self.eps)
        return scored.mask.new_zeros(len(score)).index_copy(0, rows, normalised)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GDPO]
