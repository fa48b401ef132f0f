"""Modules behind the critics, each called as (batch, states) -> (n,) values.

n is the number of sampled tokens of the `TokenBatch`; `states` (n, H) are the policy's hidden states at the tokens before
them, passed if `on_trunk` is True.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_rlhf.axes import TokenBatch

Activation = Literal["relu", "tanh", "gelu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


def value_head(size: int, layers: int = 0, width: int | None = None, activation: Activation = "relu") -> nn.Module:
    """Return a head (n, `size`) -> (n, 1) that outputs 0 at the start: `layers` hidden layers and a linear one.

    Hidden layers are initialized orthogonally with gain sqrt(2) and zero bias, as in PPO's networks (implementation detail
    2); the last layer with zeros, as in lm-human-preferences (arXiv:1909.08593).
    """
    parts: list[nn.Module] = []
    for _ in range(layers):
        hidden = nn.Linear(size, width or size)
        nn.init.orthogonal_(hidden.weight, math.sqrt(2))
        nn.init.zeros_(hidden.bias)
        parts += [hidden, ACTIVATIONS[activation]()]
        size = width or size
    last = nn.Linear(size, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last) if parts else last


class TrunkHead(nn.Module):
    """Value head on the policy's hidden states."""

    on_trunk = True

    def __init__(
        self,
        policy: Any,
        trunk_gradient: float,
        layers: int = 0,
        width: int | None = None,
        activation: Activation = "relu",
    ):
        super().__init__()
        weight = policy.get_output_embeddings().weight
        head = value_head(weight.shape[1], layers, width, activation)
        self.head = head.to(device=weight.device, dtype=_trainable(weight.dtype))
        self.trunk_gradient = trunk_gradient

    def forward(self, batch: TokenBatch, states: Tensor) -> Tensor:
        """Return values (n,); the gradient into `states` is scaled by `trunk_gradient`."""
        if self.trunk_gradient == 0:
            states = states.detach()
        elif self.trunk_gradient != 1:
            states = self.trunk_gradient * states + (1 - self.trunk_gradient) * states.detach()
        return self.head(states.to(next(self.head.parameters()).dtype)).squeeze(-1)


class SeparateCritic(nn.Module):
    """Transformers trunk with a head on its last hidden state."""

    on_trunk = False

    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, batch: TokenBatch, states: None) -> Tensor:
        """Return values (n,)."""
        return self.head(batch.states(self.trunk)).squeeze(-1)

    @classmethod
    def from_policy(cls, policy: Any) -> SeparateCritic:
        """Copy the policy's trunk and add a head that outputs 0 at the start."""
        base = copy.deepcopy(policy)
        if hasattr(base, "merge_and_unload"):
            base.get_base_model().set_output_embeddings(
                None
            )  # may share the embedding's weight, and is not the critic's
            base = base.merge_and_unload()
        return cls.of(base.base_model, None, policy)

    @classmethod
    def from_model(cls, model: Any, policy: Any, who: str = "critic") -> SeparateCritic:
        """Use a reward model's trunk and head, so that values start as its scores. Raises as `trunk_and_head` does."""
        from ._origins import trunk_and_head

        return cls.of(*trunk_and_head(model, who), policy)

    @classmethod
    def of(cls, trunk: Any, head: nn.Module | None, policy: Any) -> SeparateCritic:
        """Join a trunk and its head (or a zero head), all trainable, on the policy's device and in its dtype."""
        like = policy.get_output_embeddings().weight
        head = value_head(_width(trunk)) if head is None else head
        return cls(trunk, head).to(device=like.device, dtype=_trainable(like.dtype)).requires_grad_(True)


class AdapterCritic(nn.Module):
    """Copy of the policy's trainable trunk weights on its shared frozen weights, with a head that outputs 0 at the start.

    The frozen weights are the policy's tensors, so that they are in memory once; they are not parameters of this module,
    which trains, saves and moves only its own. It has no dropout.
    """

    on_trunk = False

    def __init__(self, policy: Any):
        super().__init__()
        causal = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
        trunk = copy.deepcopy(causal.base_model, dict(shared))
        for module in trunk.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        own = {name.replace(".", "/"): p for name, p in trunk.named_parameters() if p.requires_grad}
        if not own or not shared:
            raise TypeError(
                f"critic.adapter needs an adapter within the policy's trunk, but this {type(policy).__name__} has none. Give "
                "the policy one (model.lora in a recipe, peft_config in Python) or set critic.adapter=false"
            )
        like = policy.get_output_embeddings().weight
        self.adapter = nn.ParameterDict(own)
        self.head = value_head(_width(trunk)).to(device=like.device, dtype=_trainable(like.dtype))
        self._trunk = (trunk,)  # in a tuple: its parameters are not this module's

    @property
    def trunk(self) -> Any:
        """The trunk with the policy's frozen weights and this critic's trainable ones."""
        return self._trunk[0]

    def train(self, mode: bool = True) -> AdapterCritic:
        """Set training or evaluation mode, of the trunk as well."""
        self.trunk.train(mode)
        return super().train(mode)

    def forward(self, batch: TokenBatch, states: None) -> Tensor:
        """Return values (n,)."""
        found = batch.states(self.trunk)
        return self.head(found.to(next(self.head.parameters()).dtype)).squeeze(-1)


def _width(trunk: Any) -> int:
    """Return the width of a model's hidden states."""
    return int(trunk.config.get_text_config().hidden_size)


def _trainable(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point and dtype != torch.float16 else torch.float32
