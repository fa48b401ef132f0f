"""Merge an adapter into the weights under it, to save a plain model or to load one."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "adapter"
"""Folder of the adapter beside a model that has it merged in."""


def save_merged(model: Any, folder: Path, *, state_dict: Mapping[str, Tensor]) -> None:
    """Save plain transformers weights with the adapter in them, and the adapter by itself in `FOLDER` within the folder.

    `state_dict` holds the model's whole weights by name. The model in memory stays as it is; a whole copy of it is made in
    main memory. The adapter is written first, so that it is there when the merge fails. Raises `ValueError` as `merged`.
    """
    model.save_pretrained(folder / FOLDER, state_dict=state_dict)
    merged(model, state_dict).save_pretrained(folder)


def drop_other_form(folder: Path, whole: bool) -> None:
    """Remove the other form from a folder to which a model was just saved, `whole` or as an adapter: with both, the whole model
    would load with the adapter applied twice.

    Beside an adapter only a whole model that `save_merged` wrote is removed, never the adapter's own base.
    """
    config = folder / "adapter_config.json"
    if whole:
        left = [config, *folder.glob("adapter_model.*")]
    elif config.is_file() and (folder / FOLDER / config.name).is_file() and not _is_base(folder, config):
        shutil.rmtree(folder / FOLDER)
        left = [folder / "config.json", folder / "generation_config.json"]
        left += [*folder.glob("model.safetensors*"), *folder.glob("model-*.safetensors")]
    else:
        left = []
    for file in left:
        file.unlink(missing_ok=True)


def _is_base(folder: Path, config: Path) -> bool:
    """Return whether a folder is the base of the adapter with this configuration."""
    base = json.loads(config.read_text()).get("base_model_name_or_path")
    return base is not None and Path(base).expanduser().resolve() == folder.resolve()


def merged(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return a copy on the CPU with the adapter merged into its weights.

    `weights` are the model's whole weights by name. A quantized base is dequantized first, so that outputs are those of `model`
    up to rounding. Raises `ValueError` for an adapter that is not a change of weights, and for a base that the library cannot
    dequantize.
    """
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            "learned prompts are not a change of weights and cannot be merged. Set model.save_merged=false"
        )
    quantized = getattr(model.get_base_model(), "is_quantized", False)
    return merge(_dequantized(model, weights) if quantized else _copied(model, weights))


def merge(model: Any) -> Any:
    """Merge the adapter into the model under it, in place, and return that plain model.

    Where the adapter changes one of an input and an output embedding that share a weight, or both differently, each gets its
    own, and the configuration says so.
    """
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), getattr(base, "get_output_embeddings", lambda: None)()]
    layers: list[Any] = [_under(end) for end in ends]
    tied = layers[1] is not None and layers[0].weight is layers[1].weight
    if tied and any(layer is not end for layer, end in zip(layers, ends, strict=True)):
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are cared for here
        plain = model.merge_and_unload()
    if tied:
        first, last = plain.get_input_embeddings(), plain.get_output_embeddings()
        if same := torch.equal(first.weight, last.weight):
            last.weight = first.weight
        for config in {id(part): part for part in (plain.config, plain.config.get_text_config())}.values():
            config.tie_word_embeddings = same
    return plain


def _under(module: Any) -> Any:
    """Return the module under peft's wrappers."""
    while (inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None)) is not None:
        module = inner
    return module


def _copied(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Copy a model to main memory; shared tensors stay shared."""
    here: dict[int, Any] = {id(m): _moved(m) for m in model.modules() if _holds_codes(m)}
    coded = {id(p) for m in model.modules() if id(m) in here for p in (*m.parameters(), *m.buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in coded:
            moved = weights.get(name, tensor).detach().to("cpu", copy=True)
            here[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(model, here)


def _moved(module: Any) -> Any:
    """Copy one module with quantized weights to main memory. The copy is made on the module's device and then moved, because
    what belongs to the weights, such as scales, moves only with the module."""
    copied = copy.deepcopy(module).to("cpu")
    if hasattr(copied, "quant_state"):  # of the weight; the module names it a second time, and that one is not moved
        copied.quant_state = getattr(copied.weight, "quant_state", None)
    return copied


def _holds_codes(module: Any) -> bool:
    """Return whether the module's own parameters are a library's codes of numbers, not numbers."""
    own = [p for p in module._parameters.values() if p is not None]
    return any(type(p) is not nn.Parameter or not p.is_floating_point() for p in own)


def _dequantized(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Copy a model with a quantized base to main memory, its base dequantized, with the adapter on it."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapter
    base = _copied(model, weights).unload()
    try:
        base = base.dequantize()
    except (NotImplementedError, ValueError, AttributeError) as error:  # transformers' quantizers raise them all
        raise ValueError(f"the library cannot dequantize this base ({error}). Set model.save_merged=false") from error
    whole = get_peft_model(base, copy.deepcopy(model.peft_config[name]), adapter_name=name)
    adapter = get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=name)
    set_peft_model_state_dict(whole, adapter, adapter_name=name)
    return whole
