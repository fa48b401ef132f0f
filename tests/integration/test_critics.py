"""Critics: the value loss, the warm-up, their own learning rate, where their weights start, and that they learn."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaModel, TrainerCallback

from hf_rlhf import load_plugin
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.testing import rollouts, tiny_policy
from hf_rlhf.training.losses import value_term
from hf_rlhf_plugins.critic._modules import TrunkHead
from tests.helpers import runs

GAE = {"use": "gae", "lam": 1.0}
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1}


def inputs(values, returns, mask, old):
    rows = {"mask": mask, "returns": returns, "values": old}
    made = {name: torch.tensor([x], dtype=torch.float64) for name, x in rows.items()}
    made["value_weights"] = made["mask"] / made["mask"].sum()
    return torch.tensor([values], dtype=torch.float64, requires_grad=True), made


# The loss


def test_the_plain_value_loss_is_coef_times_half_the_mean_squared_error():
    critic = load_plugin("critic", "separate", coef=0.3, value_clip="none")
    values, batch = inputs([1.0, 5.0, -2.0], [0.0, 99.0, 1.0], mask=[1, 0, 1], old=[0.0, 0.0, 0.0])
    loss = value_term(critic, values, batch, MetricAggregator())["value/loss"]
    assert loss.item() == pytest.approx(0.3 * 0.5 * (1.0**2 + 3.0**2) / 2, abs=1e-12)
    loss.backward()
    assert values.grad[0].tolist() == pytest.approx([0.3 * 1.0 / 2, 0.0, 0.3 * -3.0 / 2])


def test_the_clipped_value_loss_is_the_larger_of_both_errors():
    """Moved past the clip towards the return: the clipped error counts, without a gradient. Away from it: the plain one."""
    critic = load_plugin("critic", "value_head", coef=1.0, value_clip=0.2)
    values, batch = inputs([0.5, -0.5, 0.1], [1.0, 1.0, 1.0], mask=[1, 1, 1], old=[0.0, 0.0, 0.0])
    meters = MetricAggregator()
    loss = value_term(critic, values, batch, meters)["value/loss"]
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 1.5**2 + 0.9**2) / 3, abs=1e-12)
    loss.backward()
    assert values.grad.tolist()[0] == pytest.approx([0.0, -1.5 / 3, -0.9 / 3])
    total, count = meters.state_dict()["sums"]["value/clip_frac"]
    assert total / count == pytest.approx(1 / 3)


# The warm-up and the learning rate


class Watch(TrainerCallback):
    """The policy and the critic after each optimizer step."""

    def __init__(self):
        self.policy, self.critic = [], []

    def see(self, made):
        self.policy.append(runs.parameters(made.actor_critic.policy))
        self.critic.append(runs.parameters(made.actor_critic.critic))

    def on_step_end(self, args, state, control, **kwargs):
        self.see(self.trainer)


def watched(folder, **options):
    watch = Watch()
    made = runs.trainer(folder, callbacks=[watch], advantages=GAE, **options)
    watch.trainer = made
    watch.see(made)
    made.train(overwrite=True)
    made.close()
    return made, watch


@pytest.mark.parametrize("critic", ["separate", "value_head"])
def test_the_warm_up_leaves_the_policy_bit_equal_while_the_critic_moves(critic, tmp_path):
    """Weight decay included: AdamW would shrink a parameter whose gradient is zero."""
    training = {**ADAMW, "max_steps": 4}
    _, watch = watched(tmp_path, critic={"use": critic, "warmup_steps": 3}, training=training)
    for step in (1, 2, 3):
        assert torch.equal(watch.policy[step], watch.policy[0])
        assert not torch.equal(watch.critic[step], watch.critic[step - 1])
    assert not torch.equal(watch.policy[4], watch.policy[3])


@pytest.mark.parametrize("critic", ["separate", "value_head"])
def test_the_critic_has_its_own_learning_rate_and_the_policys_without_one(critic, tmp_path):
    for rate, want in ((0.003, 0.003), (None, 0.01)):
        made, watch = watched(
            tmp_path, critic={"use": critic, "learning_rate": rate}, training={"max_steps": 1, "learning_rate": 0.01}
        )
        own = {id(p) for p in made.actor_critic.critic.parameters()}
        groups = made.optimizer.param_groups
        in_groups = [id(p) for group in groups for p in group["params"]]
        assert len(in_groups) == len(set(in_groups)) == len(list(made.actor_critic.parameters()))
        for group in groups:
            ids = {id(p) for p in group["params"]}
            assert ids <= own or not ids & own, "policy and critic in one group"
            assert group["lr"] == (want if ids <= own else 0.01)
        assert not torch.equal(watch.critic[0], watch.critic[1])


def test_plain_sgd_moves_the_critic_in_proportion_to_its_rate(tmp_path):
    def movement(rate):
        _, watch = watched(tmp_path, critic={"use": "separate", "learning_rate": rate}, training={"max_steps": 1})
        return watch.critic[1] - watch.critic[0]

    small, large = movement(0.01), movement(0.03)
    assert small.norm() > 0
    assert (large - 3 * small).norm() < 1e-5 * large.norm()


def test_a_schedule_scales_both_rates_alike(tmp_path):
    training = {"max_steps": 4, "lr_scheduler_type": "linear", "learning_rate": 0.1}
    made = runs.trainer(tmp_path, advantages=GAE, critic={"use": "separate", "learning_rate": 0.01}, training=training)
    made.train(overwrite=True)
    rates = {group["lr"] for group in made.optimizer.param_groups}
    assert rates == {0.0}
    assert {group["initial_lr"] for group in made.optimizer.param_groups} == {0.1, 0.01}
    assert [entry["learning_rate"] for entry in runs.entries(made)] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_only_decayed_parameters_of_the_critic_are_decayed(tmp_path):
    made = runs.trainer(tmp_path, advantages=GAE, critic="separate", training=ADAMW)
    made.create_optimizer()
    decayed = {id(p) for group in made.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in made.actor_critic.critic.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name and "bias" not in name), name


# Where the weights start


def batch_of(module):
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    batch = TokenBatch([[5, 6], [7, 8, 9]], [[10, 11, 12], [13, 14]], mask, 0)
    with torch.no_grad():
        return module(batch, values=True, logps=False)["values"]


@pytest.mark.proves("critic.separate", how="closed form", tolerance="exact")
def test_a_critic_from_the_policy_has_its_trunk_copied_and_starts_at_zero():
    policy, _ = tiny_policy()
    critic = load_plugin("critic", "separate").build(policy, None)
    assert torch.equal(runs.parameters(critic.trunk), runs.parameters(policy.model))
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.parameters()}
    assert all(p.requires_grad for p in critic.parameters())
    assert (batch_of(ActorCritic(policy, critic, 1.0)) == 0).all()


def test_a_critic_of_an_adapted_policy_starts_from_base_and_adapter():
    from peft import get_peft_model

    base, _ = tiny_policy(dtype=torch.float64)
    adapted = get_peft_model(base, runs.adapter())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
        ids = torch.tensor([[5, 6, 7]])
        critic = load_plugin("critic", "separate").build(adapted, None)
        want = adapted(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        got = critic.trunk(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert all(p.requires_grad for p in critic.parameters())
    assert not any("lora" in name for name, _ in critic.named_parameters())


@pytest.mark.proves("critic.separate", how="closed form", tolerance="1e-6")
def test_a_critic_from_the_reward_model_starts_with_its_scores(tmp_path):
    """The value at a token is the score of the sequence up to there: of the state before the next one."""
    path = runs.save_classifier(tmp_path / "rm", seed=3)
    made = runs.trainer(
        tmp_path,
        rewards=[{"use": "reward_model", "model": path}],
        advantages=GAE,
        critic={"use": "separate", "init": "reward"},
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(path)
    values = batch_of(made.actor_critic)
    with torch.no_grad():
        for row, ids in enumerate([[5, 6, 10, 11], [7, 8, 9, 13]]):
            score = classifier(input_ids=torch.tensor([ids])).logits.item()
            assert values[row, [2, 1][row]].item() == pytest.approx(score, abs=1e-6)
    assert values.abs().min(dim=1).values[0] > 0
    made.train(overwrite=True)
    made.close()
    assert not torch.equal(made.actor_critic.critic.head.weight, classifier.score.weight)


def test_training_the_critic_leaves_the_reward_model_as_it_was(tmp_path):
    path = runs.save_classifier(tmp_path / "rm", seed=3)
    made = runs.trainer(
        tmp_path,
        rewards=[{"use": "reward_model", "model": path}],
        advantages=GAE,
        critic={"use": "separate", "init": "reward", "learning_rate": 0.5},
    )
    reward = made.algorithm.rewards[0]
    before = reward(rollouts())
    made.train(overwrite=True)
    assert reward(rollouts()) == before
    made.close()


@pytest.mark.parametrize("kind", ["classifier", "trunk", "causal"])
def test_a_critic_from_a_path_has_that_trunk(kind, tmp_path):
    policy, _ = tiny_policy()
    other, _ = tiny_policy(seed=5)
    if kind == "classifier":
        runs.save_classifier(tmp_path, seed=5)
        want = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        trunk, head = want.model, want.score.weight
    else:
        (other.model if kind == "trunk" else other).save_pretrained(tmp_path)
        trunk, head = LlamaModel.from_pretrained(tmp_path), torch.zeros(1, 32)
    critic = load_plugin("critic", "separate", init=str(tmp_path)).build(policy, None)
    assert torch.equal(runs.parameters(critic.trunk), runs.parameters(trunk))
    assert torch.equal(critic.head.weight, head)


def test_a_critic_with_another_vocabulary_is_refused(tmp_path):
    from transformers import LlamaConfig

    policy, _ = tiny_policy()
    LlamaModel(LlamaConfig(**{**policy.config.to_diff_dict(), "vocab_size": 50})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary must cover the policy's 99 tokens, got 50") as refused:
        load_plugin("critic", "separate", init=str(tmp_path)).build(policy, None)
    assert "critic.init=policy" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["separate", "value_head"])
def test_a_critic_has_the_number_format_of_the_policy(name, dtype):
    policy, _ = tiny_policy(dtype=dtype)
    critic = load_plugin("critic", name).build(policy, None)
    assert {p.dtype for p in critic.parameters()} == {dtype}
    assert batch_of(ActorCritic(policy, critic, 1.0)).dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)


def test_a_value_head_starts_at_zero_and_adds_one_linear_layer():
    policy, _ = tiny_policy()
    head = load_plugin("critic", "value_head").build(policy, None)
    assert isinstance(head, TrunkHead)
    assert runs.parameters(head).tolist() == [0.0] * 33


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
def test_hidden_layers_of_a_value_head_start_orthogonal_and_its_last_one_at_zero(activation):
    """W W' = 2 I where a layer is no wider than its input, W' W = 2 I where it is."""
    policy, _ = tiny_policy(dtype=torch.float64)
    critic = load_plugin("critic", "value_head", layers=2, width=48, activation=activation).build(policy, None)
    wide, square, last = (critic.head[i].weight for i in (0, 2, 4))
    assert [tuple(x.shape) for x in (wide, square, last)] == [(48, 32), (48, 48), (1, 48)]
    eye = 2 * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close(wide.T @ wide, eye[:32, :32], rtol=0, atol=1e-5)
    torch.testing.assert_close(square @ square.T, eye, rtol=0, atol=1e-5)
    assert (batch_of(ActorCritic(policy, critic, 1.0)) == 0).all()
    with torch.no_grad():
        critic.head[4].weight.fill_(1.0)
        states = torch.randn(5, 32, dtype=torch.float64)
        step = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}.get(activation) or getattr(
            torch, activation
        )
        want = step(step(states @ wide.T) @ square.T).sum(1)
        torch.testing.assert_close(critic(None, states), want)


def test_width_and_activation_of_a_linear_head_are_named_as_without_effect():
    def said(**settings):
        return list(load_plugin("critic", "value_head", **settings).remarks(None))

    assert said(width=8, activation="tanh") == [
        "width, activation has no effect on a linear head: set layers=1 or more"
    ]
    assert not said()
    assert not said(layers=1, width=8, activation="tanh")


# Learning


@pytest.mark.proves("critic.separate", "critic.value_head", how="end to end", tolerance="0.1 of the variance")
@pytest.mark.parametrize(
    "critic", ["separate", "value_head", {"use": "value_head", "layers": 1, "trunk_gradient": 0.0}], ids=str
)
def test_the_critic_learns_the_returns(critic, tmp_path):
    """Each prompt pays its own constant, so that a critic can explain every return."""
    data = [
        {"prompt": letter * 3, "answer": letter, "completions": [f"{letter}{i}{'xyz'[: i % 3]}" for i in range(4)]}
        for letter in "abcdef"
    ]

    chosen = critic if isinstance(critic, dict) else {"use": critic}
    (tmp_path / "pay.py").write_text("def pay(answer):\n    return ['abcdef'.index(x) / 2 for x in answer]\n")
    made = runs.trained(
        tmp_path,
        data=data,
        rewards=[{"use": "function", "function": f"{tmp_path}/pay.py:pay"}],
        rollout={"use": "scripted", "prompts": 6, "num_generations": 2},
        advantages=GAE,
        critic={**chosen, "coef": 1.0, "value_clip": "none", "warmup_steps": 60, "learning_rate": 0.02},
        training={"optim": "adamw_torch", "learning_rate": 0.001, "max_steps": 60},
        update={"mini_batches": 1},
    )
    entries = runs.entries(made)
    first, last = entries[0], entries[-1]
    assert first["value/explained_var"] == pytest.approx(0, abs=0.05)
    assert last["value/explained_var"] > 0.9
    assert last["value/loss"] < 0.1 * first["value/loss"]
