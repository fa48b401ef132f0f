"""`update.old_logps`: where the log-probs of the policy that sampled come from."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.helpers import runs, stepping

CORRECTED = {"rollout_correction": {"use": "truncated", "c": 1.5}}


def run(folder: Any, source: str, algorithm: dict[str, Any], **training: Any) -> tuple[torch.Tensor, Any, list[int]]:
    """The parameters after one step per rollout on scripted log-probs, the trainer, and the forwards without a gradient."""
    spec = {"output_dir": str(folder / source), "algorithm": algorithm, "training": {"max_steps": 3, **training}}
    trainer = stepping.make_trainer({**spec, "update": {"old_logps": source}})
    plain: list[int] = []
    trainer.actor_critic.register_forward_hook(lambda *_: plain.append(1) if not torch.is_grad_enabled() else None)
    trainer.train()
    return stepping.parameters(trainer), trainer, plain


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_lazy_saves_the_forward_and_corrects_in_the_loss_to_the_same_parameters(level, tmp_path):
    algorithm = {"rollout_correction": {"use": "truncated", "c": 1.5, "level": level}}
    algorithm |= {"kl": [{"use": "in_loss"}], "reference": "frozen"}  # with which no row is left out of the update
    due, one, forwards = run(tmp_path, "trainer", algorithm, per_device_train_batch_size=5)
    found, other, none = run(tmp_path, "lazy", algorithm, per_device_train_batch_size=5)
    begin = stepping.parameters(
        stepping.make_trainer({"output_dir": str(tmp_path / "x"), "algorithm": {}, "update": {}})
    )
    assert len(forwards) > 0
    assert none == []
    assert (found - due).norm() <= 1e-12 * (due - begin).norm()
    logged = [{k: x for k, x in entry.items() if "is_ratio" in k or "gap" in k} for entry in other.state.log_history]
    for mine, theirs in zip(logged, one.state.log_history, strict=True):
        assert mine == pytest.approx({name: theirs[name] for name in mine})
    assert {"rollout/is_ratio/mean", "rollout/sampler_gap/mean", "rollout/sampler_gap/beyond_clip"} <= logged[0].keys()


def test_with_the_samplers_the_ratio_of_the_loss_is_the_correction(tmp_path):
    """Unclipped, its gradient is that of a correction that nothing truncates."""
    wide = {"policy_loss": {"use": "ppo_clip", "epsilon_low": 0.999999, "epsilon_high": 1e9}}
    corrected = {**wide, "rollout_correction": {"use": "truncated", "c": 1e9}}
    due, _, forwards = run(tmp_path, "trainer", corrected)
    found, trainer, none = run(tmp_path, "sampler", wide)
    begin = stepping.parameters(
        stepping.make_trainer({"output_dir": str(tmp_path / "x"), "algorithm": {}, "update": {}})
    )
    assert len(forwards) > 0
    assert none == []
    assert (found - due).norm() <= 1e-12 * (due - begin).norm()
    assert abs(trainer.state.log_history[0]["policy/ratio"] - 1) > 0.1


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"update": {"old_logps": "lazy", "epochs": 2}}, "needs one optimizer step per rollout, got 2"),
        (
            {"update": {"old_logps": "lazy"}, "reference": "frozen", "kl": ["in_reward"]},
            r"kl\.in_reward in the reward reads them before it\. Set update\.old_logps=auto",
        ),
        ({"update": {"old_logps": "sampler"}}, "log-probs that rollout=scripted does not report"),
        (
            {"update": {"old_logps": "sampler"}, "rollout": runs.SAMPLED, **CORRECTED},
            r"rollout_correction=truncated would correct again\. Set rollout_correction\.use=none",
        ),
    ],
)
def test_a_source_that_cannot_serve_is_refused_with_the_reason(parts, match):
    assert re.search(match, "; ".join(runs.recipe(**parts).algorithm().problems()))
