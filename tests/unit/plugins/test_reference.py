"""References on a real model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

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


@pytest.mark.proves("reference.frozen", how="invariance", tolerance="0")
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


@pytest.mark.proves("reference.adapter_off", how="closed form", tolerance="1e-6")
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


@pytest.mark.proves("reference.none", how="closed form", tolerance="0")
def test_none_has_no_log_probs_to_give():
    with pytest.raises(TypeError, match=r"reference\.none"):
        load_plugin("reference", "none").active(tiny_policy()[0])


# References that move


def vector(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stepped(policy: Any, step: int) -> torch.Tensor:
    """Moves the policy as an optimizer step does; its parameters afterwards."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return vector(policy)


@pytest.mark.proves("reference.sync", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("mixing", [1.0, 0.6])
def test_sync_mixes_the_policy_in_at_every_nth_step_and_rests_between(mixing: float):
    policy, plugin = tiny_policy(dtype=torch.float64)[0], load_plugin("reference", "sync", every=3, mixing=mixing)
    model = plugin.build(policy)
    want = vector(model)
    for step in range(1, 10):
        now = stepped(policy, step)
        plugin.move(model, policy, step)
        if step % 3 == 0:
            want = mixing * now + (1 - mixing) * want
        torch.testing.assert_close(vector(model), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(vector(policy), now), "the policy does not move"


@pytest.mark.proves("reference.ema", how="closed form", tolerance="1e-12")
def test_ema_weighs_each_policy_by_what_is_left_of_it():
    policy, plugin = tiny_policy(dtype=torch.float64)[0], load_plugin("reference", "ema", decay=0.9)
    model = plugin.build(policy)
    policies = [vector(policy)]
    for step in range(1, 6):
        policies.append(stepped(policy, step))
        plugin.move(model, policy, step)
    want = 0.9**5 * policies[0] + sum(0.1 * 0.9 ** (5 - i) * policies[i] for i in range(1, 6))
    torch.testing.assert_close(vector(model), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"), [("sync", {"every": 1}), ("sync", {"every": 1, "mixing": 0.5}), ("ema", {"decay": 0.5})]
)
def test_a_moving_reference_takes_no_gradient_and_ties_what_is_tied(name: str, settings: dict[str, Any]):
    policy = tiny_policy(dtype=torch.float64)[0]
    policy.config.tie_word_embeddings = True
    policy.tie_weights()
    plugin = load_plugin("reference", name, **settings)
    model = plugin.build(policy)
    start = vector(model)
    now = stepped(policy, 1)
    plugin.move(model, policy, 1)
    assert plugin.moves
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    share = settings.get("mixing", settings.get("decay", 1.0))
    torch.testing.assert_close(vector(model), share * now + (1 - share) * start, rtol=1e-12, atol=1e-12)


def test_a_copied_adapter_gives_the_log_probs_of_the_policy():
    policy, plugin = with_adapter(), load_plugin("reference", "sync", every=2)
    model = plugin.build(policy)
    stepped(policy, 1)
    plugin.move(model, policy, 1)
    assert not torch.allclose(logits(model), logits(policy))
    plugin.move(model, policy, 2)
    assert torch.equal(logits(model), logits(policy))


@pytest.mark.parametrize(("name", "settings"), [("sync", {"mixing": 0.6}), ("ema", {"decay": 0.99})])
def test_an_adapters_factors_are_not_mixed(name: str, settings: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"reference\.{name} .*factors.*mixing=1"):
        load_plugin("reference", name, **settings).build(with_adapter())


def test_in_half_precision_a_small_share_is_refused_as_rounding_would_hold_it_still():
    policy = tiny_policy(dtype=torch.bfloat16)[0]
    with pytest.raises(ValueError, match=r"decay=0\.99 in bfloat16 would never change.*model\.dtype=float32"):
        load_plugin("reference", "ema").build(policy)
    plugin = load_plugin("reference", "sync", every=1)
    model = plugin.build(policy)
    stepped(policy, 1)
    plugin.move(model, policy, 1)
    assert torch.equal(logits(model), logits(policy))


@pytest.mark.parametrize(("name", "settings"), [("sync", {"mixing": 0}), ("ema", {"decay": 1})])
def test_a_reference_that_would_never_move_is_refused(name: str, settings: dict[str, Any]):
    algorithm: Any = SimpleNamespace(steps_per_rollout=1)
    (problem,) = load_plugin("reference", name, **settings).check(algorithm)
    assert "would never change" in problem
    assert "reference.use=frozen" in problem
    assert not list(load_plugin("reference", name).check(algorithm))


def test_a_reference_that_is_always_the_policy_that_rolls_out_is_remarked_on():
    def said(name: str, steps: int, **settings: Any) -> list[str]:
        algorithm: Any = SimpleNamespace(steps_per_rollout=steps)
        return list(load_plugin("reference", name, **settings).remarks(algorithm))

    assert "the KL of sampled tokens is 0" in said("sync", 4, every=2)[0]
    assert said("ema", 4, decay=0)
    assert not said("sync", 4, every=8)
    assert not said("sync", 4, every=2, mixing=0.5)
    assert not said("ema", 4)


@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize(
    ("chosen", "lora"),
    [
        ({"use": "sync", "every": 2, "mixing": 0.6}, False),
        ({"use": "ema", "decay": 0.5}, False),
        ({"use": "sync", "every": 2}, True),
    ],
    ids=["sync", "ema", "sync of an adapter"],
)
def test_a_run_moves_its_reference_and_resumes_it_to_the_bit(
    chosen: dict[str, Any], lora: bool, mini_batches: int, tmp_path: Path
):
    """From the border of a rollout and from within one."""

    def run(steps: int, resume: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        made = runs.trainer(
            tmp_path,
            kl=[{"use": "in_loss", "estimator": "k2", "beta": 1.0}],
            reference=chosen,
            lora=lora,
            update={"mini_batches": mini_batches},
            training={
                "max_steps": steps,
                "save_strategy": "steps",
                "save_steps": 3,
                "learning_rate": 1.0 if lora else 0.1,
            },
        )
        made.train(resume_from_checkpoint=resume, overwrite=not resume)
        made.close()
        return runs.parameters(made), vector(made.collector.forwards.references.moving()["reference"][1])

    start = vector(runs.trainer(tmp_path, lora=lora).model)
    first = run(3)
    straight = run(5)
    resumed = run(5, resume=str(tmp_path / "checkpoint-3"))
    assert not torch.equal(first[1], start)
    for a, b in zip(resumed, straight, strict=True):
        assert torch.equal(a, b)
