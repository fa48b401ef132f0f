"""Custom attention layouts through transformers' attention registry; the model's code stays unchanged.

Inside `attend(model, layout)` every attention layer of `model` passes its queries, keys and values to `layout.attend`,
and no mask is built. `attention_refusal` returns why an architecture is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

NAME = "hf_rlhf"
SERVED = {"full_attention", "sliding_attention"}
"""Layer types whose attention a layout supports."""


class Layout(Protocol):
    """Positions of the tokens of a forward, and which tokens attend to which."""

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
        """Attend with queries (B, heads, L, d) to keys and values (B, kv_heads, L, d); returns (B, L, heads, d).

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
            f"{type(module).__name__} does not pass keyword arguments on to its attention, or runs while another thread runs a "
            "forward of the same model. A reward that runs the policy must set runs_model to True"
        )
    if others.get("dropout"):
        raise RuntimeError(
            f"{type(module).__name__} has attention dropout, which packed rows do not support. Set model.dropout=false or "
            "update.attention=padded"
        )
    if unknown := sorted(name for name in ("s_aux", "position_bias") if others.get(name) is not None):
        raise RuntimeError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which packed rows do not support"
        )
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    out = layout.attend(module, query, key, value, scaling=scaling, window=sliding_window, softcap=softcap)
    return out, None


AttentionInterface.register(NAME, _attend)  # and no mask function: transformers then builds no mask


@contextmanager
def attend(model: nn.Module, layout: Layout) -> Iterator[dict[str, Any]]:
    """Route attention to `layout`; yields the keyword arguments that the model's forward must get. Layers that run again in the
    backward (gradient checkpointing) keep their layout."""
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
    """Switch the attention of checkpointed layers again when they run in the backward, after this context has ended."""
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
    """Record the windows with which the layers call a layout."""

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
        """Record the window, then attend as the layout does."""
        self.windows.add(window)
        return self.layout.attend(module, query, key, value, scaling=scaling, window=window, softcap=softcap)


def hidden_window(model: nn.Module, windows: set[int | None]) -> str | None:
    """Return why the layout attends too far: the configuration has a sliding window and no layer passed it, so that it is only in
    the masks, which are not built. None where this is not so."""
    for config in (m.config for m in model.modules() if hasattr(m, "config")):
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if window is None or window >= getattr(config, "max_position_embeddings", float("inf")):
            continue
        if windows <= {None} and (kinds is None or "sliding_attention" in kinds):
            return f"its sliding window of {window} tokens is in its mask alone"
    return None


def drops_attention(model: nn.Module) -> bool:
    """Return whether a module or configuration has attention dropout."""
    things = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    numbers = ((name, x) for thing in things for name, x in vars(thing).items() if type(x) is float)
    return any(x > 0 and "att" in name and "drop" in name for name, x in numbers)


def draws(model: nn.Module) -> bool:
    """Return whether a forward in training draws: a module or configuration has dropout, noise or jitter."""
    things = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    numbers = ((type(thing), name, x) for thing in things for name, x in vars(thing).items() if type(x) is float)
    return any(
        x > 0 and (any(word in name for word in ("drop", "noise", "jitter")) or issubclass(kind, _DropoutNd))
        for kind, name, x in numbers
    )


def attention_refusal(model: nn.Module) -> str | None:
    """Return why no layout supports this architecture, as far as its configuration says; None if nothing speaks against it."""
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
