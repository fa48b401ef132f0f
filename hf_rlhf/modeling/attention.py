"""Attention in a layout of our own, through transformers' attention registry: the model's code stays as it is.

Inside `attend(model, layout)` every attention layer of `model` hands its queries, keys and values to `layout.attend`,
and no mask is built. `attention_refusal` says which architectures it cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

NAME = "hf_rlhf"
SERVED = {"full_attention", "sliding_attention"}
"""Kinds of layers whose attention a layout can do."""


class Layout(Protocol):
    """Where the tokens of a forward stand, and who attends to whom."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(B, heads, L, d), (B, kv_heads, L, d) twice -> (B, L, heads, d).

        `window`: a token sees itself and window - 1 tokens before it; `softcap` c: scores become c tanh(score / c).
        """


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if layout is None:
        raise RuntimeError(
            f"{type(module).__name__} does not pass keywords on to its attention, or is run while a forward of the same model "
            "goes on in another thread (a reward that runs the policy says runs_model: true)"
        )
    if others.get("dropout"):
        raise RuntimeError(
            f"{type(module).__name__} drops attention weights at random, which a layout of our own cannot: set "
            "model.dropout=false or update.attention=padded"
        )
    if unknown := sorted(name for name in ("s_aux", "position_bias") if others.get(name) is not None):
        raise RuntimeError(f"{type(module).__name__} gives its attention {', '.join(unknown)}")
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    out = layout.attend(module, query, key, value, scaling=scaling, window=sliding_window, softcap=softcap)
    return out, None


AttentionInterface.register(NAME, _attend)  # and no mask function: transformers then builds no mask


@contextmanager
def attend(model: nn.Module, layout: Layout) -> Iterator[dict[str, Any]]:
    """Gives the keywords that the model's forward must get. Layers that are run again in the backward (gradient
    checkpointing) find their layout by themselves."""
    configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    with _switched(configs), _found_again(layers, configs):
        yield {"layout": layout}


@contextmanager
def _switched(configs: list[Any]) -> Iterator[None]:
    before = [getattr(config, "_attn_implementation_internal", None) for config in configs]
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


@contextmanager
def _found_again(layers: list[Any], configs: list[Any]) -> Iterator[None]:
    """Checkpointed layers run again when this context is long left."""
    own = [layer._gradient_checkpointing_func for layer in layers]

    def again(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(checkpoint)
        def checkpointed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def inside(*inputs: Any) -> Any:
                with _switched(configs):
                    return run(*inputs)

            return checkpoint(inside, *args, **kwargs)

        return checkpointed

    for layer, checkpoint in zip(layers, own, strict=True):
        layer._gradient_checkpointing_func = again(checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, own, strict=True):
            layer._gradient_checkpointing_func = checkpoint


@dataclass
class RecordingLayout:
    """A layout that notes the windows with which the layers call it."""

    layout: Layout
    windows: set[int | None] = field(default_factory=set)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See `Layout`."""
        self.windows.add(window)
        return self.layout.attend(module, query, key, value, scaling=scaling, window=window, softcap=softcap)


def hidden_window(model: nn.Module, windows: set[int | None]) -> str | None:
    """Why the layout saw too much, where the configuration has a sliding window and no layer named it: it is in the masks
    alone, which are not built."""
    for config in (m.config for m in model.modules() if hasattr(m, "config")):
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if window is None or window >= getattr(config, "max_position_embeddings", float("inf")):
            continue
        if windows <= {None} and (kinds is None or "sliding_attention" in kinds):
            return f"its sliding window of {window} tokens is in its mask alone"
    return None


def drops_attention(model: nn.Module) -> bool:
    """Whether a module or configuration drops attention weights at random in training."""
    things = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    numbers = ((name, x) for thing in things for name, x in vars(thing).items() if type(x) is float)
    return any(x > 0 and "att" in name and "drop" in name for name, x in numbers)


def attention_refusal(model: nn.Module) -> str | None:
    """Why no layout can serve this architecture, as far as its configuration says; None where nothing speaks against it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None:
            continue
        if other := sorted(set(getattr(config, "layer_types", None) or ()) - SERVED):
            return f"its layers of kind {', '.join(other)} are neither full nor sliding-window attention"
        if getattr(config, "is_encoder_decoder", False):
            return "it has an encoder"
        if getattr(config, "attention_chunk_size", None):
            return "it attends within chunks"
        if getattr(config, "alibi", False):
            return "its attention knows positions by ALiBi"
    return None
