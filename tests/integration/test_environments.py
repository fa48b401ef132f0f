"""Environments in whole runs: echo is single-turn training, several turns train as their masks say, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import runs

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
        {"kl": [{"use": "in_reward", "beta": 0.1}], "reference": "frozen"},
        {"filters": [{"use": "zero_variance", "resample": 2}]},
        {"update": {"attention": "padded"}},
        {"policy_loss": "gspo"},
    ],
    ids=["critic", "kl", "resampled", "padded", "gspo"],
)
def test_several_turns_train_with_everything_that_reads_masks(parts: dict[str, Any], tmp_path: Path) -> None:
    made = several_turns(tmp_path, **parts)
    assert len(runs.entries(made)) == 2


def test_packed_and_padded_rows_of_several_turns_give_the_same_parameters(tmp_path: Path) -> None:
    one, other = (several_turns(tmp_path / x, update={"attention": x}) for x in ("packed", "padded"))
    torch.testing.assert_close(runs.parameters(one), runs.parameters(other), rtol=0, atol=1e-6)
