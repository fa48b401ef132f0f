"""router_balance: transformers' own load-balancing loss where both are defined, and linear in tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_rlhf import load_plugin
from hf_rlhf.modeling.router import experts_of_rows
from hf_rlhf.testing import tiny_policy
from tests.helpers.models import tiny_moe

LAYERS, EXPERTS, CHOSEN = 3, 5, 2
ROLLOUT = {"use": "generate", "prompts": 4, "num_generations": 3, "max_new_tokens": 5}


def moe(**options: Any) -> Any:
    return tiny_moe(len(tiny_policy()[1]), dtype=torch.float64, **options)


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits (4, 6, LAYERS, EXPERTS) and a mask."""
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 6, LAYERS, EXPERTS, generator=draw, dtype=torch.float64)
    return logits, (torch.rand(4, 6, generator=draw) > 0.3).double()


def term(logits: torch.Tensor, mask: torch.Tensor, fractions: torch.Tensor, **settings: Any) -> torch.Tensor:
    plugin = load_plugin("loss_terms", "router_balance", coef=0.7, **settings)
    value = plugin(mask, mask, router_logits=logits, routing_fractions=fractions.expand(logits.shape))
    return (value * plugin.weights(mask)).sum()


def shares(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return experts_of_rows(logits, mask, CHOSEN).double().sum(0) / mask.sum()


@pytest.mark.proves("loss_terms.router_balance", how="parity", tolerance="1e-6")
def test_pooled_it_is_the_loss_of_transformers_and_by_layer_the_sum_of_those_of_single_layers():
    logits, mask = drawn()
    fractions = shares(logits, mask)
    layers = tuple(logits[mask > 0][:, i] for i in range(LAYERS))
    pooled = load_balancing_loss_func(layers, EXPERTS, CHOSEN)
    assert term(logits, mask, fractions, pool="model").item() == pytest.approx(0.7 * pooled.item(), rel=1e-6)
    single = sum(load_balancing_loss_func((layer,), EXPERTS, CHOSEN).item() for layer in layers)
    assert term(logits, mask, fractions).item() == pytest.approx(0.7 * single, rel=1e-6)


@pytest.mark.proves("loss_terms.router_balance", how="closed form", tolerance="1e-12")
def test_equal_shares_give_the_experts_per_token_and_its_gradient_is_linear_in_tokens():
    logits, mask = drawn()
    equal = torch.full((LAYERS, EXPERTS), CHOSEN / EXPERTS, dtype=torch.float64)
    assert term(logits, mask, equal).item() == pytest.approx(0.7 * LAYERS * CHOSEN, abs=1e-12)
    fractions, plugin = shares(logits, mask), load_plugin("loss_terms", "router_balance", coef=0.7)
    weights, whole = plugin.weights(mask), logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(term(whole, mask, fractions), whole)
    for row in range(4):
        part = logits[row : row + 1].clone().requires_grad_()
        value = plugin(
            mask[:1], mask[row : row + 1], router_logits=part, routing_fractions=fractions.expand(part.shape)
        )
        (got,) = torch.autograd.grad((value * weights[row : row + 1]).sum(), part)
        torch.testing.assert_close(got, want[row : row + 1], rtol=1e-12, atol=1e-12)
