"""Build a model from its configuration, without weights, and count the bytes that parts of it take."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainingArguments

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.addition_task import BUILTIN, addition_config
from hf_rlhf.data.model_loading import lora_config
from hf_rlhf.modeling.lm_head import tokens_at_a_time

Sizes = dict[str, float]
"""Part -> bytes."""
STATES = {"adamw": 2, "lion": 1, "adagrad": 1, "rmsprop": 1, "sgd": 0, "adafactor": 0}
"""Bytes of state per byte of float32 weights, by the start of the name in `optim`, for optimizers not in 8 or 4 bits."""


class BlueprintError(ValueError):
    """A model that cannot be built without weights; the message says why."""


def load_config(path: str | None, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration, for an adapter its base's. Raises `BlueprintError` if it is not on this machine."""
    if path is None:
        raise BlueprintError("no model is named")
    if path == BUILTIN:
        return addition_config()
    folder, options = Path(path).expanduser(), {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        if (adapter := folder / "adapter_config.json").is_file():
            return load_config(json.loads(adapter.read_text())["base_model_name_or_path"], None, trust_remote_code)
        return AutoConfig.from_pretrained(str(folder) if folder.exists() else path, revision=revision, **options)
    except OSError as error:
        raise BlueprintError(f"the configuration of {path} is not on this machine") from error
    except (ValueError, ImportError) as error:
        raise BlueprintError(str(error).strip().partition("\n")[0]) from error


def without_weights(auto: Any, config: Any, dtype: str, trust_remote_code: bool = False) -> Any:
    """Return a model on `meta`, built by a class of transformers. Raises `BlueprintError` if its code does not allow that."""
    name = str(getattr(config, "dtype", None) or "float32") if dtype == "auto" else dtype
    options = {"dtype": getattr(torch, name.removeprefix("torch.")), "trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            return auto.from_config(config, **options)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, ImportError) as error:
        raise BlueprintError(f"the model cannot be built without weights ({error!r:.200})") from error


def with_adapter(model: Any, settings: Model, peft_config: Any) -> Any:
    """Return a copy on `meta` with the adapter that would be trained, or the model itself if none is to be added."""
    chosen: Any = peft_config or (settings.lora and lora_config(settings.lora))
    if chosen is None or hasattr(model, "peft_config"):
        return model
    from peft import get_peft_model

    memo = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return get_peft_model(copy.deepcopy(model, memo), chosen, low_cpu_mem_usage=True)


def tensor_bytes(module: Any, *, trainable: bool = False) -> int:
    """Return the bytes of parameters and buffers, tied ones once; with `trainable` of the trained parameters."""
    if trainable:
        return sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def optimizer_bytes(optim: str, trained: int, notes: list[str]) -> float:
    """Return the bytes of an optimizer's state over float32 weights of `trained` bytes; 0 with a note if unknown."""
    factor = next((STATES[name] for name in STATES if optim.removeprefix("paged_").startswith(name)), None)
    if factor is None:
        notes.append(f"without the state of training.optim={optim}")
    return trained * (factor or 0) / (4 if "8bit" in optim else 8 if "4bit" in optim else 1)


def trunk_of(model: Any) -> Any:
    """Return the model below its head, adapters included."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def kept_per_token(model: Any, half: bool) -> float:
    """Return the bytes per token of the inputs and outputs of each product and norm; `half`: products are in 16 bits."""
    trunk, found = trunk_of(model), 0.0
    experts = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    for name, p in trunk.named_parameters():
        width = 2 if half and p.dim() > 1 else p.element_size()
        if "lora_" in name:
            found += width * min(p.shape) if "lora_A" in name else 0
        elif not hasattr(trunk.get_submodule(name.rpartition(".")[0]), "num_embeddings"):
            found += width * sum(p.shape[-2:]) * (experts if p.dim() == 3 else 1)
    return found


def cache_per_token(model: Any, half: bool) -> int:
    """Return the bytes of the keys and values that all layers cache of one token."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 if half else next(model.parameters()).element_size()
    return int(2 * sum("attention" in kind for kind in types) * heads * width * size)


def logits_tile(model: Any, tokens: int) -> int:
    """Return the bytes of the logits that exist at a time."""
    vocabulary = len(model.get_output_embeddings().weight)
    return 4 * vocabulary * min(tokens, tokens_at_a_time(vocabulary))


def layer_bytes(model: Any, half: bool, tokens: int) -> float:
    """Return the activations of one layer."""
    return tokens * kept_per_token(model, half) / model.config.get_text_config().num_hidden_layers


def micro_batch_bytes(model: Any, args: TrainingArguments, tokens: int, logits: int, trunks: int = 1) -> Sizes:
    """Return what forwards of `trunks` models keep, with checkpointing the inputs of layers, and the backward takes."""
    config, half = model.config.get_text_config(), bool(args.bf16)
    again = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    inputs = config.num_hidden_layers * config.hidden_size * next(model.parameters()).element_size()
    return {
        "activations": trunks * tokens * (inputs if again else kept_per_token(model, half)),
        "weights in 16 bits": 2 * half * sum(p.numel() for p in trunk_of(model).parameters() if p.element_size() == 4),
        "backward": layer_bytes(model, half, tokens) + logits,
    }
