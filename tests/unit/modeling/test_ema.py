"""The moving average of a policy: its arithmetic, its number format, and the policy that it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf.modeling.ema import PolicyEMA, average_bytes
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

IDS = torch.tensor([[5, 6, 7, 8]])


def vector(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def trained(policy: Any) -> list[Any]:
    return [p for p in policy.parameters() if p.requires_grad]


def stepped(policy: Any, step: int, size: float = 1.0) -> Tensor:
    """Moves what the policy trains, as an optimizer step does; its trained weights afterwards."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in trained(policy):
            p.add_((size * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return vector(trained(policy))


def adapted(dtype: torch.dtype = torch.float32) -> Any:
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_policy(dtype=dtype)[0], runs.adapter())


def test_the_average_weighs_each_policy_by_what_is_left_of_it():
    policy = tiny_policy(dtype=torch.float64)[0]
    ema, policies = PolicyEMA(policy, 0.9), [vector(trained(policy))]
    for step in range(1, 6):
        policies.append(stepped(policy, step))
        ema.update()
    want = 0.9**5 * policies[0] + sum(0.1 * 0.9 ** (5 - i) * policies[i] for i in range(1, 6))
    torch.testing.assert_close(vector(ema.tensors()), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(vector(trained(policy)), policies[-1]), "the policy does not move"


def test_a_policy_that_rests_is_its_own_average_to_the_bit():
    policy = tiny_policy()[0]
    ema = PolicyEMA(policy, 0.992)
    for _ in range(5):
        ema.update()
    assert torch.equal(vector(ema.tensors()), vector(trained(policy)))


def test_the_average_of_a_bfloat16_policy_is_float32_and_takes_in_what_bfloat16_would_round_away():
    policy = tiny_policy(dtype=torch.bfloat16)[0]
    ema = PolicyEMA(policy, 0.999)
    rounded, want = vector(trained(policy)), vector(trained(policy)).double()
    for step in range(1, 9):
        now = stepped(policy, step, size=0.02)
        ema.update()
        rounded = rounded.lerp(now, 0.001)
        want = 0.999 * want + 0.001 * now.double()
    assert {x.dtype for x in ema.tensors()} == {torch.float32}
    torch.testing.assert_close(vector(ema.tensors()).double(), want, rtol=1e-6, atol=1e-7)
    assert (rounded.double() - want).abs().mean() > 50 * (vector(ema.tensors()).double() - want).abs().mean()
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}


def test_of_an_adapter_the_factors_are_averaged_and_nothing_else_is_held():
    policy = adapted()
    start = [p.detach().clone() for p in trained(policy)]
    ema = PolicyEMA(policy, 0.5)
    now = stepped(policy, 1)
    ema.update()
    assert len(ema.tensors()) == len(start) < len(list(policy.parameters()))
    torch.testing.assert_close(vector(ema.tensors()), 0.5 * vector(start) + 0.5 * now)


def test_its_size_is_known_before_it_is_made():
    for policy in (
        tiny_policy()[0],
        tiny_policy(dtype=torch.bfloat16)[0],
        tiny_policy(dtype=torch.float64)[0],
        adapted(),
    ):
        assert average_bytes(policy) == sum(x.nbytes for x in PolicyEMA(policy, 0.5).tensors())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["plain", "tied", "adapter"])
def test_the_average_stands_in_for_the_policy_and_goes_again(kind: str, exact: bool):
    policy: Any = adapted() if kind == "adapter" else tiny_policy()[0]
    if kind == "tied":
        policy.config.tie_word_embeddings = True
        policy.tie_weights()
    ema = PolicyEMA(policy, 0.25)
    held = list(policy.parameters())
    stepped(policy, 1, size=0.1)
    ema.update()
    policy(input_ids=IDS, labels=IDS).loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in held]
    with torch.no_grad():
        own = policy(input_ids=IDS).logits
        with ema.as_policy(policy, exact=exact):
            inside = policy(input_ids=IDS).logits
            assert torch.equal(
                vector(p for p in policy.parameters() if id(p) not in set(map(id, held))), vector(ema.tensors())
            )
            if kind == "tied":
                assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
        assert torch.equal(policy(input_ids=IDS).logits, own)
    assert not torch.allclose(inside, own)
    assert [id(p) for p in policy.parameters()] == [id(p) for p in held], "the very same parameters, as DDP needs"
    for p, grad in zip(held, grads, strict=True):
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)


def test_the_policy_is_put_back_after_an_error():
    policy = tiny_policy()[0]
    ema, held = PolicyEMA(policy, 0.5), list(policy.parameters())
    with pytest.raises(RuntimeError, match="inside"), ema.as_policy(policy):
        raise RuntimeError("inside")
    assert all(p is q for p, q in zip(policy.parameters(), held, strict=True))


def test_a_model_with_other_parameters_is_refused_and_not_taken_for_the_average():
    ema = PolicyEMA(tiny_policy()[0], 0.5)
    with pytest.raises(ValueError, match="of this policy's own parameters"), ema.as_policy(tiny_policy()[0]):
        pass


def test_in_a_run_the_average_of_a_half_precision_policy_has_its_number_format():
    policy = tiny_policy(dtype=torch.bfloat16)[0]
    ema, policy.config.dtype = PolicyEMA(policy, 0.5), torch.bfloat16
    with ema.as_policy(policy):
        assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    with ema.as_policy(policy, exact=True):
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        policy.config.dtype = "float32"
    assert policy.config.dtype == torch.bfloat16


@pytest.mark.parametrize("decay", [0, 1, 1.5, -0.1])
def test_a_decay_that_is_none_is_refused(decay: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        PolicyEMA(tiny_policy()[0], decay)
