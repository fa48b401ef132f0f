"""Runs without a reward, towards a teacher: the gradient of a step is that of the divergence over the states of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.axes import Reference
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs


@dataclass(kw_only=True)
class Teacher(Reference):
    """Another model."""

    name = "teacher"

    def build(self, policy: Any) -> Any:
        model, _ = tiny_policy(seed=1, dtype=torch.float64)
        return model.eval().requires_grad_(False)


def step(estimator: dict[str, Any], rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """The parameters after a step of 0.1 along the gradient of the mean divergence over the rows' tokens."""
    policy, _ = tiny_policy(dtype=torch.float64)
    teacher, _ = tiny_policy(seed=1, dtype=torch.float64)
    measure, values = (
        load_plugin("kl_estimator", estimator["use"], **{k: v for k, v in estimator.items() if k != "use"}),
        [],
    )
    for prompt, completion in rows:
        ids, at = torch.tensor([prompt + completion]), slice(len(prompt) - 1, -1)
        own, its = (model(input_ids=ids).logits[0, at].log_softmax(-1) for model in (policy, teacher))
        values.append(measure(own, its.detach()))
    torch.cat(values).mean().backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 0.1 * parameter.grad
    return runs.parameters(policy)


ESTIMATORS = [
    {"use": "exact"},
    {"use": "forward"},
    {"use": "jsd", "beta": 0.3},
    {"use": "jsd", "beta": 0.9, "normalize": True},
    {"use": "exact", "top_k": 3},
    {"use": "jsd", "top_k": 5},
]


@pytest.mark.proves("rollout.mixed", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_step_over_the_datasets_completions_follows_the_divergence(tmp_path: Path, estimator: dict[str, Any]):
    data = runs.problems(count=4)
    made = runs.trained(
        tmp_path,
        data=data,
        dtype=torch.float64,
        **{
            **runs.DISTILLED,
            "rollout": {**runs.DISTILLED["rollout"], "share": 0.0, "num_generations": 1},
            "kl": [{"use": "in_loss", "estimator": estimator, "beta": 1.0}],
            "reference": Teacher(),
            "update": {"mini_batches": 1},
        },
        training={"max_steps": 1},
    )
    _, tokenizer = tiny_policy()
    rows = [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["answer"], add_special_tokens=False)["input_ids"])
        for row in data
    ]
    want = step(estimator, [(prompt, [*answer, tokenizer.eos_token_id][:5]) for prompt, answer in rows])
    torch.testing.assert_close(runs.parameters(made), want, rtol=0, atol=1e-12)
    assert (runs.parameters(made) - runs.parameters(tiny_policy(dtype=torch.float64)[0])).abs().max() > 1e-4
