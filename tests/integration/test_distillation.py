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


def step(
    estimator: dict[str, Any], rows: list[tuple[list[int], list[int]]], behind: list[list[int]] | None = None
) -> Tensor:
    """The parameters after a step of 0.1 along the gradient of the mean divergence over the rows' tokens. `behind`: the
    prompts that the teacher reads."""
    policy, _ = tiny_policy(dtype=torch.float64)
    teacher, _ = tiny_policy(seed=1, dtype=torch.float64)
    measure, values = (
        load_plugin("kl_estimator", estimator["use"], **{k: v for k, v in estimator.items() if k != "use"}),
        [],
    )
    for i, (prompt, completion) in enumerate(rows):
        own, its = (
            model(input_ids=torch.tensor([start + completion])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            for model, start in ((policy, prompt), (teacher, behind[i] if behind else prompt))
        )
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


def given(estimator: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """One step over one completion of the dataset for each prompt."""
    return {
        "data": runs.problems(count=4),
        "dtype": torch.float64,
        "training": {"max_steps": 1},
        **runs.DISTILLED,
        "rollout": {**runs.DISTILLED["rollout"], "share": 0.0, "num_generations": 1},
        "kl": [{"use": "in_loss", "estimator": estimator, "beta": 1.0}],
        "reference": Teacher(),
        "update": {"mini_batches": 1},
        **parts,
    }


def rows_of(data: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    _, tokenizer = tiny_policy()
    answers = [tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in data]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in data]
    return [(prompt, [*answer, tokenizer.eos_token_id][:5]) for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.mark.proves("rollout.mixed", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_step_over_the_datasets_completions_follows_the_divergence(tmp_path: Path, estimator: dict[str, Any]):
    options = given(estimator)
    made = runs.trained(tmp_path, **options)
    torch.testing.assert_close(runs.parameters(made), step(estimator, rows_of(options["data"])), rtol=0, atol=1e-12)
    assert (runs.parameters(made) - runs.parameters(tiny_policy(dtype=torch.float64)[0])).abs().max() > 1e-4


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("estimator", [{"use": "exact"}, {"use": "forward", "top_k": 3}], ids=str)
def test_a_teacher_behind_another_prompt_leaves_the_policys_prompt_as_it_is(
    tmp_path: Path, estimator: dict[str, Any], nested: bool
):
    """Also as the recipe's own reference."""
    context = load_plugin("reference", "with_context", of=Teacher(), context="answer", template="{context} {prompt}")
    kl = {"use": "in_loss", "estimator": estimator, "beta": 1.0, **({"reference": context} if nested else {})}
    options = given(estimator, kl=[kl], reference="none" if nested else context)
    _, tokenizer = tiny_policy()
    behind = [tokenizer(f"{row['answer']} {row['prompt']}")["input_ids"] for row in options["data"]]
    want = step(estimator, rows_of(options["data"]), behind)
    torch.testing.assert_close(runs.parameters(runs.trained(tmp_path, **options)), want, rtol=0, atol=1e-12)
