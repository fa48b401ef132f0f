"""Next-token loss on high-scoring completions (positive-example LM loss, VAPO, arXiv:2504.05118)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import LossTerm, Positive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class PositiveNLL(LossTerm):
    """-coef log p, averaged over all tokens of the rows whose total score exceeds `threshold`; 0 if there are none."""

    name = "positive_nll"
    words = "{coef:g} x negative log-likelihood of completions scored above {threshold:g}"
    needs = frozenset({"total_score"})

    coef: Positive = 0.1
    """Factor of the loss."""
    threshold: float = 0.0
    """Weighted total score, before any KL, above which a row counts as positive."""

    # fields named in `needs` arrive as keywords, which the base class cannot list
    def __call__(self, logps: Tensor, mask: Tensor, *, total_score: Tensor) -> Tensor:  # type: ignore[override]
        return -self.coef * logps.masked_fill(mask == 0, 0.0)

    def weights(self, mask: Tensor, *, total_score: Tensor) -> Tensor:  # type: ignore[override]
        chosen = mask * (total_score > self.threshold).unsqueeze(1)
        return chosen / chosen.sum().clamp(min=1)


@hookimpl
def loss_terms() -> list[type[LossTerm]]:
    return [PositiveNLL]
