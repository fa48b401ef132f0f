"""References on a real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.testing import tiny_policy

IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def with_adapter() -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(tiny_policy()[0], config)


def test_frozen_is_a_copy_that_does_not_learn():
    policy = tiny_policy()[0].train()
    policy(input_ids=IDS, labels=IDS).loss.backward()
    reference = load_plugin("reference", "frozen").build(policy)
    start = logits(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert torch.equal(logits(reference), start)
    assert not reference.training
    assert all(not p.requires_grad and p.grad is None for p in reference.parameters())
    assert policy.training
    assert all(p.requires_grad and p.grad is not None for p in policy.parameters())


def test_frozen_keeps_the_adapter_that_the_policy_starts_with():
    policy = with_adapter()
    assert torch.equal(logits(load_plugin("reference", "frozen").build(policy)), logits(policy))


def test_adapter_off_is_the_base_model_and_puts_the_adapter_back():
    policy, plugin = with_adapter(), load_plugin("reference", "adapter_off")
    assert plugin.build(policy) is None
    own, base = logits(policy), logits(tiny_policy()[0])
    with plugin.active(policy):
        torch.testing.assert_close(logits(policy), base)
    assert not torch.allclose(own, base)
    assert torch.equal(logits(policy), own)
    assert any(parameter.requires_grad for parameter in policy.parameters())


def test_adapter_off_without_an_adapter_says_what_to_write():
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has none.*frozen"):
        load_plugin("reference", "adapter_off").build(tiny_policy()[0])


def test_none_has_no_log_probs_to_give():
    with pytest.raises(TypeError, match=r"reference\.none"):
        load_plugin("reference", "none").active(tiny_policy()[0])
