"""Settings of a model and its adapter: the section `model` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_rlhf.contract.base import Count, HubModel, HubTokenizer, NonNegative


@dataclass(kw_only=True)
class Lora:
    """A low-rank adapter on the policy (peft's `LoraConfig`); the base model stays frozen."""

    r: Count = 16
    """Rank."""
    alpha: Count = 32
    """Scale; the adapter's output is multiplied by alpha / r (see `use_rslora`)."""
    dropout: NonNegative = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Layers with an adapter: linear ones, the head and embeddings, by the ends of their names; `all-linear` leaves the head
    out."""
    target_parameters: list[str] | None = None
    """Parameters with an adapter that are in no linear layer, such as the experts of a mixture: `mlp.experts.gate_up_proj`."""
    modules_to_save: list[str] | None = None
    """Layers of which a copy is trained whole, beside the adapter."""
    trainable_token_indices: list[int] | None = None
    """Tokens of which the embedding is trained, in a tied head as well, for instance new special tokens."""
    use_dora: bool = False
    """Train the norm of each row of the weights as well (DoRA, arXiv:2402.09353)."""
    use_rslora: bool = False
    """Multiply the adapter's output by alpha / sqrt(r), so that a high rank learns as fast (arXiv:2312.03732)."""


@dataclass(kw_only=True)
class Model:
    """Model and tokenizer of the policy."""

    path: HubModel | None = None
    """A folder, a name on the Hub, or a small model that is made on first use: `builtin:addition` of the quickstart,
    `builtin:calculator`, `builtin:guessing`, or `builtin:nim`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    tokenizer: HubTokenizer | None = None
    """Folder or Hub name of the tokenizer; the model's own by default."""
    chat_template: str | None = None
    """A Jinja chat template in place of the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of every rendering of a chat template, such as {enable_thinking: false}: of prompts, of rows that are trained
    on, and of what reward models read."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of the weights. `training.bf16` is autocast instead, with float32 weights."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ..."""
    dropout: bool = False
    """Keep the model's dropout. Off by default: log-probs of rollout and update would differ."""
    lora: Lora | None = None
    """Train a low-rank adapter instead of all weights."""
    load_in_4bit: bool = False
    """Quantize the frozen base to 4 bits by bitsandbytes (QLoRA, arXiv:2305.14314); requires `lora`."""
    load_in_8bit: bool = False
    """Quantize the frozen base to 8 bits by bitsandbytes (LLM.int8(), arXiv:2208.07339); requires `lora`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Meaning of the 4 bits: quantiles of a normal distribution, or floating point."""
    use_bnb_nested_quant: bool = False
    """Quantize the scales of the 4-bit blocks to 8 bits as well (QLoRA's double quantization)."""
    save_merged: bool | None = None
    """Save a whole model with the adapter merged into its weights, and the adapter in its folder `adapter`; otherwise save the
    adapter alone. Checkpoints hold adapters. Default: true in recipes with a trainer, false in others."""
