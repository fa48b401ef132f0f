"""Bytes of weights, optimizer state, keys and values and activations, from shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_rlhf.modeling.lm_head import tokens_at_a_time

if TYPE_CHECKING:
    from torch import nn

STATES = {"adamw": 2, "lion": 1, "adagrad": 1, "rmsprop": 1, "sgd": 0, "adafactor": 0}
"""Bytes of state per byte of float32 weights, by the start of the name in `optim`, for optimizers not in 8 or 4 bits."""


def tensor_bytes(module: nn.Module, *, trainable: bool = False) -> int:
    """Return the bytes of parameters and buffers, tied ones once; with `trainable` of the trained parameters."""
    if trainable:
        return sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def trunk_of(model: Any) -> Any:
    """Return the model below its head, adapters included."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def optimizer_bytes(optim: str, trained: int, notes: list[str]) -> float:
    """Return the bytes of an optimizer's state over float32 weights of `trained` bytes; 0 with a note if it is not known."""
    factor = next((STATES[name] for name in STATES if optim.removeprefix("paged_").startswith(name)), None)
    if factor is None:
        notes.append(f"without the state of training.optim={optim}")
        return 0.0
    return trained * factor / (4 if "8bit" in optim else 8 if "4bit" in optim else 1)


def kept_per_token(model: Any, half: bool, keys: int = 0) -> float:
    """Return the bytes per token that a forward of the trunk keeps for its backward.

    These are the inputs and outputs of its products and norms: rows and columns of each weight, of an adapter its rank.
    `half`: products are in 16 bits. `keys`: tokens of a row if attention keeps its scores, else 0.
    """
    from torch import nn

    trunk, config = trunk_of(model), model.config.get_text_config()
    skipped = {id(p) for module in trunk.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    experts = getattr(config, "num_experts_per_tok", None) or 1
    found = 8.0 * keys * config.num_attention_heads * config.num_hidden_layers
    for name, p in trunk.named_parameters():
        width = 2 if half and p.dim() > 1 else p.element_size()
        if "lora_" in name:
            found += width * min(p.shape) if "lora_A" in name else 0
        elif id(p) not in skipped:
            found += width * sum(p.shape[-2:]) * (experts if p.dim() == 3 else 1)
    return found


def cast_bytes(model: Any, half: bool) -> int:
    """Return the bytes of the 16-bit copies of float32 weights that autocast keeps through a forward."""
    return sum(2 * p.numel() for p in trunk_of(model).parameters() if half and p.dim() > 1 and p.element_size() == 4)


def layer_input_bytes(model: Any) -> int:
    """Return the bytes per token that gradient checkpointing keeps: the input of every layer."""
    config = model.config.get_text_config()
    return int(config.num_hidden_layers * config.hidden_size * next(model.parameters()).element_size())


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
