"""Tiny models with tied and untied embeddings, and adapters of every supported method and target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_rlhf.data.adapters import add_adapter
from hf_rlhf.testing import tiny_policy

IDS = torch.tensor([[40, 41, 42, 50, 5], [60, 61, 45, 33, 6]])
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
TARGETS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 20, 21, 69]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both ends whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "norm": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}
"""Settings of `model.lora`, which are those of `LoraConfig`."""
CASES = [
    (method, target, tied)
    for method in METHODS
    for target in TARGETS
    for tied in (False, True)
    if method == "lora"
    or ((target == "experts") <= (method == "rslora") and (method == "dora" or "whole" not in target))
]
"""Of methods and targets what works (DoRA has no experts); rsLoRA is LoRA with another factor, and tried less."""


def base(tied: bool, kind: str = "llama", **config: Any) -> Any:
    """A tiny causal model in the tokens of `tiny_policy`; its padding token's embedding is 0."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = tiny_policy()[0].config
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
    }
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    size |= {name: getattr(plain, name) for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    if kind == "qwen2_moe":
        size |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CONFIG_MAPPING[kind](**size | {"tie_word_embeddings": tied} | config)
        return AutoModelForCausalLM.from_config(made).eval()


def base_of(target: str, tied: bool) -> Any:
    """The base of a case: a mixture of experts where the adapter is on experts."""
    return base(tied, "qwen2_moe" if target == "experts" else "llama")


def adapted(model: Any, method: str, target: str, **more: Any) -> Any:
    """The model with an adapter that is not 0."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=4, **METHODS[method], **TARGETS[target], **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return moved(add_adapter(model, config).eval())


def moved(model: Any, scale: float = 0.1) -> Any:
    """The same model, its trained parameters changed at random."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=draw).to(p.dtype))
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """The logits of a model in evaluation mode."""
    with torch.no_grad():
        return model.eval()(ids).logits  # type: ignore[no-any-return]
