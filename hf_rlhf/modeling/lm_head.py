"""From hidden states to what is asked of the next token's distribution, a chunk of tokens at a time.

The logits of all tokens are never held at once: a chunk's are made, read and dropped, and made again in the backward.
Where the loss of a token depends on that token alone, its derivative is known in the forward, and a chunk's logits serve
for both (`Derivative`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS = 2**22
"""Most logits that are held at a time (16 MiB in float32), twice where more than the log-prob is asked for."""
IMPOSSIBLE = -1e4
"""A log-prob whose probability is 0 in every type, and that stays finite under any factor: it stands for -inf."""
TOKENS = 128
"""Tokens whose logits are held at a time at least: with fewer, adding to the gradient of the head would take the time."""

Measure = Callable[[Tensor, slice], Tensor]
"""((c, V) log-probs of c sampled tokens, which of the n they are) -> (c,)."""
Derivative = Callable[[dict[str, Tensor], slice], dict[str, Tensor]]
"""({name: (c,)} of c sampled tokens, which of the n they are) -> {name: (c,)}: the loss differentiated by each."""


@dataclass(frozen=True)
class TokenStatistics:
    """What is asked of each distribution, beside the sampled token's log-prob."""

    entropy: bool = False
    sum_sq_probs: bool = False

    @property
    def names(self) -> list[str]:
        return ["logps", *(name for name in ("entropy", "sum_sq_probs") if getattr(self, name))]


@dataclass(frozen=True)
class Head:
    """logits = cap tanh(scale W h / cap), without the tanh where `cap` is None."""

    module: Any
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """(c, H) -> (c, V)."""
        logits = self.module(states)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @property
    def plain(self) -> bool:
        """Whether it is one matrix product of which nothing else knows: no adapter, no hook, no cap."""
        module = self.module
        hooked = (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        return type(module) is nn.Linear and not hooked and self.cap is None


def head_of(causal: Any) -> Head | None:
    """The head of a transformers model with the scale and cap that its configuration names; None where it has no head."""
    module, config = causal.get_output_embeddings(), causal.config.get_text_config()
    if module is None:
        return None
    scale = getattr(config, "logit_scale", None) or 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = scale / divisor
    return Head(module, float(scale), getattr(config, "final_logit_softcapping", None))


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision numbers as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def tokens_at_a_time(vocabulary: int) -> int:
    """How many tokens' logits make a chunk."""
    return max(TOKENS, LOGITS // vocabulary)


def score(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    wanted: TokenStatistics,
    measures: Mapping[str, Measure] | None = None,
    derivative: Derivative | None = None,
) -> dict[str, Tensor]:
    """(n, H) states, (n,) sampled tokens -> name -> (n,): logps, what is `wanted` (entropy in nats) and the `measures`.

    With a `derivative` the numbers carry no gradient; instead `loss`, a zero, has that of the states and the head.
    """
    if isinstance(head, Head) and head.plain and not measures:
        values = _Scores.apply(
            states, head.module.weight, head.module.bias, targets, head.scale / temperature, wanted, derivative
        )
        return dict(zip([*wanted.names, "loss"][: len(values)], values, strict=True))
    return _by_chunks(head, states, targets, temperature, wanted, measures or {})


def _by_chunks(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    wanted: TokenStatistics,
    measures: Mapping[str, Measure],
) -> dict[str, Tensor]:
    """The same for any head and any measure, each chunk under autograd and made again in the backward."""

    def chunk(states: Tensor, part: slice) -> tuple[Tensor, ...]:
        log_probs = (at_least_float32(head(states)) / temperature).log_softmax(-1)
        return tuple(_read(log_probs, targets[part], wanted)) + tuple(m(log_probs, part) for m in measures.values())

    pieces, size = [], min(256, tokens_at_a_time(_vocabulary(head, states)))
    for start in range(0, max(1, len(states)), size):
        part = slice(start, min(start + size, len(states)))
        if torch.is_grad_enabled():
            pieces.append(checkpoint(chunk, states[part], part, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(chunk(states[part], part))
    names = [*wanted.names, *measures]
    return {name: torch.cat(columns) for name, columns in zip(names, zip(*pieces, strict=True), strict=True)}


def _vocabulary(head: Any, states: Tensor) -> int:
    weight = getattr(head.module, "weight", None) if isinstance(head, Head) else None
    return len(weight) if weight is not None else states.size(-1)


def _read(log_probs: Tensor, targets: Tensor, wanted: TokenStatistics) -> list[Tensor]:
    found = [log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)]
    if wanted.entropy:
        found.append(-(log_probs.exp() * log_probs.clamp(min=IMPOSSIBLE)).sum(-1))
    if wanted.sum_sq_probs:
        found.append((2 * log_probs).exp().sum(-1))
    return found


def whole(head: Callable[[Tensor], Tensor], states: Tensor, temperature: float) -> Tensor:
    """(n, V) log-probs of all tokens at once, for small models and second derivatives."""
    return (at_least_float32(head(states)) / temperature).log_softmax(-1)


class _Scores(torch.autograd.Function):
    """Log-prob, entropy and sum of squares of p = softmax(scale (W h + b)) with one tile of logits in memory.

    d logp / d z = e_y - p; d entropy / d z = -p (log p + entropy); d sum_sq / d z = 2 p (p - sum_sq).
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        wanted: TokenStatistics,
        derivative: Derivative | None,
    ) -> tuple[Tensor, ...]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        tile = _Tile(states, weight, bias, targets, scale, dtype)
        gradients = None if derivative is None else tile.gradients(ctx.needs_input_grad)
        found: list[tuple[Tensor, ...]] = []
        with torch.autocast(kind, enabled=False):  # it would round the products in which entropy and squares are summed
            for part in tile.parts:
                z = tile.logits(part)
                lse, values = _read_tile(z, targets[part], wanted, keep=derivative is not None)
                if derivative is not None and gradients is not None:
                    named = dict(zip(wanted.names, values, strict=True))
                    tile.add(gradients, part, z, named, derivative(named, part))
                found.append((lse, *values))
        lse, *values = (torch.cat(column) for column in zip(*found, strict=True))
        ctx.constants, ctx.gradients = (scale, dtype, wanted.names), gradients
        ctx.set_materialize_grads(False)
        if gradients is not None:
            ctx.mark_non_differentiable(*values)
            return (*values, lse.new_zeros(()))
        ctx.save_for_backward(states, weight, bias, targets, lse, *values)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None
            for x in gradients:
                if x is not None and outer[-1] is not None:
                    x.mul_(outer[-1])
            return (*gradients, None, None, None, None)
        scale, dtype, names = ctx.constants
        states, weight, bias, targets, lse, *values = ctx.saved_tensors
        tile = _Tile(states, weight, bias, targets, scale, dtype)
        gradients = tile.gradients(ctx.needs_input_grad)
        for part in tile.parts:
            z = tile.logits(part).sub_(lse[part].unsqueeze(1))
            own = {name: x[part] for name, x in zip(names, values, strict=True)}
            wrt = {name: g[part] for name, g in zip(names, outer, strict=True) if g is not None}
            tile.add(gradients, part, z, own, wrt)
        return (*gradients, None, None, None, None)


def _read_tile(z: Tensor, targets: Tensor, wanted: TokenStatistics, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(c,) log of the normaliser, and what is asked of (c, V) logits, which become log-probs where `keep` says so.

    A second tile holds the probabilities where more than the log-prob is asked for.
    """
    top = z.amax(1)
    z.sub_(top.unsqueeze(1))
    chosen = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    more = wanted.entropy or wanted.sum_sq_probs
    p = z.exp() if more or keep else z.exp_()
    total = p.sum(1)
    log_total = total.log()
    found = [chosen - log_total]
    if wanted.entropy:  # log of the normaliser minus the mean of z; a logit of -inf has no share in it
        found.append(log_total - torch.linalg.vecdot(p, z.clamp_(min=IMPOSSIBLE)) / total)
    if wanted.sum_sq_probs:
        found.append(torch.linalg.vecdot(p, p) / total**2)
    if keep:
        z.sub_(log_total.unsqueeze(1))
    return top + log_total, found


class _Tile:
    """The logits of one chunk after the other, in one buffer, and what each chunk adds to the gradients."""

    def __init__(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, dtype: torch.dtype
    ):
        self.inputs, self.targets, self.scale = (states, weight, bias), targets, scale
        self.states, self.weight = states.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        size = tokens_at_a_time(len(weight))
        self.parts = [slice(i, min(i + size, len(states))) for i in range(0, len(states), size)] or [slice(0, 0)]
        wide = at_least_float32(self.states[:0]).dtype
        self.buffer = states.new_empty((min(size, len(states)), len(weight)), dtype=wide)

    def logits(self, part: slice) -> Tensor:
        """(c, V), in float32 or better, in the buffer. Half precision is rounded as a plain forward rounds it."""
        z = self.buffer[: part.stop - part.start]
        with torch.autocast(z.device.type, enabled=False):
            if self.bias is None and self.weight.dtype == z.dtype:
                torch.mm(self.states[part], self.weight.t(), out=z)
            else:
                z.copy_(nn.functional.linear(self.states[part], self.weight, self.bias))
        return z if self.scale == 1 else z.mul_(self.scale)

    def gradients(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Zeros for states, weight and bias, those that are needed."""
        return [
            torch.zeros_like(x) if need and x is not None else None
            for need, x in zip(needed, self.inputs, strict=False)
        ]

    def add(
        self,
        gradients: list[Tensor | None],
        part: slice,
        z: Tensor,
        values: dict[str, Tensor],
        outer: dict[str, Tensor],
    ) -> None:
        """One chunk's share. `z` are its (c, V) log-probs and is overwritten; `outer` differentiates the loss by `values`."""
        by_logp = outer.get("logps", z.new_zeros(len(z))).to(z.dtype)
        dz = self._by_logits(z, by_logp, values, outer)
        dz.scatter_add_(1, self.targets[part].unsqueeze(1), by_logp.unsqueeze(1))
        if self.scale != 1:
            dz *= self.scale
        by_state, by_weight, by_bias = gradients
        small = dz.to(self.weight.dtype)
        with torch.autocast(z.device.type, enabled=False):
            if by_state is not None:
                by_state[part] = (small @ self.weight).to(by_state.dtype)
            if by_weight is not None:
                if by_weight.dtype == small.dtype:
                    by_weight.addmm_(small.t(), self.states[part])
                else:
                    by_weight += (small.t() @ self.states[part]).to(by_weight.dtype)
            if by_bias is not None:
                by_bias += dz.sum(0).to(by_bias.dtype)

    @staticmethod
    def _by_logits(z: Tensor, by_logp: Tensor, values: dict[str, Tensor], outer: dict[str, Tensor]) -> Tensor:
        """(c, V) the loss differentiated by the logits, but for what `by_logp` adds to those of the sampled tokens. In the
        place of `z`; a second tile holds p where entropy or sum of squares are differentiated."""
        by_entropy, by_squares = outer.get("entropy"), outer.get("sum_sq_probs")
        if by_entropy is None and by_squares is None:
            return z.exp_().mul_(-by_logp.unsqueeze(1))
        p, constant = z.exp(), by_logp
        if by_entropy is None:
            z.zero_()
        else:
            z.clamp_(min=IMPOSSIBLE).mul_(-by_entropy.unsqueeze(1))
            constant = constant + by_entropy * values["entropy"]
        if by_squares is not None:
            z.addcmul_(p, 2 * by_squares.unsqueeze(1))
            constant = constant + 2 * by_squares * values["sum_sq_probs"]
        return z.sub_(constant.unsqueeze(1)).mul_(p)
