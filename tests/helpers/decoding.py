"""Tiny random models of the architectures that the decode loop meets, and counters of what a rollout does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rlhf.batch import Prompt
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.testing import tiny_policy

WORDS = 99
BASE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # logits that differ much, so that a wrong token or score shows
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.25}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", BASE),
    "qwen2": ("Qwen2", BASE),
    "qwen3": ("Qwen3", BASE),
    "gemma": ("Gemma", BASE),
    "gemma2": ("Gemma2", {**BASE, "sliding_window": 6, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {**BASE, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gpt2": ("GPT2", {**GPT2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}),
    "mistral": ("Mistral", {**BASE, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", {**BASE, **EXPERTS}),
}


def tiny(name: str, seed: int = 0) -> Any:
    """A random model in evaluation mode."""
    import transformers

    family, settings = ARCHITECTURES[name]
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")(**settings)
    cls = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).eval()


def policy_of(model: Any, wants_logps: bool = True) -> Policy:
    tokenizer = tiny_policy()[1]
    return Policy(model=model, tokenizer=tokenizer, device=next(model.parameters()).device, wants_logps=wants_logps)


def prompts_of(*lengths: int, words: int = WORDS) -> list[Prompt]:
    """Prompts of these lengths, without special tokens."""
    draw = torch.Generator().manual_seed(0)
    return [Prompt(prompt="", ids=torch.randint(3, words, (n,), generator=draw).tolist()) for n in lengths]


@torch.no_grad()
def plain_logps(model: Any, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """(tokens,) log-probs by a plain forward of the whole row."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    due = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return due.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


class Synchronisations(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read, sizes that depend on numbers."""

    WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in self.WAITS
        return func(*args, **(kwargs or {}))
