"""A critic that is a second adapter on the policy's base: what is shared, what is not, and that its gradients are exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.testing import conformance, tiny_policy
from hf_rlhf.training.setup import AlgorithmError
from hf_rlhf_plugins.critic._modules import SeparateCritic
from tests.helpers import runs, stepping

ADAPTER = {"use": "separate", "adapter": True}


def adapted(dropout: float = 0.0) -> Any:
    """A policy whose adapter is not at zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_policy(dtype=torch.float64)[0], config)


def built(policy: Any) -> Any:
    algorithm: Any = None
    critic = load_plugin("critic", "separate", adapter=True).build(policy, algorithm)
    with torch.no_grad():
        critic.head.weight.copy_(torch.linspace(-1, 1, 32))
    return critic


def values(policy: Any, critic: Any) -> Tensor:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    batch = TokenBatch([[5, 6], [7, 8, 9]], [[10, 11, 12], [13, 14]], mask, 0)
    return ActorCritic(policy, critic, 1.0)(batch, values=True, logps=False)["values"]


@pytest.mark.proves("critic.separate", how="parity", tolerance="exact")
def test_its_values_and_gradients_are_those_of_a_whole_copy():
    policy = adapted()
    critic = built(policy)
    whole = SeparateCritic(copy.deepcopy(policy.get_base_model().model), copy.deepcopy(critic.head))
    for one in (critic, whole):
        (values(policy, one) - 1).square().sum().backward()
    assert torch.equal(values(policy, critic), values(policy, whole))
    copied = {name.replace(".", "/"): p for name, p in whole.trunk.named_parameters() if p.requires_grad}
    assert copied.keys() == critic.adapter.keys()
    for name, p in critic.adapter.items():
        assert p.grad.norm() > 0
        assert torch.equal(p.grad, copied[name].grad), name
    assert torch.equal(critic.head.weight.grad, whole.head.weight.grad)
    assert all(p.grad is None for p in policy.parameters()), "nothing of it reaches the policy"


def test_the_frozen_weights_are_the_policys_own_and_are_held_once():
    policy = adapted()
    critic = built(policy)
    frozen = {id(p) for p in policy.parameters() if not p.requires_grad}
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    assert {id(p) for p in critic.trunk.parameters() if not p.requires_grad} <= frozen
    own = list(critic.parameters())
    assert not {id(p) for p in own} & (frozen | trained)
    assert not {p.data_ptr() for p in own} & {p.data_ptr() for p in policy.parameters()}
    assert sum(p.numel() for p in own) == sum(p.numel() for p in policy.parameters() if p.requires_grad) + 33
    assert all(p.requires_grad for p in own)


def test_neither_adapter_touches_the_other():
    policy = adapted()
    critic, ids = built(policy), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before, logits = values(policy, critic), policy(input_ids=ids).logits
        with policy.disable_adapter():
            assert torch.equal(values(policy, critic), before), "the reference adapter_off leaves the critic's on"
        for p in critic.adapter.values():
            p.add_(0.1)
        assert torch.equal(policy(input_ids=ids).logits, logits)
        moved = values(policy, critic)
        assert not torch.allclose(moved, before)
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1)
        assert torch.equal(values(policy, critic), moved)


def test_its_values_are_without_dropout_in_training_too():
    policy = adapted(dropout=0.5)
    critic = built(policy).train()
    assert critic.trunk.training
    assert torch.equal(values(policy, critic), values(policy, critic))
    assert torch.equal(values(policy, critic.eval()), values(policy, critic.train()))
    assert any(m.p == 0.5 for m in policy.modules() if isinstance(m, torch.nn.Dropout)), "the policy keeps its own"


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_run_trains_both_and_saves_the_critics_own_weights_alone(warmup: int, tmp_path: Path):
    made = runs.trainer(
        tmp_path,
        lora=True,
        advantages="gae",
        critic={**ADAPTER, "warmup_steps": warmup, "learning_rate": 0.05, "coef": 1.0},
        training={"learning_rate": 1.0, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"},
    )
    policy, critic = runs.parameters(made.model), runs.parameters(made.actor_critic.critic)
    made.train()
    made.close()
    assert not torch.equal(runs.parameters(made.actor_critic.critic), critic)
    assert torch.equal(runs.parameters(made.model), policy) == (warmup == 2)
    rates = {id(p): group["lr"] for group in made.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in made.actor_critic.critic.parameters()} == {0.05}
    saved = load_file(tmp_path / "checkpoint-2" / "critic" / "model.safetensors")
    assert saved.keys() == made.actor_critic.critic.state_dict().keys()
    assert all(name.startswith(("adapter.", "head.")) for name in saved)
    assert not any("critic" in name for name, _ in made.model.named_parameters())


def specification(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "algorithm": {"advantages": "gae", "critic": {**ADAPTER, "coef": 1.0}},
        "update": {"mini_batches": 2, "epochs": 2},
        "training": {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 0.5},
        "lora": True,
    }


def test_it_resumes_within_a_rollout_with_equal_bits(tmp_path: Path):
    straight = stepping.run(specification(tmp_path / "one"))
    resumed = stepping.run(specification(tmp_path / "one"), resume=str(tmp_path / "one" / "checkpoint-3"))
    assert torch.equal(resumed, straight)


def test_two_processes_train_it_as_one_does(tmp_path: Path):
    one = stepping.run(specification(tmp_path / "one"))
    two = stepping.finish(stepping.start({"two": specification(tmp_path / "two")}, tmp_path, processes=2), tmp_path)[
        "two"
    ]
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)


def test_without_an_adapter_it_is_refused_before_the_model_loads(tmp_path: Path):
    with pytest.raises(AlgorithmError, match=r"critic=separate needs a policy with an adapter: set model\.lora"):
        runs.trainer(tmp_path, advantages="gae", critic=ADAPTER, policy="no/such/model")
    algorithm: Any = None
    with pytest.raises(TypeError, match=r"needs an adapter within the policy's trunk.*critic\.adapter=false"):
        load_plugin("critic", "separate", adapter=True).build(tiny_policy()[0], algorithm)


def test_another_start_than_the_policy_is_refused():
    plugin = load_plugin("critic", "separate", adapter=True, init="some/model")
    algorithm: Any = None
    (problem,) = plugin.check(algorithm)
    assert (
        problem
        == "critic.init must be 'policy' with critic.adapter, got 'some/model'. Set init=policy or adapter=false"
    )


def test_the_plan_counts_its_own_weights_alone():
    from transformers import TrainingArguments

    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.runtime.peak_memory import MIB
    from hf_rlhf.training.memory.estimate import estimate

    args = TrainingArguments("nowhere", use_cpu=True, report_to="none")
    algorithm = runs.recipe(rollout=runs.SAMPLED, advantages="gae", critic=ADAPTER).algorithm()
    policy = adapted()
    found = estimate(Model(), algorithm, args, model=policy, prompt_tokens=20).phases["update"]
    trunk = policy.get_base_model().model
    assert found["critic"] * MIB == sum(p.nbytes for p in trunk.parameters() if p.requires_grad)
    assert found["critic"] < found["weights"] / 4


@pytest.mark.parametrize(
    "plugin",
    [
        load_plugin("critic", "separate", adapter=True),
        load_plugin("critic", "value_head", layers=1, width=8, activation="tanh"),
    ],
    ids=["adapter", "hidden layer"],
)
def test_it_conforms(plugin: Any):
    facts = conformance(plugin)
    assert len(facts) >= 6
    for fact in facts:
        fact()
