"""Settings of a model and its adapter: the section `model` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_rlhf.contract.base import Count, NonNegative


@dataclass(kw_only=True)
class Lora:
    """A low-rank adapter on the policy (peft's `LoraConfig`); the base model stays frozen."""

    r: Count = 16
    """Rank."""
    alpha: Count = 32
    """Scale; the adapter's output is multiplied by alpha / r."""
    dropout: NonNegative = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers get an adapter."""


@dataclass(kw_only=True)
class Model:
    """The policy's model and tokenizer."""

    path: str | None = None
    """A folder, a name on the Hub, or `builtin:addition`, the small model of the quickstart."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer; the model's own when left out."""
    chat_template: str | None = None
    """A Jinja chat template in place of the tokenizer's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of the weights. `training.bf16` is autocast instead, with float32 weights."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ..."""
    dropout: bool = False
    """Keep the model's dropout. Off by default: log-probs of rollout and update would differ."""
    lora: Lora | None = None
    """Train a low-rank adapter instead of all weights."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes; with `lora` alone."""
    load_in_8bit: bool = False
    """Hold the frozen base in 8 bits (LLM.int8(), arXiv:2208.07339), by bitsandbytes; with `lora` alone."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """What the 4 bits stand for: quantiles of a normal distribution, or floating point."""
    use_bnb_nested_quant: bool = False
    """Hold the scales of the 4-bit blocks in 8 bits as well (QLoRA's double quantisation)."""
    save_merged: bool | None = None
    """The output folder is a whole model with the adapter in its weights, and `adapter` in it the adapter; else it is the adapter
    alone. Checkpoints hold adapters. Left out: true in recipes with a trainer, false in others."""
