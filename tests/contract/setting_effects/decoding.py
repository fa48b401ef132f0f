"""Two values of each setting with which `generate` decodes otherwise."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor

from hf_rlhf import load_plugin
from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import tiny_policy
from tests.contract.setting_effects.base import EFFECTS, SAMPLERS, SettingEffect, samples


class Suppress(LogitsProcessor):
    """Lets nothing through but the end of sequence."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(1), 0.0)


DECODING = {
    "stop_strings": ([], list("0123456789abcdefghijklm")),
    "generation_kwargs": ({}, {"suppress_tokens": list(range(2, 50))}),
    "logits_processors": ([], [f"{__name__}:Suppress"]),
}
for engine in SAMPLERS:
    for setting, values in DECODING.items():
        EFFECTS[f"rollout.{engine}.{setting}"] = SettingEffect(
            *values, lambda folder, value, name=engine, s=setting: samples(name, s, value)
        )


def reported(engine: str, dtype: str) -> Any:
    """The log-probs with which completions are drawn."""
    model, tokenizer = tiny_policy()
    policy = Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"), wants_logps=True)
    chosen = load_plugin("rollout", engine, max_new_tokens=6, decode_dtype=dtype)
    with seeded(0, "effect"), torch.no_grad():
        return chosen(policy, [Prompt(ids=[5, 6], prompt="")], 2, temperature=1.0).logps


for engine in SAMPLERS:
    EFFECTS[f"rollout.{engine}.decode_dtype"] = SettingEffect(
        "same", "bfloat16", lambda folder, value, name=engine: reported(name, value)
    )


def decoded(engine: str, kernel: str) -> Any:
    """The kernel that has decoded."""
    model, tokenizer = tiny_policy()
    chosen = load_plugin("rollout", engine, max_new_tokens=6, kernel=kernel)
    policy = Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"))
    chosen(policy, [Prompt(ids=[5, 6], prompt="")], 2, temperature=1.0)
    return chosen.settled()


for engine in SAMPLERS:
    EFFECTS[f"rollout.{engine}.kernel"] = SettingEffect(
        "auto", "model", lambda folder, value, name=engine: decoded(name, value)
    )
