"""Environments in whole runs: echo is single-turn training, several turns train as their masks say, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import runs
from tests.helpers.environments import ReadsTurns

ECHO = [{"use": "echo", "max_tokens": 16}]
TWICE = [{"use": "second_chance", "max_tokens": 32, "says": "no {prompt}"}]


@pytest.mark.proves("environment.echo", how="parity", tolerance="0")
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"rollout_correction": "truncated", "update": {"mini_batches": 2, "epochs": 2}},
        {"advantages": "gae", "critic": "value_head"},
        {"advantages": {"use": "baseline", "baseline": "greedy"}},
        {"filters": [{"use": "zero_variance", "resample": 2}]},
    ],
    ids=["grpo", "corrected", "critic", "greedy", "resampled"],
)
def test_training_through_echo_is_bit_identical_to_single_turn_training(parts: dict[str, Any], tmp_path: Path) -> None:
    plain = runs.trained(tmp_path / "plain", rollout=runs.SAMPLED, **parts)
    echo = runs.trained(tmp_path / "echo", rollout=runs.SAMPLED, environment=ECHO, **parts)
    assert torch.equal(runs.parameters(plain), runs.parameters(echo))
    for one, other in zip(runs.entries(plain), runs.entries(echo), strict=True):
        for name in ("reward/total/mean", "rollout/length/mean", "loss", "grad_norm"):
            assert one.get(name) == other.get(name)
    assert runs.entries(echo)[0]["environment/turns/mean"] == 1


def several_turns(folder: Path, **parts: Any) -> Any:
    rollout = {**runs.SAMPLED, "max_new_tokens": 3}
    return runs.trained(folder, rollout=rollout, environment=TWICE, rewards=["episode", runs.FORMAT], **parts)


def test_log_probs_of_sampler_and_trainer_agree_over_several_turns(tmp_path: Path) -> None:
    made = several_turns(tmp_path, rollout_correction="truncated")
    found = [entry for entry in runs.entries(made) if "rollout/rows" in entry]
    assert found
    for entry in found:
        assert entry["environment/turns/mean"] > 1.5
        assert entry["environment/tokens/mean"] > 1
        assert entry["rollout/sampler_gap/max"] <= 2e-5


@pytest.mark.parametrize(
    "parts",
    [
        {"advantages": "gae", "critic": "value_head"},
        {"advantages": "turn_gae", "critic": "value_head"},
        {"advantages": "turn_group_norm", "kl": [{"use": "in_reward", "beta": 0.1}], "reference": "frozen"},
        {"advantages": "gigpo"},
        {"kl": [{"use": "in_reward", "beta": 0.1}], "reference": "frozen"},
        {"filters": [{"use": "zero_variance", "resample": 2}]},
        {"update": {"attention": "padded"}},
        {"policy_loss": "gspo"},
    ],
    ids=["critic", "turn_gae", "turn_group_norm", "gigpo", "kl", "resampled", "padded", "gspo"],
)
def test_several_turns_train_with_everything_that_reads_masks(parts: dict[str, Any], tmp_path: Path) -> None:
    made = several_turns(tmp_path, **parts)
    assert len(runs.entries(made)) == 2


def test_estimators_see_the_turn_and_the_state_of_each_sampled_token(tmp_path: Path) -> None:
    reads = ReadsTurns()
    several_turns(tmp_path, advantages=reads, filters=[{"use": "zero_variance", "resample": 2}])
    scored = reads.seen[0]
    turns, states, mask = scored.turns, scored.states, scored.mask
    assert turns.dtype == states.dtype == torch.long
    assert torch.equal(turns >= 0, mask > 0)
    assert torch.equal(states >= 0, mask > 0)
    begins = (mask > 0) & (torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0)
    assert torch.equal(turns, (begins.cumsum(1) - 1).masked_fill(mask == 0, -1))
    assert (turns.amax(1) == 1).any()
    for group in scored.group_ids.unique():
        own = (scored.group_ids == group) & (turns >= 0).any(1)
        assert states[own][turns[own] == 0].unique().numel() == 1
        later = states[own].masked_fill(turns[own] != 1, -1).amax(1)
        assert not (later == states[own].gather(1, turns[own].clamp(min=0).argmin(1, keepdim=True)).squeeze(1)).any()


def test_the_critic_of_turn_gae_learns_at_the_first_token_of_each_turn(tmp_path: Path) -> None:
    made = several_turns(tmp_path, advantages="turn_gae", critic="value_head", update={"mini_batches": 2})
    buffer = made.collector.collect(0)
    for position in range(2):
        micros = buffer.slot(position, made.algorithm, 0, made.collector.forwards.batching)
        weights = [row for micro in micros for row in micro["value_weights"].tolist()]
        masks = [row for micro in micros for row in micro["mask"].tolist()]
        first = [[float(m > before) for m, before in zip(row, [0.0, *row], strict=False)] for row in masks]
        total = sum(map(sum, first))
        assert total > len(first)
        for own, at in zip(weights, first, strict=True):
            assert own == pytest.approx([x / total for x in at])


def test_packed_and_padded_rows_of_several_turns_give_the_same_parameters(tmp_path: Path) -> None:
    one, other = (several_turns(tmp_path / x, update={"attention": x}) for x in ("packed", "padded"))
    torch.testing.assert_close(runs.parameters(one), runs.parameters(other), rtol=0, atol=1e-6)
