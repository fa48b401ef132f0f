"""PPO-ptx in a run: beside the texts it keeps what the policy knows of them, and the reward goes up alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.testing import tiny_policy
from tests.helpers import runs
from tests.helpers.paths import DATA

EOS, LINES = 1, 200
"""Of the file's lines the first are trained on, and those after them are held out."""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return (DATA / "shakespeare.txt").read_text().splitlines()


def batch_of(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = tiny_policy()[1]
    rows = [[*ids, EOS] for ids in tokenizer(texts)["input_ids"]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()


def next_token_loss(model: Any, texts: list[str]) -> torch.Tensor:
    """Mean over the tokens of all texts but their first, in nats."""
    ids, mask = batch_of(texts)
    loss: torch.Tensor = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    return loss


@pytest.fixture(scope="module")
def weights(lines: list[str]) -> dict[str, torch.Tensor]:
    """A policy that has read some Shakespeare."""
    model = tiny_policy()[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    for _ in range(120):
        chosen = torch.randint(LINES, (32,), generator=draw).tolist()
        next_token_loss(model, [lines[i] for i in chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def trained(
    folder: Path, weights: dict[str, torch.Tensor], lines: list[str], coef: float | None
) -> tuple[float, float, float]:
    """The loss on held-out lines after reinforcement learning, and the mean reward of the first and the last rollouts."""
    folder.mkdir()
    (folder / "texts.txt").write_text("\n".join(lines[:LINES]) + "\n")
    (folder / "letter.py").write_text(
        "def letter(completions):\n    return [text.count('e') / 8 for text in completions]\n"
    )
    policy = tiny_policy()[0]
    policy.load_state_dict(weights)
    term = {"use": "ptx", "path": str(folder / "texts.txt"), "rows": 16, "max_tokens": 128}
    made = runs.trained(
        folder,
        policy=policy,
        data=[{"prompt": f"{a}+{b}="} for a in range(10, 18) for b in range(10, 14)],
        rollout={"use": "generate", "prompts": 8, "num_generations": 4, "max_new_tokens": 8},
        rewards=[{"use": "function", "function": f"{folder}/letter.py:letter"}],
        advantages="leave_one_out",
        policy_loss="reinforce",
        loss_terms=[] if coef is None else [{**term, "coef": coef}],
        update={"mini_batches": 1},
        training={"max_steps": 60, "optim": "adamw_torch", "learning_rate": 5e-3},
    )
    rewards = [entry["reward/total/mean"] for entry in runs.entries(made)]
    with torch.no_grad():
        loss = next_token_loss(made.model.eval(), lines[LINES:]).item()
    return loss, sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5


@pytest.mark.proves("loss_terms.ptx", how="end to end", tolerance="2 nats per token")
def test_with_ptx_the_loss_on_shakespeare_stays_low_while_the_reward_goes_up_alike(
    lines: list[str], weights: dict[str, torch.Tensor], tmp_path: Path
):
    policy = tiny_policy()[0]
    policy.load_state_dict(weights)
    with torch.no_grad():
        before = next_token_loss(policy, lines[LINES:]).item()
    loss, first, last = trained(tmp_path / "with", weights, lines, coef=1.0)
    loss_without, first_without, last_without = trained(tmp_path / "without", weights, lines, coef=None)
    assert loss < before + 0.2
    assert loss_without > loss + 2
    for one, other in ((first, last), (first_without, last_without)):
        assert other > one + 0.5
    assert abs(last - last_without) < 0.15
