"""token_entropy: which tokens keep their gradient, and that nothing but the entropies of the step decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.conformance.tensor_inputs import draw_tensors
from tests.helpers import runs
from tests.unit.plugins.test_losses import ADVANTAGES, RATIO

ENTROPY = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.9], [0.2, 0.5, 7.0, 0.4, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.float64)


def chosen(fraction: float, mask: torch.Tensor = MASK) -> list[list[float]]:
    plugin = load_plugin("policy_loss", "token_entropy", fraction=fraction)
    return plugin.select(ENTROPY * 0, ENTROPY * 0, mask, old_entropy=ENTROPY).tolist()


@pytest.mark.proves("policy_loss.token_entropy", how="closed form", tolerance="exact")
@pytest.mark.parametrize(
    ("fraction", "rows"),
    [
        (0.01, [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]),  # one token, and the tie with it
        (0.25, [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]),
        (0.375, [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]]),
        (1.0, MASK.tolist()),
    ],
)
def test_the_tokens_of_highest_entropy_are_selected_with_ties_and_without_padding(fraction, rows):
    assert chosen(fraction) == rows


def test_without_a_token_nothing_is_selected():
    assert chosen(0.5, MASK * 0) == (MASK * 0).tolist()


@pytest.mark.parametrize(
    "inner", ["ppo_clip", "gspo", "vespo", "sapo", {"use": "dppo_tv", "anchor": "sampler"}], ids=str
)
def test_it_is_the_inner_loss_on_the_selected_tokens_and_0_elsewhere(inner):
    plugin = load_plugin("policy_loss", "token_entropy", loss=inner)
    t = {**draw_tensors(), "total_score": draw_tensors(seed=1)["score"]}
    selected = (t["old_entropy"] > 0.4).double() * t["mask"]
    arguments = (t["logps"], t["old_logps"], t["advantages"], t["mask"])
    alone, _ = plugin.loss(*arguments, **{name: t[name] for name in plugin.loss.needs - {"old_logps"}})
    extras = {name: t[name] for name in plugin.needs - {"old_logps", "selected"}}
    got, metrics = plugin(*arguments, selected=selected, **extras)
    assert torch.equal(got, alone * selected)
    assert torch.equal(metrics["selected_frac"], selected)
    assert plugin.token_level == plugin.loss.token_level
    assert plugin.zero_without_advantage == plugin.loss.zero_without_advantage


@pytest.mark.parametrize("inner", ["clip_cov", "kl_cov", "token_entropy"])
def test_a_loss_with_a_selection_of_its_own_is_refused(inner, tmp_path):
    with pytest.raises(ValueError, match=f"loss={inner} selects tokens of its own"):
        runs.trainer(tmp_path, policy_loss={"use": "token_entropy", "loss": inner})


ROLLOUT = {"use": "generate", "prompts": 4, "num_generations": 3, "max_new_tokens": 6, "temperature": 0.7}


def trainer(folder: Path, rows: int, **parts: Any) -> Any:
    loss = {"use": "token_entropy", "fraction": 0.3, "loss": {"use": "ppo_clip", "epsilon_high": 0.3}}
    return runs.trainer(
        folder,
        rollout=ROLLOUT,
        loss_terms=["entropy"],  # no row is skipped in the update
        policy_loss=loss,
        dtype=torch.float64,
        training={"per_device_train_batch_size": rows, "max_steps": 4},
        **{"update": {"mini_batches": 2, "epochs": 2}, **parts},
    )


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_threshold_is_over_the_whole_step_with_entropies_at_rollout_time(rows, tmp_path):
    """Entropies from the model's own logits; the selection of each of four steps, in micro-batches of any size."""
    made = trainer(tmp_path, rows)
    made.buffer = made.collector.collect(0)
    buffer = made.buffer
    entropy = []
    for prompt, completion in zip(buffer.prompt_ids, buffer.completion_ids, strict=True):
        with torch.no_grad():
            logits = made.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / ROLLOUT["temperature"]).log_softmax(-1)
        entropy.append(-(logps.exp() * logps).sum(-1))
    for position in range(4):
        step = buffer.step_rows(position, made.algorithm, made.args.seed).tolist()
        ordered = torch.cat([entropy[i] for i in step]).sort(descending=True).values
        threshold = ordered[round(0.3 * len(ordered)) - 1] - 1e-9
        batching = made.collector.forwards.batching
        seen = set()
        for micro in buffer.slot(position, made.algorithm, made.args.seed, batching):
            for row, selected in zip(micro["row"].tolist(), micro["selected"], strict=True):
                want = (entropy[row] >= threshold).double()
                assert torch.equal(selected[: len(want)], want)
                assert not selected[len(want) :].any()
                seen.add(row)
        assert seen == set(step)
    made.close()


def test_every_token_selected_is_the_inner_loss_to_the_bit(tmp_path):
    def after(name: str, loss: Any) -> torch.Tensor:
        made = runs.trained(tmp_path / name, policy_loss=loss, dtype=torch.float64, training={"max_steps": 4})
        return runs.parameters(made)

    whole = {"use": "token_entropy", "fraction": 1.0, "loss": "dual_clip"}
    some = {**whole, "fraction": 0.3}
    assert torch.equal(after("whole", whole), after("inner", "dual_clip"))
    assert not torch.equal(after("some", some), after("again", "dual_clip"))


def test_closed_forms_are_those_of_one_step():
    plugin = load_plugin("policy_loss", "token_entropy", fraction=0.2, loss="surrogate")
    old = torch.full_like(RATIO, -1.5)
    selected = plugin.select(old, ADVANTAGES, torch.ones_like(RATIO), old_entropy=ENTROPY)
    loss, _ = plugin(old + RATIO.log(), old, ADVANTAGES, torch.ones_like(RATIO), selected=selected, old_entropy=ENTROPY)
    want = torch.zeros_like(RATIO)
    want[1, 2], want[0, 1], want[0, 4] = 2.0, -1.8, -3.0
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
