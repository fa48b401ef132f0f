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

MAMBA = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
BART = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
}
BART |= {
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.25,
    "is_decoder": True,
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "embedding_size": 32,
}
ENCODER |= {"max_position_embeddings": 64, "initializer_range": 0.25, "is_decoder": True}
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "granitemoehybrid": {
        **MAMBA,
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 4,
    }
    | {"num_experts_per_tok": 2, "shared_intermediate_size": 48},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 4,
        "mamba_d_state": 8,
    }
    | {"mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
    }
    | {"n_groups": 1, "ssm_state_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"moe_shared_expert_intermediate_size": 24, "chunk_size": 8},
    "qwen3_next": {**EXPERTS, **HALF_LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
    }
    | {"num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_d_state": 8},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3, "hybrid_layer_ids": [1, 3, 5]}
    | {
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "mamba_d_state": 8,
    }
    | {"num_key_value_heads": 4, "chunk_size": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
    "minimax": {**HALF_LINEAR, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 6},
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"), BART),
    **dict.fromkeys(("pegasus", "plbart", "trocr"), BART),
    "deepseek_v4": {**EXPERTS, "sliding_window": 6, "n_routed_experts": 4, "q_lora_rank": 16, "index_n_heads": 2}
    | {"index_head_dim": 16, "index_topk": 64, "qk_rope_head_dim": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    **dict.fromkeys(("bert", "electra", "ernie", "megatron-bert", "roformer", "bert-generation"), ENCODER),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"), ENCODER),
    "xlm-roberta-xl": ENCODER,
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "n_words": WORDS},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "d_head": 8},
}
"""Types of models that the decode loop does not serve, or that are encoders, with their settings."""


def other(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random model of a type in `OTHERS`, in evaluation mode, with logits that differ much."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**BASE, **OTHERS[kind], **settings}
    known = AutoConfig.for_model(kind)
    names = {*known.to_dict(), *known.attribute_map, *OTHERS[kind], *settings}
    config = AutoConfig.for_model(kind, **{name: x for name, x in given.items() if name in names})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            if p.dim() > 1 and p.std() < 0.15:
                p.normal_(0, 0.2)
    return model.to(dtype).eval()


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
