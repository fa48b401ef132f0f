"""What only a GPU can show: its kernels compute what plain forwards compute, and runs there fit, repeat and resume.

`TEST_GPU_DEVICE=cpu` rehearses the tests on a CPU, all but those of the compiled FlexAttention.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import memory
from hf_rlhf import load_plugin
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.lm_head import Head, TokenStatistics, score
from hf_rlhf.modeling.policy import ActorCritic, Policy, why_not_packed
from hf_rlhf.modeling.token_batch import Attention, TokenBatch
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.micro_batches import choose_attention
from tests.helpers import runs

DEVICE = torch.device(os.environ.get("TEST_GPU_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CUDA and not torch.cuda.is_available(), reason="torch sees no GPU: run `make test-gpu` where it sees one"
    ),
]
compiled = pytest.mark.skipif(not CUDA, reason="FlexAttention has no backward on a CPU")
HERE = {"use_cpu": not CUDA}
KL = {"kl": [{"use": "in_loss", "estimator": "k3", "beta": 0.1}], "reference": "frozen"}
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def qwen() -> Any:
    """A Qwen3 of four layers with random weights, whose distributions are far from uniform."""
    _, tokenizer = tiny_policy()
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def rows(attention: Attention, seed: int = 0) -> TokenBatch:
    """Twelve completions of up to 200 tokens behind three prompts."""
    draw = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (1,), generator=draw))
        return torch.randint(3, 500, (length,), generator=draw).tolist()

    prompts = [prompt for prompt in (ids(150), ids(40), ids(90)) for _ in range(4)]
    completions = [ids(200) for _ in prompts]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in completions], batch_first=True)
    return TokenBatch(prompts, completions, mask.to(DEVICE), 0, attention)


def log_probs(model: Any, attention: Attention, dtype: torch.dtype) -> list[Tensor]:
    """The log-probs of `rows`, and their gradient by each parameter."""
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        found = ActorCritic(model, None, 1.0)(rows(attention))["logps"]
    trained = list(model.parameters())
    return [found.detach(), *torch.autograd.grad(found.sum(), trained, materialize_grads=True, allow_unused=True)]


# The own loop


def test_the_own_loop_samples_with_the_log_probs_of_a_plain_forward():
    model, (_, tokenizer) = qwen().to(DEVICE), tiny_policy()
    engine = load_plugin("rollout", "generate", max_new_tokens=64)
    policy = Policy(model=model, tokenizer=tokenizer, device=DEVICE, wants_logps=True)
    prompts = [Prompt(ids=[(7 * i + 3 * k) % 500 for k in range(5 + 9 * i)], prompt="") for i in range(4)]
    with torch.no_grad():
        with seeded("gpu", 0):
            found = engine(policy, prompts, 8)
        with seeded("gpu", 0):
            assert engine(policy, prompts, 8).ids == found.ids
    assert len({tuple(ids) for ids in found.ids}) > 16
    for i, (ids, logps) in enumerate(zip(found.ids, found.logps, strict=True)):
        before = prompts[i // 8].ids
        with torch.no_grad():
            logits = model(torch.tensor([before + ids], device=DEVICE)).logits[0, len(before) - 1 : -1]
        due = logits.log_softmax(-1).cpu().gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), due, rtol=0, atol=1e-3)


# The update


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("attention", ["packed", pytest.param("flex", marks=compiled)])
def test_layouts_give_the_log_probs_and_gradients_of_padded_rows(attention, dtype):
    model = qwen().to(DEVICE)
    found, due = log_probs(model, attention, dtype), log_probs(model, "padded", dtype)
    assert (found[0] - due[0]).abs().max() < ROUNDING[dtype] * due[0].abs().max()
    for x, y in zip(found[1:], due[1:], strict=True):
        assert (x - y).norm() < 2 * ROUNDING[dtype] * y.norm()


@compiled
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_auto_is_the_compiled_flex_attention(dtype):
    model = qwen().to(DEVICE)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        assert why_not_packed(model, "flex") is None
        assert choose_attention(runs.recipe().algorithm(), model) == "flex"


@compiled
def test_flex_attention_is_not_compiled_again_for_each_length():
    from torch._dynamo.utils import counters

    module = ActorCritic(qwen().to(DEVICE), None, 1.0)
    graphs = []
    for seed in range(8):
        module(rows("flex", seed))["logps"].sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_tiles_of_the_head_give_what_the_whole_logits_give(dtype):
    draw = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(128, 20_000, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.1, generator=draw)
    linear = linear.to(DEVICE)
    states = torch.randn(700, 128, generator=draw).to(DEVICE).requires_grad_()
    targets = torch.randint(20_000, (700,), generator=draw).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        found = score(Head(linear), states, targets, 0.9, TokenStatistics(entropy=True))
    whole = (torch.nn.functional.linear(states, linear.weight) / 0.9).log_softmax(-1)
    due = {"logps": whole.gather(1, targets[:, None])[:, 0], "entropy": -(whole.exp() * whole).sum(-1)}
    for name, x in due.items():
        assert (found[name] - x).abs().max() < ROUNDING[dtype] * x.abs().max()
    pairs = zip(*(torch.autograd.grad(x["logps"].sum(), [states, linear.weight]) for x in (found, due)), strict=True)
    for x, y in pairs:
        assert (x - y).norm() < 2 * ROUNDING[dtype] * y.norm()


# Runs


def run(folder: Path, training: dict[str, Any] | None = None, resume: bool | None = None, **parts: Any) -> Any:
    """A trainer after four optimizer steps on sampled completions."""
    made = runs.trainer(
        folder,
        training={"max_steps": 4, "learning_rate": 1e-3, "optim": "adamw_torch", **HERE, **(training or {})},
        **{"policy": qwen(), "rollout": {**runs.SAMPLED, "max_new_tokens": 24}, **parts},
    )
    made.train(resume_from_checkpoint=resume)
    made.close()
    return made


def test_bfloat16_trains_on_the_ratios_of_its_own_rounding(tmp_path):
    made = run(tmp_path, {"bf16": True}, **KL)
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in logged)
    assert abs(logged[0]["policy/ratio"] - 1) < 0.02
    assert made.model.device.type == DEVICE.type


def test_every_model_of_a_run_is_on_the_device(tmp_path):
    """A critic, a reference and a reward model, whose state is in main memory while it is not read."""
    judge = {"use": "reward_model", "model": runs.save_classifier(tmp_path / "judge"), "offload": True}
    parts: dict[str, Any] = {"advantages": "gae", "critic": "separate", "rewards": [judge], **KL}
    parts["update"] = {"mini_batches": 2, "offload": True}
    made = run(tmp_path / "run", policy=tiny_policy()[0], **parts)
    again = run(tmp_path / "again", policy=tiny_policy()[0], **{**parts, "update": {"mini_batches": 2}})
    torch.testing.assert_close(runs.parameters(made), runs.parameters(again), rtol=0, atol=1e-6)
    assert {x.device.type for x in made.actor_critic.parameters()} == {DEVICE.type}


def test_the_forecast_of_memory_is_what_a_run_measures(tmp_path):
    found = memory.run_case({"training": HERE}, str(tmp_path))
    apart = 1.5 if CUDA else 3.0  # on a CPU the C library keeps what is freed
    for phase, forecast in found["forecast"].items():
        assert 1 / apart < forecast / found["measured"][phase] < apart, (phase, found)


def test_a_run_resumes_to_the_bit(tmp_path, monkeypatch):
    """Under deterministic algorithms: CUDA adds the gradients of shared prompts in any order otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        saved = {"save_strategy": "steps", "save_steps": 2}
        whole = run(tmp_path / "run", saved, **KL)
        (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
        resumed = run(tmp_path / "again", saved, resume=str(tmp_path / "checkpoint-2"), **KL)
        assert torch.equal(runs.parameters(whole), runs.parameters(resumed))
    finally:
        torch.use_deterministic_algorithms(before)
