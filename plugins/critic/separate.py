"""A critic with weights of its own, as in InstructGPT (arXiv:2203.02155, appendix C.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Critic, TrainedCritic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn
    from transformers import PreTrainedModel

    from hf_rlhf.algorithm import Algorithm


@dataclass(kw_only=True)
class Separate(TrainedCritic):
    """Predicts values with a second model that shares the policy's tokens."""

    name = "separate"

    init: str = "policy"
    """Where its weights start: `policy` (trunk copied, head zero), `reward` (the recipe's reward model, head included), or
    a folder or Hub name (its trunk, and its score head where it is a sequence classifier with one label)."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.init == "reward" and not any("reward_model" in source.provides for source in algorithm.rewards):
            yield (
                "critic.init is 'reward' and no reward source is a model; "
                "add {use: reward_model, model: ...} to rewards, or set critic.init=policy"
            )

    def build(self, policy: PreTrainedModel, algorithm: Algorithm) -> nn.Module:
        from ._modules import SeparateCritic, check_vocabulary, from_path

        if self.init == "policy":
            return SeparateCritic.from_policy(policy)
        if self.init == "reward":
            source: Any = next(s for s in algorithm.rewards if "reward_model" in s.provides)
            model = source.fresh_model(policy.device)
        else:
            model = from_path(self.init)
        check_vocabulary(policy, model, self.init)
        return SeparateCritic.from_model(model, policy)


@hookimpl
def critic() -> list[type[Critic]]:
    return [Separate]
