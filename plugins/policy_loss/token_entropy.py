"""Another loss on the tokens of highest entropy alone (arXiv:2506.01939, "forking tokens").

The threshold is over all tokens of an optimizer step, of every micro-batch and process, and the entropies are those of the
policy at rollout time, in the forward that gives the old log-probs. No split into micro-batches or processes changes the
selection, and no update moves it. As in the paper, tokens without gradient count in the aggregation's weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import PolicyLoss, check_output, choice

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class TokenEntropy(PolicyLoss):
    """The loss of each token whose entropy is among the highest of the step; 0 for the others."""

    name = "token_entropy"
    metrics = (
        Metric("selected_frac", "share of tokens", "whose entropy is high enough to have a gradient", when="step"),
    )
    needs = frozenset({"old_logps", "old_entropy", "selected"})
    selects_per_step = True

    loss: PolicyLoss = choice("ppo_clip")
    """Loss of the selected tokens."""
    fraction: Annotated[float, Interval(gt=0, le=1)] = 0.2
    """Share of the step's tokens that are selected, at least one token; ties with the last add to it."""

    def __post_init__(self) -> None:
        inner = self.loss
        self.needs = inner.needs | type(self).needs  # type: ignore[misc]  # what the inner loss reads is read here
        self.stops_gradient, self.token_level = inner.stops_gradient, inner.token_level  # type: ignore[misc]
        self.zero_without_advantage = inner.zero_without_advantage  # type: ignore[misc]

    def in_words(self) -> str:
        return f"{self.loss.in_words()}, on the {self.fraction:.0%} of the tokens with the highest entropy"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if "selected" in self.loss.needs:
            yield (
                f"loss={self.loss.name} selects tokens of its own: choose a loss that does not, such as "
                "policy_loss.loss=ppo_clip"
            )

    def select(  # type: ignore[override]
        self, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, old_entropy: Tensor
    ) -> Tensor:
        """Return (N, T): 1 on the tokens whose entropy is at least that of the last selected one."""
        on = mask > 0
        count = int(on.sum())
        if count == 0:
            return mask * 0
        entropy = old_entropy.masked_fill(~on, float("-inf"))
        threshold = entropy.flatten().topk(max(1, round(self.fraction * count))).values[-1]
        return ((entropy >= threshold) & on).to(mask.dtype)

    def __call__(  # type: ignore[override]
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, selected: Tensor, **needed: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        given = {name: needed[name] for name in self.loss.needs if name in needed}
        found = self.loss(logps, old_logps, advantages, mask, **given)
        inputs = {"logps": logps, "old_logps": old_logps, "advantages": advantages}
        loss, metrics = check_output("policy_loss", self.loss, found, mask, inputs=inputs)
        return loss * selected, {**metrics, "selected_frac": selected * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [TokenEntropy]
