"""Bases held in 4 or 8 bits by bitsandbytes, on which an adapter is trained (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.settings import Model

if TYPE_CHECKING:
    from hf_rlhf.plugin import Plugin

INSTALL = "pip install 'hf_rlhf[quant]'"


def is_quantised(settings: Model) -> bool:
    """Whether the settings ask for a base in few bits."""
    return settings.load_in_4bit or settings.load_in_8bit


def model_problems(settings: Model, lora: bool, plugins: Iterator[tuple[str, Plugin]]) -> list[str]:
    """Why a model cannot be loaded, trained or saved as the settings say, each reason with what to write instead.

    `lora`: whether an adapter is trained. `plugins`: dotted place and plugin, of which some need weights that are numbers.
    """
    found = []
    if settings.save_merged and not lora:
        found.append("model.save_merged puts an adapter into the weights and there is none: set model.lora={r: 16}, or drop it")
    if not is_quantised(settings):
        if settings.bnb_4bit_quant_type != "nf4" or settings.use_bnb_nested_quant:
            found.append(
                "model.bnb_4bit_quant_type and model.use_bnb_nested_quant say how 4 bits are used: set model.load_in_4bit=true"
            )
        return found
    asked = "model.load_in_4bit" if settings.load_in_4bit else "model.load_in_8bit"
    if settings.load_in_4bit and settings.load_in_8bit:
        found.append("model.load_in_4bit and model.load_in_8bit are both set: drop one")
    elif settings.load_in_8bit and (settings.bnb_4bit_quant_type != "nf4" or settings.use_bnb_nested_quant):
        found.append("model.bnb_4bit_quant_type and model.use_bnb_nested_quant do nothing in 8 bits: set model.load_in_4bit")
    if not lora:
        found.append(f"{asked} freezes the weights, so nothing would be trained: set model.lora={{r: 16}} (--use_peft)")
    if importlib.util.find_spec("bitsandbytes") is None:
        found.append(f"{asked} needs bitsandbytes: {INSTALL}")
    if settings.dtype == "float64":
        found.append(f"{asked} computes in float32 or less: set model.dtype=float32 or bfloat16")
    if settings.path is not None and (Path(settings.path).expanduser() / "adapter_config.json").is_file():
        found.append(
            f"{asked}: {settings.path} holds an adapter, and its base with it would be rounded after it was trained: name its "
            "base, or a whole model that was saved with model.save_merged=true"
        )
    for path, plugin in plugins:
        if "plain_weights" in plugin.needs:
            found.append(
                f"{path}={plugin.name} computes with the policy's weights themselves, and {asked} holds them as codes: "
                f"{plugin.instead_of_plain_weights}"
            )
        if "double_backward" in plugin.needs:
            found.append(f"{path}={plugin.name} takes second derivatives, which bitsandbytes has not: drop {asked}")
    return found


def quantisation(settings: Model) -> dict[str, Any]:
    """Keywords of `from_pretrained` for what the settings ask."""
    if not is_quantised(settings):
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if settings.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    compute = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=compute,
        )
    }
