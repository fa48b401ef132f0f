"""Routers of mixture-of-experts models: their logits at the sampled tokens, and the experts that these choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROUTED = "routed"
"""Name of the tokens of each row that go to each expert, (n, L, E)."""
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k")


def experts(config: Any) -> int:
    """Return the number of routed experts of a layer; 0 for a dense model."""
    return _first(config, EXPERTS)


def experts_per_token(config: Any) -> int:
    """Return the number of experts that a router chooses for a token."""
    if (found := _first(config, PER_TOKEN)) == 0:
        raise ValueError(f"the model's configuration must say how many experts a token gets ({', '.join(PER_TOKEN)})")
    return found


def _first(config: Any, names: tuple[str, ...]) -> int:
    text = config.get_text_config()
    if getattr(text, "is_moe", True) is False:
        return 0
    found = (getattr(text, name, None) for name in names)
    return next((x for x in found if isinstance(x, int)), 0)


def router_logits(model: Any, output: Any, places: Tensor) -> Tensor:
    """Return the logits (n, L, E) of the L routers of a model's output, at `places` (n,) among its positions."""
    layers = [x for x in getattr(output, "router_logits", None) or () if x is not None]
    if not layers:
        raise ValueError(
            f"router_logits are needed and {type(model).__name__} gives none: it must be a mixture of experts whose forward "
            "takes output_router_logits. Remove what needs them from loss_terms"
        )
    return torch.stack([x.reshape(-1, x.size(-1)).index_select(0, places.to(x.device)) for x in layers], 1)


def experts_of_rows(logits: Tensor, mask: Tensor, chosen: int) -> Tensor:
    """Count the tokens of each row that go to each expert: (B, T, L, E) and (B, T) -> (B, L, E), float32."""
    best = logits.topk(chosen, dim=-1).indices
    routed = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    return (routed * (mask > 0)[..., None, None]).sum(1)
