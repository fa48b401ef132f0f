"""Generalized advantage estimation (arXiv:1506.02438), with the decoupled and the length-adaptive lambda of VAPO
(arXiv:2504.05118).

The scan runs over the tokens that the policy sampled: discount, lambda and the next value skip tool output between
them. The value after the last token is 0, also if the completion was truncated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction, Positive
from hf_rlhf.batch import Credit

from ._tokens import gae, given, on_mask, whiten_tokens

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GAE(AdvantageEstimator):
    """A_t = d_t + gamma lam A_{t+1} with d_t = R_t + gamma V_{t+1} - V_t; the critic's targets are A + V.

    With lam = 1 any critic leaves the gradient unbiased; a smaller lam trades variance for bias from the critic's error.
    Per-step and per-token rewards enter at their tokens.
    """

    name = "gae"
    needs = frozenset({"values"})

    gamma: Fraction = 1.0
    """Discount from one sampled token to the next."""
    lam: Fraction = 0.95
    """Weight of later TD errors: 0 gives the one-step error, 1 the return minus the value."""
    lam_critic: Fraction | None = None
    """lam for the critic's targets (VAPO: 1); None: the same as `lam`."""
    length_adaptive: Positive | None = None
    """alpha in lam = 1 - 1/max(alpha T, 1) for the advantages of a row with T sampled tokens (VAPO: 0.05, which is lam 0 up
    to 20 tokens). Biased even with exact values. None: `lam` for every row."""
    whiten_rewards: bool = False
    """Scale the token rewards, after the KL in them, to variance 1 over all tokens before the scan and keep their mean
    (TRL's `whiten_rewards`). Equal rewards stay unchanged."""
    whiten: bool = False
    """Normalize the advantages to mean 0 and variance 1 over all tokens; the critic's targets stay unchanged. Equal
    advantages give 0."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom in whitening: 1 divides by the number of tokens minus 1 (TRL, verl), 0 by their number
    (OpenRLHF)."""

    def in_words(self) -> str:
        lam = f"lambda {self.lam:g}" if self.length_adaptive is None else "lambda by length"
        critic = "" if self.lam_critic is None else f", {self.lam_critic:g} for the critic"
        whitened = [
            f"whitened {what}" for what, on in (("rewards", self.whiten_rewards), ("advantages", self.whiten)) if on
        ]
        return f"GAE ({', '.join([f'gamma {self.gamma:g}', f'{lam}{critic}', *whitened])})"

    @property
    def across_groups(self) -> bool:
        """True if whitening makes a row depend on rows of other prompts."""
        return self.whiten or self.whiten_rewards

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.ddof == 0 and not self.across_groups:
            yield "ddof=0 has no effect without whitening: set whiten=true"
        if self.length_adaptive is None:
            return
        if self.lam_critic is not None:
            yield f"lam={self.lam:g} is unused: length_adaptive sets it for the advantages, lam_critic for the critic"
        longest = getattr(algorithm.rollout, "max_new_tokens", None)
        if longest is not None and self.length_adaptive * longest <= 1:
            yield (
                f"length_adaptive={self.length_adaptive:g} gives lam 0 for every row of up to {longest} tokens: "
                f"set it above {1 / longest:g} to distinguish lengths"
            )

    def __call__(self, scored: Scored) -> Credit:
        values, rewards = given(scored.values, "values", "gae"), scored.token_rewards
        if self.whiten_rewards:
            mean = on_mask(rewards.clone(), scored.mask).sum() / scored.mask.sum().clamp(min=1)
            rewards = whiten_tokens(rewards, scored.mask, self.ddof) + mean * scored.mask
        lam_critic = self.lam if self.lam_critic is None else self.lam_critic
        of_critic = gae(rewards, values, scored.mask, self.gamma, lam_critic)
        returns = on_mask(values.clone(), scored.mask).add_(of_critic)
        advantages = of_critic
        if self.length_adaptive is not None:
            lam = 1 - 1 / (self.length_adaptive * scored.mask.sum(1)).clamp(min=1)
            advantages = gae(rewards, values, scored.mask, self.gamma, lam)
        elif lam_critic != self.lam:
            advantages = gae(rewards, values, scored.mask, self.gamma, self.lam)
        if self.whiten:
            advantages = whiten_tokens(advantages, scored.mask, self.ddof)
        return Credit(advantages=advantages, returns=returns)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GAE]
