"""Bases in 4 or 8 bits by bitsandbytes, on which an adapter is trained (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rlhf.contract.model_settings import Model

if TYPE_CHECKING:
    from torch import nn

    from hf_rlhf.contract.base import Plugin

INSTALL = "pip install 'hf_rlhf[quant]'"


def is_quantised(settings: Model) -> bool:
    """Return whether the settings quantise the base."""
    return settings.load_in_4bit or settings.load_in_8bit


def model_problems(settings: Model, lora: bool, plugins: Iterable[tuple[str, Plugin]]) -> list[str]:
    """Return why a model cannot be loaded, trained or saved with these settings, each reason with its fix.

    `lora`: whether an adapter is trained. `plugins`: (dotted path, plugin), of which some need unquantised weights.
    """
    found = []
    if settings.save_merged is not None and not lora:
        found.append("model.save_merged requires an adapter: set model.lora={r: 16}, or remove it")
    if settings.lora is not None and settings.lora.use_dora and settings.lora.target_parameters:
        found.append(
            "model.lora.use_dora does not work with target_parameters. Set model.lora.use_dora=false, or target_modules only"
        )
    if not is_quantised(settings):
        if settings.bnb_4bit_quant_type != "nf4" or settings.use_bnb_nested_quant:
            found.append(
                "model.bnb_4bit_quant_type and model.use_bnb_nested_quant require 4 bits: set model.load_in_4bit=true"
            )
        return found
    asked = "model.load_in_4bit" if settings.load_in_4bit else "model.load_in_8bit"
    if settings.load_in_4bit and settings.load_in_8bit:
        found.append("model.load_in_4bit and model.load_in_8bit are both set: drop one")
    elif settings.load_in_8bit and (settings.bnb_4bit_quant_type != "nf4" or settings.use_bnb_nested_quant):
        found.append(
            "model.bnb_4bit_quant_type and model.use_bnb_nested_quant do nothing in 8 bits: set model.load_in_4bit"
        )
    if not lora:
        found.append(f"{asked} freezes the weights, so nothing would be trained: set model.lora={{r: 16}} (--use_peft)")
    if importlib.util.find_spec("bitsandbytes") is None:
        found.append(f"{asked} requires bitsandbytes: {INSTALL}")
    if settings.dtype == "float64":
        found.append(f"{asked} computes in float32 or less: set model.dtype=float32 or bfloat16")
    if settings.path is not None and (Path(settings.path).expanduser() / "adapter_config.json").is_file():
        found.append(
            f"{asked}: {settings.path} holds an adapter, and quantising its base would change what the adapter was trained on: "
            "name its base, or a whole model saved with model.save_merged=true"
        )
    for path, plugin in plugins:
        if "plain_weights" in plugin.needs:
            found.append(
                f"{path}={plugin.name} trains a copy of the policy's weights, which {asked} quantises: choose another (of the "
                f"critics separate with critic.adapter=true, or value_head), or remove {asked}"
            )
        if "double_backward" in plugin.needs:
            found.append(
                f"{path}={plugin.name} takes second derivatives, which bitsandbytes does not support: remove {asked}"
            )
    return found


def ready(model: Any, settings: Model, lora: bool, merges: bool) -> Any:
    """Make a loaded model, quantised or not, compute the same in rollout and update, and return it.

    `lora`: whether an adapter will be trained; `merges`: whether it will be merged into the saved weights. Raises `ValueError`
    if the saved model is quantised and would be trained without an adapter, or could not be merged.
    """
    if not getattr(model, "is_quantized", False):
        return model
    method = str(getattr(model.config.quantization_config.quant_method, "value", "of its own"))
    if not lora:
        raise ValueError(
            f"{settings.path} is quantised ({method}), so its weights cannot be trained: set model.lora={{r: 16}}"
        )
    if method == "bitsandbytes":
        from hf_rlhf.modeling.bitsandbytes_cpu import compute_alike

        compute_alike(model)
    elif merges:
        raise ValueError(f"{settings.path} is quantised ({method}) and cannot be merged: set model.save_merged=false")
    return model


def quantisation(settings: Model, path: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` for the settings' quantisation."""
    if not is_quantised(settings):
        return {}
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    if settings.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    compute = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if compute is None:
        config = AutoConfig.from_pretrained(path, revision=settings.revision, trust_remote_code=trust_remote_code)
        compute = getattr(config, "dtype", None) or torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=compute,
        )
    }


def bytes_of(model: nn.Module, settings: Model) -> tuple[float, float]:
    """Return the bytes that quantising an unquantised model's base saves, and the bytes of its largest dequantised layer, which
    exists during each product."""
    from torch import nn

    trunk: Any = getattr(model, "base_model", model)  # heads are not quantised
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [m.weight for m in trunk.modules() if isinstance(m, nn.Linear) and m is not head]
    if not is_quantised(settings) or not layers:
        return 0.0, 0.0
    scale = (1 / 64 + 4 / (64 * 256) if settings.use_bnb_nested_quant else 4 / 64) + 0.5
    held = sum(w.numel() * scale if settings.load_in_4bit else w.numel() + 4 * len(w) for w in layers)
    return sum(w.nbytes for w in layers) - held, float(max(w.nbytes for w in layers))


def lighten(parts: dict[str, float], spared: float, layer: float) -> None:
    """Subtract the savings of `bytes_of` from the parts of a phase, in place and in the parts' unit."""
    if spared:
        parts["weights"] -= spared
        parts["one layer's weights"] = layer
