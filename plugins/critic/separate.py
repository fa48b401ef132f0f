"""Critic with separate weights, as in InstructGPT (arXiv:2203.02155, appendix C.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Critic, HubModel, TrainedCritic

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class Separate(TrainedCritic):
    """Predicts values with a second model that shares the policy's tokens."""

    name = "separate"
    words = "a separate model"

    init: Literal["policy", "reward"] | HubModel = "policy"
    """Initial weights: `policy` (copied trunk, zero head), `reward` (the recipe's reward model with its head, so that values
    start as its scores), or a folder or Hub name (its trunk, and its head if that has one output). A model with another
    tokenizer than the policy's is rejected."""
    adapter: bool = False
    """Train a copy of the policy's adapter (model.lora) on the policy's frozen weights, which are then in memory once,
    instead of a whole second model."""
    device: str | None = None
    """Device on which it stays, such as cuda:1; the policy's by default. Its forwards and backwards then run beside the
    policy's."""
    offload: bool = False
    """Keep its own weights and their optimizer state in main memory while completions are sampled and scored. The trained
    parameters are bit-identical."""

    def __post_init__(self) -> None:
        if self.adapter:
            vars(self)["needs"] = frozenset({"adapter"})
        elif self.init == "policy":
            vars(self)["needs"] = frozenset({"plain_weights"})
        self._tokenizer: tuple[str | None, str | None] | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.init == "reward" and not any("reward_model" in source.provides for source in algorithm.rewards):
            yield (
                "critic.init is 'reward' but no reward source is a model. "
                "Add {use: reward_model, model: ...} to rewards, or set critic.init=policy"
            )
        if self.device is not None and (self.adapter or self.offload):
            why = "adapter shares the policy's weights" if self.adapter else "offload moves it to the policy's device"
            yield f"critic.{why}, and device={self.device} keeps it elsewhere. Leave one of them out"
        if self.adapter and self.init != "policy":
            yield f"critic.init must be 'policy' with critic.adapter, got {self.init!r}. Set init=policy or adapter=false"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        source: Any = next((s for s in algorithm.rewards if "reward_model" in s.provides), None)
        if self.init != "reward" or source is None:
            return
        defaults = {"weight": 1.0, "clip": None, "normalize": "none", "value": "logit"}
        changed = [f"{name}={x}" for name, plain in defaults.items() if (x := getattr(source, name, plain)) != plain]
        if changed:
            yield f"it starts from the reward model's raw scores, before its {', '.join(changed)}"

    def build(self, policy: PreTrainedModel, algorithm: Algorithm) -> nn.Module:
        from ._modules import AdapterCritic, SeparateCritic

        if self.adapter:
            return AdapterCritic(policy)
        if self.init == "policy":
            return SeparateCritic.from_policy(policy)
        from ._origins import check_vocabulary, from_path

        if self.init == "reward":
            source: Any = next(s for s in algorithm.rewards if "reward_model" in s.provides)
            own, model = getattr(source, "tokenizer", None), getattr(source, "model", None)
            self._tokenizer = (own or model, None if own else getattr(source, "revision", None))
            made = SeparateCritic.from_model(source.fresh_model(policy.device), policy, "critic.init=reward")
        else:
            self._tokenizer = (self.init, None)
            made = SeparateCritic.of(*from_path(self.init), policy)
        check_vocabulary(policy, made.trunk, self.init)
        return made

    def setup(self, context: Context) -> None:
        """Compare the model's tokenizer with the policy's, which is known by now."""
        if self._tokenizer is not None and context.tokenizer is not None:
            from ._origins import check_tokenizer

            check_tokenizer(context.tokenizer, *self._tokenizer, self.init)


@hookimpl
def critic() -> list[type[Critic]]:
    return [Separate]
