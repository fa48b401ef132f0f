"""A KL in the loss to the base with its adapter off takes hardly more memory than no reference at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import lora_memory
from hf_rlhf.config.recipe import resolve
from hf_rlhf.contract.model_settings import Lora, Model

pytest.importorskip("peft")

LIMIT = lora_memory.LIMIT


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The folder of a configuration of 110 M parameters; there are no weights."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("config")
    sizes = {"hidden_size": 1536, "num_hidden_layers": 3, "intermediate_size": 6144}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    Qwen2Config(
        **sizes, **heads, vocab_size=4096, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"]
    ).save_pretrained(folder)
    return folder


def expected(config: Path, **parts: Any) -> float:
    """MiB that the largest phase of a run is forecast to hold."""
    from transformers import TrainingArguments

    from hf_rlhf.training.memory.estimate import estimate

    raw = {
        "rollout": {"use": "generate", "prompts": 2, "num_generations": 4, "max_new_tokens": 16},
        "rewards": [{"use": "format", "pattern": ".*[02468]"}],
        "advantages": "group_norm",
        "update": {"max_tokens_per_micro_batch": 512},
        **parts,
    }
    args = TrainingArguments("nowhere", use_cpu=True, report_to="none")
    found = estimate(Model(path=str(config), lora=Lora()), resolve(raw).algorithm(), args, prompt_tokens=24)
    assert {"rollout", "update"} <= found.phases.keys()
    return max(sum(phase.values()) for phase in found.phases.values())


def test_the_plan_of_a_model_of_100_m_parameters_stays_below_the_limit(config):
    none, off = (expected(config, **lora_memory.KINDS[kind]) for kind in ("none", "adapter_off"))
    whole = 110e6 * 4 / 2**20
    assert none > whole
    assert off < LIMIT * none
    assert none + whole > LIMIT * none, "a second model would be above it"


@pytest.mark.slow
def test_the_process_stays_below_the_limit():
    none, off = (lora_memory.in_own_process(kind, "exact", "small") for kind in ("none", "adapter_off"))
    assert off["process"] < LIMIT * none["process"]
    assert off["above"] < LIMIT * none["above"]
