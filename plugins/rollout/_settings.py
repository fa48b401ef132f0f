"""Sampling settings that engines share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from hf_rlhf.axes import Count, Positive, RolloutEngine

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm, Policy

CUTS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Settings that change the distribution -> the value with which they do not."""


@dataclass(kw_only=True)
class SamplingEngine(RolloutEngine):
    """Base class of engines that sample token by token from the policy."""

    max_new_tokens: Count = 256
    """Maximum tokens of a completion, the end-of-sequence token included."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens with this cumulative probability; 1 disables."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample from this many of the most likely tokens; 0 disables."""
    min_p: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Exclude tokens less likely than this factor times the most likely one."""
    repetition_penalty: Positive = 1.0
    """Divides the scores of tokens that have occurred; 1 disables."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end a completion, like the end-of-sequence token; they are kept."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield an error for an empty stop string."""
        if "" in self.stop_strings:
            yield "rollout.stop_strings must not contain an empty text, which every completion contains. Remove it"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        """Yield remarks on settings that change the sampling distribution."""
        yield from super().remarks(algorithm)
        for setting in self.cuts():
            yield (
                f"{setting}={getattr(self, setting)} samples from a distribution other than the policy's, so gradients "
                f"are biased; {setting}={CUTS[setting]} is exact"
            )

    def cuts(self) -> list[str]:
        """Return the names of the settings that change the sampling distribution."""
        return [setting for setting, off in CUTS.items() if getattr(self, setting) != off]


def end_tokens(policy: Policy) -> set[int]:
    """Return the ids that end a completion: those of the model's generation_config and the tokenizer's."""
    own = policy.model.generation_config.eos_token_id
    found = {own} if isinstance(own, int) else set(own or ())
    return found | ({policy.tokenizer.eos_token_id} - {None})
