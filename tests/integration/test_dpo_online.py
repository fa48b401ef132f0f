"""advantages.online_dpo: the gradient of DPO's loss over pairs of a rollout, however its rows are split."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Scored
from hf_rlhf.testing import scored
from tests.helpers import stepping

BETA = 0.3


def rollout(totals: list[float], sizes: tuple[int, ...] = (4, 3, 2)) -> Scored:
    """Random rows whose only rewards are `totals`, each at its row's first token of the policy's."""
    drawn = scored(group_sizes=sizes, scores=None, kl_penalties=None, sum_sq_probs=None, greedy=None)
    first = drawn.mask.cumsum(1).eq(1) * drawn.mask
    return dataclasses.replace(drawn, token_rewards=first * torch.tensor(totals).double().unsqueeze(1))


def loss_of_pairs(d: Tensor, batch: Scored, totals: list[float], loss_type: str, pairs: str) -> Tensor:
    """The mean over prompts, weighed by their rows, of the mean loss of a prompt's pairs; by loops."""
    total = d.new_zeros(())
    for group in batch.group_ids.unique():
        rows = [i for i in range(len(totals)) if batch.group_ids[i] == group]
        best, worst = max(totals[i] for i in rows), min(totals[i] for i in rows)
        found = []
        for w in rows:
            for l in rows:  # noqa: E741
                if totals[w] > totals[l] and (pairs == "all" or (totals[w], totals[l]) == (best, worst)):
                    x = d[w] - d[l]
                    found.append(-(BETA * x).sigmoid().log() if loss_type == "sigmoid" else (x - 1 / (2 * BETA)) ** 2)
        if found:
            total = total + torch.stack(found).mean() * len(rows) / len(totals)
    return total


SCORES = {
    "distinct": [3.0, 1.0, 2.0, 0.5, -1.0, 4.0, 2.0, 7.0, 6.0],
    "ties": [1.0, 0.0, 0.0, 1.0, 2.0, 1.0, 0.0, 5.0, 5.0],
    "one prompt without a difference": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
}


@pytest.mark.proves("advantages.online_dpo", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("pairs", ["best_worst", "all"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_policy_gradient_is_that_of_the_pairs_loss(scores, pairs, loss_type):
    totals = SCORES[scores]
    batch = rollout(totals)
    assert batch.old_logps is not None
    assert batch.ref_logps is not None
    estimator = load_plugin("advantages", "online_dpo", beta=BETA, loss_type=loss_type, pairs=pairs)
    logps = batch.old_logps.clone().requires_grad_()
    d = ((logps - batch.ref_logps) * batch.mask).sum(1)
    (wanted,) = torch.autograd.grad(loss_of_pairs(d, batch, totals, loss_type, pairs), logps)
    weights = load_plugin("aggregation", "seq_mean_token_sum")(batch.mask)
    loss, _ = load_plugin("policy_loss", "reinforce")(logps, batch.old_logps, estimator(batch), batch.mask)
    (found,) = torch.autograd.grad((loss * weights).sum(), logps)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_at_the_start_the_best_and_the_worst_have_beta_over_2_times_the_rows():
    batch = rollout(SCORES["distinct"])
    found = load_plugin("advantages", "online_dpo", beta=BETA)(dataclasses.replace(batch, ref_logps=batch.old_logps))
    sides = [1, 0, 0, -1, -1, 1, 0, 1, -1]
    rows = [4, 4, 4, 4, 3, 3, 3, 2, 2]
    wanted = torch.tensor([BETA / 2 * side * n for side, n in zip(sides, rows, strict=True)]).double()
    torch.testing.assert_close(found, wanted.unsqueeze(1) * batch.mask)


def test_equal_scores_teach_nothing():
    found = load_plugin("advantages", "online_dpo")(rollout([0.2] * 9))
    assert torch.equal(found, torch.zeros_like(found))


def test_a_kl_in_the_reward_does_not_choose_the_pairs():
    batch = rollout(SCORES["distinct"])
    moved = dataclasses.replace(batch, kl_penalties=batch.mask * 3, token_rewards=batch.token_rewards - batch.mask * 3)
    estimator = load_plugin("advantages", "online_dpo")
    assert torch.equal(estimator(batch), estimator(moved))


ALGORITHM: dict[str, Any] = {
    "advantages": {"use": "online_dpo", "beta": 0.5},
    "policy_loss": "reinforce",
    "aggregation": "seq_mean_token_sum",
    "reference": "frozen",
}


def test_a_pair_whose_rows_are_in_different_micro_batches_makes_the_same_steps(tmp_path):
    def moved(**training: Any) -> Tensor:
        spec = {"output_dir": str(tmp_path / "out"), "algorithm": ALGORITHM, "update": {"mini_batches": 1, "epochs": 1},
                "training": {"max_steps": 3, **training}}  # fmt: skip
        return stepping.run(spec) - stepping.parameters(stepping.make_trainer(spec))

    whole, rows = moved(), moved(per_device_train_batch_size=1)
    assert whole.norm() > 1e-5
    assert (whole - rows).norm() < 1e-6 * whole.norm()


def test_more_steps_per_rollout_are_remarked_on():
    from hf_rlhf.config.recipe import load_recipe

    one, two = (load_recipe("online_dpo", [f"update.epochs={n}"]).algorithm() for n in (1, 2))
    estimator = load_plugin("advantages", "online_dpo")
    assert list(estimator.remarks(one)) == []
    assert "keep the weights" in next(iter(estimator.remarks(two)))
