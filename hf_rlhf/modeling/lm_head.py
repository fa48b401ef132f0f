"""Log-probs and statistics of the next token's distribution from hidden states, a chunk of tokens at a time.

The logits of all tokens are never in memory at once: a chunk is computed, read and dropped, and computed again in the
backward. Where the loss of a token depends on that token alone, its derivative is known in the forward, and the logits of a
chunk serve both passes (`Derivative`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS, LOGITS_ON_GPU = 2**22, 2**28
"""Largest chunk of logits (16 MiB in float32; on a GPU, which small products leave idle, 1 GiB); two such chunks are in memory
where more than the log-prob is wanted."""
IMPOSSIBLE = -1e4
"""Stand-in for a log-prob of -inf: its probability is 0 in every dtype, and it stays finite under any factor."""
TOKENS = 256
"""Smallest chunk in tokens: with fewer, adding to the gradient of the head would dominate the time."""

Measure = Callable[[Tensor, slice], Tensor]
"""(log-probs (c, V) of c sampled tokens, their slice of the n) -> (c,)."""
Derivative = Callable[[dict[str, Tensor], slice], dict[str, Tensor]]
"""({name: (c,)} of c sampled tokens, their slice of the n) -> {name: (c,)}: the derivative of the loss by each."""


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics wanted of each distribution, besides the sampled token's log-prob."""

    entropy: bool = False
    sum_sq_probs: bool = False

    @property
    def names(self) -> list[str]:
        return ["logps", *(name for name in ("entropy", "sum_sq_probs") if getattr(self, name))]


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = cap tanh(scale W h / cap), without the tanh if `cap` is None."""

    module: Any
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Map states (c, H) to logits (c, V)."""
        logits = self.module(states)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @property
    def plain(self) -> bool:
        """True if the head is a plain matrix product: no adapter, no hook, no cap."""
        module = self.module
        hooked = (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        return type(module) is nn.Linear and not hooked and self.cap is None


def head_of(causal: Any) -> Head | None:
    """Return the head of a transformers model with the scale and cap of its configuration; None if it has no head."""
    module, config = causal.get_output_embeddings(), causal.config.get_text_config()
    if module is None:
        return None
    scale = getattr(config, "logit_scale", None) or 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = scale / divisor
    return Head(module, float(scale), getattr(config, "final_logit_softcapping", None))


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def with_rest(top: Tensor) -> Tensor:
    """Append to log-probs (n, k) that of all other tokens, at least the log of the dtype's epsilon: (n, k + 1)."""
    rest = -top.logsumexp(-1, keepdim=True).expm1()
    return torch.cat([top, rest.clamp(min=torch.finfo(top.dtype).eps).log()], -1)


def tokens_at_a_time(vocabulary: int, device: torch.device) -> int:
    """Return the number of tokens per chunk of logits."""
    return max(TOKENS, (LOGITS_ON_GPU if device.type == "cuda" else LOGITS) // vocabulary)


def score(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    wanted: TokenStatistics,
    measures: Mapping[str, Measure] | None = None,
    derivative: Derivative | None = None,
) -> dict[str, Tensor]:
    """Score the tokens `targets` (n,) from states (n, H): logps, `wanted` (entropy in nats) and `measures`, each (n,).

    With a `derivative` these carry no gradient; instead `loss`, a zero, has the gradient of the states and the head.
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
    """Score with any head and any measure; each chunk runs under autograd and again in the backward."""

    def chunk(states: Tensor, part: slice) -> tuple[Tensor, ...]:
        log_probs = (at_least_float32(head(states)) / temperature).log_softmax(-1)
        return tuple(_read(log_probs, targets[part], wanted)) + tuple(m(log_probs, part) for m in measures.values())

    pieces, size = [], min(256, tokens_at_a_time(_vocabulary(head, states), states.device))
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
    """Return the log-probs (n, V) of the whole vocabulary at once, for small models and second derivatives."""
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
        with torch.autocast(kind, enabled=False):  # it would round the products that sum entropy and squares
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
    """Return the log normalizer (c,) and the statistics of logits (c, V), which become log-probs in place if `keep`.

    A second tile holds the probabilities where more than the log-prob is wanted.
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
    """Compute the logits of one chunk after another in one buffer, and add each chunk's gradients."""

    def __init__(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, dtype: torch.dtype
    ):
        self.inputs, self.targets, self.scale = (states, weight, bias), targets, scale
        self.states, self.weight = states.detach().to(dtype), weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        size = tokens_at_a_time(len(weight), weight.device)
        self.parts = [slice(i, min(i + size, len(states))) for i in range(0, len(states), size)] or [slice(0, 0)]
        wide = at_least_float32(self.states[:0]).dtype
        self.buffer = states.new_empty((min(size, len(states)), len(weight)), dtype=wide)

    def logits(self, part: slice) -> Tensor:
        """Return logits (c, V) in the buffer, in float32 or better. Half precision is rounded as in a plain forward."""
        z = self.buffer[: part.stop - part.start]
        with torch.autocast(z.device.type, enabled=False):
            if self.bias is None and self.weight.dtype == z.dtype:
                torch.mm(self.states[part], self.weight.t(), out=z)
            else:
                z.copy_(nn.functional.linear(self.states[part], self.weight, self.bias))
        return z if self.scale == 1 else z.mul_(self.scale)

    def gradients(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Return zeros for states, weight and bias where a gradient is needed, else None."""
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
        """Add the gradients of one chunk. `z` holds its log-probs (c, V) and is overwritten; `outer` is the derivative of the
        loss by `values`."""
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
        """Return the derivative of the loss by the logits (c, V), without the term of the sampled tokens, in place of `z`. A
        second tile holds p where entropy or sum of squares are differentiated."""
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
