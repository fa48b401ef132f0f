"""Kernels of a decode step: few rows meet every weight, for which `F.linear` is not the best product that a CPU has.

"onednn" reorders the weights of plain linear layers for oneDNN, once per rollout. "lean" runs the layers of plain Llama and Qwen
models itself: one product for queries, keys and values, one for gate and up, one rotation of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_rlhf.axes import at_least_float32

from ._layouts import Shared

ROWS = 32
"""Rows for which oneDNN orders the weights."""
DEPTH = 1024
"""Inputs that a product sums up in one go; more are summed in parts, which rounds less."""
TRIED = (1, 7, 32)
"""Rows with which a product is tried."""
ROUNDING = 1e-5
"""Relative difference from `F.linear` up to which a product is the same."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Modeling modules of transformers whose layers "lean" runs."""


class Product:
    """Linear layers with one input, as one product."""

    def __init__(self, *layers: Any, onednn: bool):
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        with torch.no_grad():
            self._weight = weights[0] if len(layers) == 1 else torch.cat(weights)
            self._bias = torch.cat(biases) if biases else None
            self._parts = self._weight.split(DEPTH, 1) if onednn else ()
            if onednn:
                self._parts = [torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), ROWS) for part in self._parts]
                del self._weight

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the product with x (..., n), plus `added`."""
        if not self._parts:
            out = F.linear(x, self._weight, self._bias)
            return out if added is None else out + added
        bias = self._bias
        for part, weight in zip(x.split(DEPTH, -1), self._parts, strict=True):
            if added is None:
                added = torch.ops.mkldnn._linear_pointwise(part, weight, bias, "none", [], "")
            else:
                added = torch.ops.mkldnn._linear_pointwise.binary(part, added, weight, bias, "add")
            bias = None
        assert added is not None, "a layer has inputs"
        return added


class Reordered:
    """A model whose plain linear layers multiply through oneDNN inside `active`."""

    def __init__(self, model: nn.Module):
        self._products = [(layer, Product(layer, onednn=True)) for layer in _plain_layers(model)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the products of the layers."""
        for layer, product in self._products:
            layer.forward = product
        try:
            yield
        finally:
            for layer, _ in self._products:
                del layer.forward


def _plain_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]


class Lean:
    """The layers of a model of `FAMILIES`, for one token of each row."""

    def __init__(self, model: Any, onednn: bool):
        inner = model.model
        self._embed, self._rotary, self._norm = inner.embed_tokens, inner.rotary_emb, inner.norm
        self._head = Product(model.lm_head, onednn=onednn)
        self._layers = [_Layer(layer, onednn) for layer in inner.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, layout: Shared) -> Tensor:
        """Return the logits (B, V) after tokens (B,) at positions (B,)."""
        x = self._embed(tokens)
        cos, sin = (part[0].unsqueeze(1) for part in self._rotary(x, positions.unsqueeze(0)))
        first, second = sin.chunk(2, -1)
        sin = torch.cat((-first, second), -1)
        for layer in self._layers:
            x = layer(x, cos, sin, layout)
        return at_least_float32(self._head(_normed(self._norm, x)))


class _Layer:
    def __init__(self, layer: Any, onednn: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self._attention, self._norms = attention, (layer.input_layernorm, layer.post_attention_layernorm)
        self._size, self._act = attention.head_dim, mlp.act_fn
        self._heads, self._shared = (p.out_features // self._size for p in (attention.q_proj, attention.k_proj))
        self._head_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        self._asked = Product(attention.q_proj, attention.k_proj, attention.v_proj, onednn=onednn)
        self._given = Product(attention.o_proj, onednn=onednn)
        self._gated, self._down = (
            Product(mlp.gate_proj, mlp.up_proj, onednn=onednn),
            Product(mlp.down_proj, onednn=onednn),
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Shared) -> Tensor:
        """Return what follows x (B, n); `sin` is negative in its first half."""
        heads = self._asked(_normed(self._norms[0], x)).view(len(x), -1, self._size)
        both, value = heads.split((self._heads + self._shared, self._shared), 1)
        if self._head_norms[0] is not None:
            parts = both.split((self._heads, self._shared), 1)
            both = torch.cat([_normed(norm, part) for norm, part in zip(self._head_norms, parts, strict=True)], 1)
        turned = (both * cos).addcmul_(both.roll(self._size // 2, -1), sin)
        query, key = turned.split((self._heads, self._shared), 1)
        out = layout.attend(
            self._attention,
            query.unsqueeze(2),
            key.unsqueeze(2),
            value.unsqueeze(2),
            scaling=self._attention.scaling,
            window=None,
            softcap=None,
        )
        x = self._given(out.view(len(x), -1), x)
        gate, up = self._gated(_normed(self._norms[1], x)).chunk(2, -1)
        return self._down(self._act(gate).mul_(up), x)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def prepare(kernel: str, model: Any) -> Lean | Reordered | None:
    """Return what decodes with the weights that the model has now; None: the model, also where a module was given hooks."""
    if kernel == "lean" and not_lean(model) is None:
        return Lean(model, onednn=not_onednn(model) is None)
    return Reordered(model) if kernel == "onednn" and not_onednn(model) is None else None


def not_onednn(model: nn.Module) -> str | None:
    """Return why the weights cannot be reordered for oneDNN, or None."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "the weights are not on a CPU"
    if torch.is_autocast_enabled("cpu") or any(p.dtype != torch.float32 for p in model.parameters()):
        return "the products are not in float32"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "torch has no oneDNN"
    return None


def not_lean(model: Any) -> str | None:
    """Return why the lean loop does not run these layers, or None."""
    homes = {f"transformers.models.{family}.modeling_{family}" for family in FAMILIES}
    home = type(model).__module__
    if home not in homes or not type(model).__name__.endswith("ForCausalLM"):
        return f"{type(model).__name__} is none of the plain {', '.join(FAMILIES)} models"
    if getattr(model.config, "sliding_window", None) is not None:
        return "it has a sliding window"
    inner = model.model
    called = {inner.embed_tokens, inner.rotary_emb, *(layer.mlp.act_fn for layer in inner.layers)}
    for m in model.modules():
        if m in called:
            continue
        if type(m).__module__ != home and type(m) not in (nn.Linear, nn.ModuleList):
            return f"it contains {type(m).__name__}, which is not its own"
        if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m):
            return f"{type(m).__name__} has a hook or a forward of its own"
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return "it runs in autocast"
    return None


def wrong_product(model: nn.Module) -> str | None:
    """Describe a product through oneDNN that differs from `F.linear`, trying one layer of each shape; None if there is none."""
    shapes = {(layer.weight.shape, layer.bias is None): layer for layer in _plain_layers(model)}
    draw = torch.Generator().manual_seed(0)
    for layer in shapes.values():
        product = Product(layer, onednn=True)
        for rows in TRIED:
            x = torch.randn(rows, layer.in_features, generator=draw)
            due = F.linear(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
            off = float((product(x) - due).norm() / due.norm().clamp(min=1e-30))
            if not off <= ROUNDING:
                return f"oneDNN's product of {rows} rows with {tuple(layer.weight.shape)} weights is off by {off:.2g}"
    return None


def choose(asked: str, model: Any, tried: Callable[[str], str | None]) -> tuple[str, Sequence[str]]:
    """Return the kernel, and how better ones failed. `asked`: "auto", or a kernel, for which it raises `ValueError` if it fails.

    `tried` describes how the logits of a kernel differ from those of the model, or returns None.
    """
    plain = not_onednn(model)
    if asked == "model" or (asked == "auto" and plain):
        return "model", []
    failed: list[str] = []
    for kernel in ("lean", "onednn") if asked == "auto" else (asked,):
        why = not_lean(model) if kernel == "lean" else plain
        if why and asked == "auto":
            continue
        try:
            why = why or (None if plain else wrong_product(model)) or tried(kernel)
        except (RuntimeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
        if why is None:
            return kernel, failed
        failed.append(f"{kernel}: {why}")
    if asked != "auto":
        raise ValueError(
            f"rollout.kernel={asked} does not decode {type(model).__name__}: {failed[0]}. Set rollout.kernel=auto"
        )
    return "model", failed
