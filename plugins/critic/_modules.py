"""The modules behind the critics. Each is called as (batch, states) -> (n,) values.

n is the number of sampled tokens of the `TokenBatch`; `states` (n, H) is the policy's hidden state at the token before each,
given where `on_trunk` is True.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_rlhf.policy import TokenBatch


def hidden_size(model: Any) -> int:
    """Width of a model's hidden states."""
    return int(model.config.get_text_config().hidden_size)


class TrunkHead(nn.Module):
    """A linear head, zero at the start, on the policy's hidden states."""

    on_trunk = True

    def __init__(self, policy: Any, trunk_gradient: float):
        super().__init__()
        weight = policy.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=_trainable(weight.dtype))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trunk_gradient = trunk_gradient

    def forward(self, batch: TokenBatch, states: Tensor) -> Tensor:
        """(n,) values; the gradient into `states` is scaled by `trunk_gradient`."""
        if self.trunk_gradient == 0:
            states = states.detach()
        elif self.trunk_gradient != 1:
            states = self.trunk_gradient * states + (1 - self.trunk_gradient) * states.detach()
        return self.head(states.to(self.head.weight.dtype)).squeeze(-1)


class SeparateCritic(nn.Module):
    """A transformers trunk with a linear head."""

    on_trunk = False

    def __init__(self, trunk: nn.Module, head: nn.Linear):
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, batch: TokenBatch, states: None) -> Tensor:
        """(n,) values."""
        return self.head(batch.states(self.trunk)).squeeze(-1)

    @classmethod
    def from_policy(cls, policy: Any) -> SeparateCritic:
        """The policy's trunk, copied, with a head that starts at zero."""
        base = copy.deepcopy(policy)
        if hasattr(base, "merge_and_unload"):
            base = base.merge_and_unload()
        return cls._with_head(base, None, policy)

    @classmethod
    def from_model(cls, model: Any, policy: Any) -> SeparateCritic:
        """The trunk of `model`, with its score head if it has one."""
        score = getattr(model, "score", None)
        return cls._with_head(
            model, score if isinstance(score, nn.Linear) and score.out_features == 1 else None, policy
        )

    @classmethod
    def _with_head(cls, model: Any, score: nn.Linear | None, policy: Any) -> SeparateCritic:
        trunk = model.base_model
        like = policy.get_output_embeddings().weight
        head = nn.Linear(hidden_size(model), 1)
        nn.init.zeros_(head.bias)
        if score is None:
            nn.init.zeros_(head.weight)
        else:
            with torch.no_grad():
                head.weight.copy_(score.weight)
                if score.bias is not None:
                    head.bias.copy_(score.bias)
        return cls(trunk, head).to(device=like.device, dtype=_trainable(like.dtype)).requires_grad_(True)


def _trainable(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float32


def from_path(path: str, revision: str | None = None) -> Any:
    """A sequence classifier where the checkpoint is one, else its trunk."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, revision=revision)
    classifier = any("SequenceClassification" in name for name in config.architectures or [])
    return (AutoModelForSequenceClassification if classifier else AutoModel).from_pretrained(path, revision=revision)


def check_vocabulary(policy: Any, model: Any, origin: str) -> None:
    """Raises ValueError where the critic's tokens are not the policy's: it reads the same token ids."""
    ours, theirs = policy.get_input_embeddings().num_embeddings, model.get_input_embeddings().num_embeddings
    if ours != theirs:
        raise ValueError(
            f"critic.init={origin!r}: its vocabulary has {theirs} tokens, the policy's {ours}. A critic reads the policy's "
            "token ids; start it from a model with the policy's tokenizer, or set critic.init=policy"
        )
