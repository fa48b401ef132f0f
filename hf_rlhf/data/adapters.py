"""Put LoRA, DoRA and rsLoRA adapters of peft on a model, and reject every other tuner by name."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from hf_rlhf.runtime.errors import UserError

SUPPORTED = frozenset(
    {
        *(
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
        ),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
        *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config"),
    }
)
"""Fields of `LoraConfig` that may have any value; every other one must have its default."""
INITIAL = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""
LORA = "peft.LoraConfig(r=16, target_modules='all-linear') in Python, model.lora={r: 16} in a recipe"


class AdapterError(UserError, ValueError):
    """An adapter that is not supported, or does not fit its model; the message says how to fix it."""


def config_problems(config: Any) -> Iterator[str]:
    """Yield why a configuration of peft is not supported, with the fix."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        yield (
            f"the adapter must be LoRA, DoRA or rsLoRA, got {type(config).__name__} ({kind}): of other tuners neither the "
            f"reference nor saved weights are the policy's. Use {LORA}"
        )
        return
    start = config.init_lora_weights
    if start not in INITIAL:
        yield (
            f"init_lora_weights must be true, false, 'gaussian' or 'orthogonal', got {start!r}, which changes the base: it "
            "would no longer be the reference, and is not saved with the adapter. Leave it out"
        )
    for field in dataclasses.fields(config):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.name not in SUPPORTED and (value := getattr(config, field.name)) != default:
            yield f"{field.name} of LoraConfig must be {default!r}, got {value!r}, which is not supported. Leave it out"
    if config.use_dora and config.target_parameters:
        yield "use_dora does not work with target_parameters. Set use_dora to false, or target modules only"


def adapted_model_problems(model: Any) -> Iterator[str]:
    """Yield why the adapter that a model already has is not supported, with the fix."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(model, PeftModel):
        yield (
            f"a model with an adapter must be a peft.PeftModel, got {type(model).__name__}. Use peft.get_peft_model or "
            "PeftModel.from_pretrained instead of add_adapter, or pass the base and a peft_config"
        )
        return
    for config in model.peft_config.values():
        yield from config_problems(config)
    if list(model.peft_config) != ["default"]:
        yield (
            f"a model must have one adapter, called 'default', got {', '.join(map(repr, model.peft_config))}. Merge or delete "
            "the others, and load the one to train under that name"
        )
    if any(getattr(config, "target_modules_to_tie", None) for config in model.peft_config.values()):
        yield (
            "ensure_weight_tying works with modules_to_save, not with an embedding in target_modules: two weights of the "
            "adapter would share memory and be trained twice. Leave it out, or put the embedding into modules_to_save"
        )
    inner = {name: getattr(m, "base_layer", None) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if twice := [name for name, layer in inner.items() if isinstance(layer, AuxiliaryTrainingWrapper)]:
        yield (
            f"{twice[0].rpartition('.')[2]} must have one adapter, got two: one by target_modules, and one by "
            "trainable_token_indices, which in a model with tied embeddings covers the head. Leave one out"
        )
    if not any(p.requires_grad for p in model.parameters()):
        yield "the adapter is frozen. Load it by PeftModel.from_pretrained(..., is_trainable=True)"


def add_adapter(model: Any, config: Any, **options: Any) -> Any:
    """Put a new adapter on a model. Raises `AdapterError` where it does not fit, with the words of peft."""
    from peft import get_peft_model

    if problems := list(config_problems(config)):
        raise AdapterError("; ".join(problems))
    keep_zero_rows()
    config = copy.copy(config)  # peft writes to it
    tokens = config.trainable_token_indices
    for name, ids in tokens.items() if isinstance(tokens, dict) else [("the embedding", tokens or ())]:
        rows = _rows(model, name)
        if rows == 0:
            raise AdapterError(f"trainable_token_indices must name an embedding such as embed_tokens, got {name}")
        if ids and rows is not None and not 0 <= min(ids) <= max(ids) < rows:
            raise AdapterError(
                f"trainable_token_indices must be at least 0 and below {rows}, the rows of {name}, got "
                f"{[i for i in ids if not 0 <= i < rows]}. Resize the embedding and save the model first, or drop them"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `merge` cares for it
            adapted = get_peft_model(model, config, **options)
    except (ValueError, TypeError, NotImplementedError) as error:  # peft raises them all
        fix = " Set use_dora to false, or name linear layers in target_modules" if "use_dora" in str(error) else ""
        raise AdapterError(f"the adapter does not fit {type(model).__name__}: {error}{fix}") from error
    if problems := list(adapted_model_problems(adapted)):
        raise AdapterError("; ".join(problems))
    return adapted


def _rows(model: Any, name: str) -> int | None:
    """Return the number of rows of the embedding, or of the module whose name ends so: 0 if it has none, None if there is no
    such module."""
    found = [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
    module = model.get_input_embeddings() if name == "the embedding" else next(iter(found), None)
    if module is None:
        return None
    weight = getattr(module, "weight", None)
    return len(weight) if weight is not None and weight.dim() == 2 else 0


def keep_zero_rows() -> None:
    """Let DoRA keep a row of zeros, such as a padding token's, as zeros: it divides by the row's norm."""
    from peft.tuners.lora.dora import DoraLinearLayer

    plain: Any = DoraLinearLayer.get_weight_norm
    if not hasattr(plain, "keeps_zero_rows"):

        def above_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
            norm = plain(self, *args, **kwargs)
            return norm.clamp(min=torch.finfo(norm.dtype).tiny)

        above_zero.keeps_zero_rows = True  # type: ignore[attr-defined]
        DoraLinearLayer.get_weight_norm = above_zero  # type: ignore[method-assign]
