"""What a forward and backward holds at most, counted on tensors without storage.

Inside `without_storage` every tensor has a shape, a type and strides and no memory behind them, so that a model of any
size can be built and run. `LiveTensors` counts the bytes that its storages would take, from when they are made until they are
dropped: what autograd saves, gradients, and what comes and goes in between.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hf_rlhf.modeling.attention import attend
from hf_rlhf.modeling.lm_head import Derivative, TokenStatistics, head_of, score
from hf_rlhf.modeling.packing import Packed


@contextmanager
def without_storage() -> Iterator[None]:
    """Tensors made inside have no memory behind them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages that were made inside and still live, and the most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_iter((args, kwargs)):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage(), made=False)
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage(), made=True)
        return out

    def _note(self, storage: torch.UntypedStorage, made: bool) -> None:
        """Views share the storage of what was there before."""
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes() if made else 0
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes of one micro-batch, above the weights."""

    saved: int
    """What the forward leaves for the backward."""
    peak: int
    """The most at any time, gradients of the weights included."""


def hollow(model: nn.Module, device: str = "cpu") -> Any:
    """A copy of `model` whose parameters and buffers are new and empty: on `meta`, or, in `without_storage`, on CPU."""
    memo: dict[int, Any] = {}
    for x in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(x.shape, dtype=x.dtype, device=device)
        memo[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def tensor_bytes(module: nn.Module, *, trainable: bool = False) -> int:
    """Bytes of its parameters and buffers, each storage once; with `trainable` of the parameters that are trained."""
    parameters = [p for p in module.parameters() if p.requires_grad or not trainable]
    found = [*parameters, *([] if trainable else module.buffers())]
    return sum({x.untyped_storage()._cdata: x.nbytes for x in found}.values())


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of one forward, all of whose completion tokens were sampled."""

    prompts: list[list[int]]
    completions: list[list[int]]
    attention: str
    """`packed`, `flex` or `padded`, as in `update.attention`."""
    autocast: torch.dtype | None = None

    def states(self, trunk: nn.Module) -> Tensor:
        """(n, H) the trunk's last hidden states where a token was sampled."""
        sampled = sum(map(len, self.completions)) or 1
        if self.attention == "padded":
            longest = max(len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True))
            input_ids = torch.zeros((len(self.prompts), longest), dtype=torch.long)
            hidden = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        else:
            kind = Flat if self.attention == "flex" else Packed
            used: list[int | None] = [max(0, len(c) - 1) for c in self.completions]  # the last token predicts nothing
            with unset_fake_temporarily():  # places are many, small and soon made with memory
                layout = kind(self.prompts, self.completions, used, torch.device("cpu"))
                if kind is Packed:
                    _ = layout._order
            with attend(trunk, layout) as keywords:
                hidden = trunk(
                    input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords
                ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, torch.zeros(sampled, dtype=torch.long))

    def cast(self) -> Any:
        """The autocast of its forward."""
        return _cast(self.autocast)


class Flat(Packed):
    """Attention as a fused kernel does it: besides its inputs it keeps its output and one number per token and head."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        """See `Layout`."""
        out: Tensor = _Fused.apply(query, key, value)
        return out.transpose(1, 2)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def count_update(
    model: Any, critic: Any, batch: MicroBatch, *, entropy: bool, by_derivative: bool, later: bool
) -> Counted:
    """Forward and backward of one micro-batch through `model` and, where there is one, the trunk of a `critic`.

    `later`: another micro-batch has left gradients. `by_derivative`: the head makes its gradients in the forward.
    """

    def losses() -> list[Tensor]:
        found = [_policy_loss(model, batch, entropy, _derivative if by_derivative else None)]
        if critic is not None:
            found.append(batch.states(critic).float().sum())
        return found

    trunks = [trunk_of(model), *([] if critic is None else [critic])]
    models = [m for m in (model, critic) if m is not None]
    return count_step(models, trunks, losses, batch.autocast, later=later)


def count_step(
    models: Sequence[Any],
    trunks: Sequence[Any],
    losses: Callable[[], list[Tensor]],
    autocast: torch.dtype | None,
    *,
    later: bool,
) -> Counted:
    """Forward and backward of `losses`, which come of `models`; the first of these has the embeddings, and `trunks` are below
    their heads. `later`: as for `count_update`."""
    out = models[0].get_output_embeddings()
    heads = set() if out is None else {id(p) for p in out.parameters()}

    def count() -> list[int]:
        trained = [p for m in models for p in m.parameters() if p.requires_grad]
        with LiveTensors() as live:
            for p in trained:
                if later or id(p) not in heads:
                    p.grad = torch.empty_like(p)
            before = live.now
            with _cast(autocast), _when_layers_are_done(models[0], live) as layers:
                made = losses()
            saved = live.now - before
            torch.autograd.backward(made)
            del made
        for p in trained:
            p.grad = None
        return [saved, max([*layers, 0 if layers else live.peak]) - before, live.peak - before if layers else 0]

    saved, inside, after = whole_depth(trunks, count)
    trained = sum(tensor_bytes(m, trainable=True) for m in models)
    if later:
        return Counted(saved=saved, peak=max(inside, after) + trained)
    of_heads = 0 if out is None else sum(p.nbytes for p in out.parameters() if p.requires_grad)
    body = trained - of_heads  # gradients that come as the backward goes down: at the first layer they are there
    return Counted(saved=saved, peak=max(inside, inside - saved + body, after + body))


@contextmanager
def _when_layers_are_done(model: Any, live: LiveTensors) -> Iterator[list[int]]:
    """The peak up to the moment when the backward leaves the first layer for the embedding, and a new one from there."""
    peaks: list[int] = []

    def done(gradient: Tensor) -> None:
        peaks.append(live.peak)
        live.peak = live.now

    def embedded(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(done)

    handle = model.get_input_embeddings().register_forward_hook(embedded)
    try:
        yield peaks
    finally:
        handle.remove()


def count_forward(model: Any, batch: MicroBatch, *, head: bool) -> int:
    """The most bytes of one micro-batch without gradient, through the trunk alone or the head as well."""

    def count() -> list[int]:
        with torch.no_grad(), LiveTensors() as live, batch.cast():
            if head:
                _policy_loss(model, batch, False, None)
            else:
                batch.states(model)
        return [live.peak]

    return whole_depth([trunk_of(model) if head else model], count)[0]


def count_heads(trunk: Any, autocast: torch.dtype | None) -> int:
    """Bytes of the keys and values that all layers make of one token."""
    batch = MicroBatch(prompts=[[0] * TOKENS], completions=[[0]], attention="packed", autocast=autocast)

    def count() -> list[int]:
        layout = _Heads(batch.prompts, batch.completions, [0], torch.device("cpu"))
        with torch.no_grad(), batch.cast(), attend(trunk, layout) as keywords:
            trunk(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **keywords)
        return [layout.bytes // TOKENS]

    return whole_depth([trunk], count)[0]


TOKENS = 16
"""In the row with which keys and values are counted."""


class _Heads(Flat):
    """Adds up the bytes of keys and values, in the type in which autocast multiplies them."""

    bytes = 0

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        """See `Layout`."""
        width = torch.get_autocast_dtype("cpu").itemsize if torch.is_autocast_enabled("cpu") else key.element_size()
        self.bytes += (key.numel() + value.numel()) * width
        return super().attend(module, query, key, value, **others)


def count_cache(trunk: Any, tokens: int, autocast: torch.dtype | None) -> int:
    """Bytes of transformers' own cache (keys and values, and states of other kinds) of a row of this length."""
    from transformers import DynamicCache

    def count() -> list[int]:
        cache = DynamicCache(config=trunk.config)
        with torch.no_grad(), _cast(autocast):
            trunk(input_ids=torch.zeros((1, tokens), dtype=torch.long), past_key_values=cache, use_cache=True)
        kept = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]
        return [sum({x.untyped_storage()._cdata: x.nbytes for x in kept}.values())]

    return whole_depth([trunk], count)[0]


def whole_depth(trunks: Sequence[Any], count: Callable[[], list[int]]) -> list[int]:
    """What `count` gives for the whole depth of the trunks, from runs with few of their layers.

    Two layers of each kind, then a third of each kind in turn: what it adds counts as often as there are more of it.
    Layers are of one kind if they have equal classes, parameters and attention.
    """
    kinds = [_kinds(trunk) for trunk in trunks]
    if any(not own or max(map(len, own)) <= 3 for own in kinds):
        return count()
    first = [sorted(place for places in own for place in places[:2]) for own in kinds]
    with _shortened(trunks, first):
        base = count()
    total = list(base)
    for i, own in enumerate(kinds):
        for places in own:
            if len(places) <= 2:
                continue
            chosen = [sorted([*kept, places[2]]) if i == j else kept for j, kept in enumerate(first)]
            with _shortened(trunks, chosen):
                more = count()
            total = [t + (len(places) - 2) * (m - b) for t, m, b in zip(total, more, base, strict=True)]
    return total


def _kinds(trunk: Any) -> list[list[int]]:
    """The places of the layers of each kind; none where the model does not keep its layers in `layers`."""
    config, layers = trunk.config, getattr(trunk, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(config, "num_hidden_layers", None):
        return []
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    kinds: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
        kinds.setdefault((type(layer), types[i], parameters), []).append(i)
    return list(kinds.values())


@contextmanager
def _shortened(trunks: Sequence[Any], places: Sequence[list[int]]) -> Iterator[None]:
    """Only these layers of each trunk run."""
    own = [(trunk.layers, trunk.config) for trunk in trunks]
    for trunk, kept in zip(trunks, places, strict=True):
        layers, trunk.config = trunk.layers, copy.deepcopy(trunk.config)
        trunk.layers = nn.ModuleList(layers[i] for i in kept)
        if types := getattr(trunk.config, "layer_types", None):
            trunk.config.layer_types = [types[i] for i in kept]
        trunk.config.num_hidden_layers = len(kept)
        _number(trunk.layers)
    try:
        yield
    finally:
        for trunk, (layers, config) in zip(trunks, own, strict=True):
            trunk.layers, trunk.config = layers, config
            _number(layers)


def _number(layers: nn.ModuleList) -> None:
    """Gives each layer its place, under which a cache holds what is its."""
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", i)  # noqa: B010


def trunk_of(model: Any) -> Any:
    """The model below the language-model head, adapters included."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model


def _policy_loss(model: Any, batch: MicroBatch, entropy: bool, derivative: Derivative | None) -> Tensor:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = head_of(causal)
    if head is None:
        raise ValueError(f"{type(causal).__name__} has no output embeddings")
    states = batch.states(causal.base_model)
    targets = torch.zeros(len(states), dtype=torch.long)
    found = score(head, states, targets, 1.0, TokenStatistics(entropy=entropy), None, derivative)
    return found["loss"] if "loss" in found else sum((x.sum() for x in found.values()), torch.zeros(()))


def _derivative(values: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return values


def _cast(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
