"""What the fast path refuses or leaves to the plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.axes import KLPlacement
from hf_rlhf.modeling.lm_head import Head, TokenStatistics, score
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

SAMPLED = {"rollout": runs.SAMPLED, "update": {"epochs": 2}}


@pytest.mark.parametrize("served", [True, False])
def test_log_probs_of_a_sampler_that_does_not_vouch_for_them_are_computed(served, tmp_path, monkeypatch):
    made = runs.trainer(tmp_path, **SAMPLED)
    assert made.algorithm.samples_old_logps
    engine = made.algorithm.rollout
    monkeypatch.setattr(type(engine), "_needs_generate", lambda *args: not served)
    counted = []
    made.actor_critic.register_forward_pre_hook(lambda module, args: counted.append(len(args[0].prompt_ids)))
    made.collector.collect(0)
    assert sum(counted) == (0 if served else 16)


def test_a_penalty_that_mixes_tokens_is_not_taken_token_by_token(tmp_path):
    @dataclass(kw_only=True)
    class Mixed(KLPlacement):
        name = "mixed"
        places = frozenset({"loss"})

        def loss_penalty(self, kl: Tensor) -> Tensor:
            return kl.cumsum(1)

    mixed = Mixed(estimator=load_plugin("kl_estimator", "k2"))
    made = runs.trainer(tmp_path, kl=[mixed], reference="frozen")
    assert not made.algorithm.loss_is_fused
    assert runs.trainer(tmp_path, kl=["in_loss"], reference="frozen").algorithm.loss_is_fused


def test_the_head_has_one_derivative_and_says_so():
    head, states = Head(torch.nn.Linear(4, 9, bias=False)), torch.randn(3, 4, requires_grad=True)
    logps = score(head, states, torch.tensor([1, 2, 3]), 1.0, TokenStatistics())["logps"]
    (first,) = torch.autograd.grad(logps.sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.pow(2).sum().backward()


def test_a_head_that_is_exchanged_is_seen():
    model, _ = tiny_policy()
    batch = TokenBatch([[5, 6]], [[7, 8]], torch.ones(1, 2), 0)
    with torch.no_grad():
        before = ActorCritic(model, None, 1.0)(batch)["logps"]
        model.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False))
        after = ActorCritic(model, None, 1.0)(batch)["logps"]
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, 1:3]
    assert not torch.allclose(before, after)
    want = logits.log_softmax(-1).gather(1, torch.tensor([[7], [8]])).T
    torch.testing.assert_close(after, want)


def test_masks_are_let_go_after_each_micro_batch(tmp_path, monkeypatch):
    held: list[Any] = []
    release = TokenBatch.release

    def watched(batch: TokenBatch) -> None:
        assert "_blocks" in vars(batch.packed[0])
        release(batch)
        held.append("_blocks" in vars(batch.packed[0]))

    monkeypatch.setattr(TokenBatch, "release", watched)
    runs.trained(tmp_path, training={"per_device_train_batch_size": 4})
    assert held
    assert not any(held)


def test_what_has_no_second_derivative_or_no_backward_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"update\.attention=packed has no second derivative"):
        runs.trainer(tmp_path, optimizer="trpo", policy_loss="surrogate", update={"attention": "packed"})
    with pytest.raises(ValueError, match="FlexAttention has no backward on a CPU"):
        runs.trainer(tmp_path, update={"attention": "flex"})


def test_logits_that_are_no_numbers_give_tokens_of_the_vocabulary():
    from hf_rlhf_plugins.rollout._sampling import inverse_cdf

    for size in (50, 1000, 1023):
        drawn = inverse_cdf(torch.full((2, size), torch.nan), torch.tensor([0.1, 0.9]))
        assert bool((drawn < size).all())
