"""The optimizer behind `trpo`: a natural-gradient step for the policy, AdamW for the critic's parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_rlhf.axes import Step


class TrustRegion(torch.optim.AdamW):
    """Optimizer with a natural-gradient step for group 0, the policy, and AdamW for the others, the critic's.

    The policy has no optimizer state. `step()` reads from `held` the rows that the gradient was computed from, and releases
    them. A policy without gradients stays unchanged. `measured` describes the last step: kl, improvement of the loss,
    backtracks (shorter steps tried), accepted.
    """

    def __init__(
        self,
        policy: Sequence[Tensor],
        critic: list[dict[str, Any]],
        *,
        max_kl: float,
        cg_iters: int,
        damping: float,
        backtracks: int,
        shrink: float,
    ):
        super().__init__([{"params": list(policy), "lr": 0.0, "weight_decay": 0.0}, *critic])
        self.max_kl, self.cg_iters, self.damping = max_kl, cg_iters, damping
        self.backtracks, self.shrink = backtracks, shrink
        self.held: Step | None = None
        self.measured: dict[str, float] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the policy within the trust region, then the critic. Raises `RuntimeError` if nothing is held."""
        if closure is not None:
            raise TypeError("optimizer.trpo takes no closure. Pass the step to evaluate again to hold(step)")
        held, self.held, self.measured = self.held, None, {}
        moved = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        if moved:
            if held is None:
                raise RuntimeError(
                    "optimizer.trpo has a gradient but not the rows it was computed from. Call hold(step) first"
                )
            with torch.no_grad():
                self.measured = self._move(moved, held)
        gradients = [p.grad for p in moved]
        for p in moved:
            p.grad = None  # AdamW skips parameters without one
        super().step()
        for p, gradient in zip(moved, gradients, strict=True):
            p.grad = gradient

    def _move(self, parameters: list[Tensor], step: Step) -> dict[str, float]:
        """Take the longest tried step that keeps the KL limit and lowers the loss; without one, restore the parameters."""
        old = [p.clone() for p in parameters]
        gradient = flat([p.grad for p in parameters])
        direction, curvature = conjugate_gradient(
            lambda v: fisher_product(parameters, step, v) + self.damping * v, gradient, self.cg_iters
        )
        result = {"kl": 0.0, "improvement": 0.0, "backtracks": float(self.backtracks), "accepted": 0.0}
        if not 0 < float(curvature) < float("inf"):
            return {**result, "backtracks": 0.0}
        before = total_loss(step)
        for tries in range(self.backtracks + 1):
            length = (2 * self.max_kl / curvature).sqrt() * self.shrink**tries
            new = [x - d for x, d in zip(old, unflat(length * direction, old), strict=True)]
            kl = mean_kl(parameters, old, new, step)
            improvement = before - total_loss(step)
            if kl <= self.max_kl and improvement > 0:
                return {"kl": kl, "improvement": improvement, "backtracks": float(tries), "accepted": 1.0}
        assign(parameters, old)
        return result


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Solve product(x) = b approximately and return x and x . product(x)."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = first = residual.dot(residual)
    for _ in range(iterations):
        if square <= 1e-20 * first:  # solved; 0 without a gradient
            break
        image = product(direction)
        curvature = direction.dot(image)
        if not curvature > 0:  # rounding, or not finite
            break
        size = square / curvature
        x, residual = x + size * direction, residual - size * image
        square, last = residual.dot(residual), square
        direction = residual + square / last * direction
    return x, x.dot(b - residual)


def fisher_product(parameters: list[Tensor], step: Step, vector: Tensor) -> Tensor:
    """Return F v: the mean over all tokens of the KL's second derivative at the current policy, times `vector`."""
    pieces, found, tokens = list(unflat(vector, parameters)), torch.zeros_like(vector), 0
    for micro in step.micro_batches:
        with torch.enable_grad():
            new = step.log_probs(micro)
            tokens += len(new)
            if not len(new):
                continue
            first = torch.autograd.grad(
                kl_sum(new.detach(), new), parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            slope = torch.stack([(g * v).sum() for g, v in zip(first, pieces, strict=True)]).sum()
        found += flat(torch.autograd.grad(slope, parameters, allow_unused=True, materialize_grads=True))
    return step.total(found) / step.total(found.new_tensor(tokens))


def mean_kl(parameters: list[Tensor], old: list[Tensor], new: list[Tensor], step: Step) -> float:
    """Return KL(old || new) per sampled token, over the whole vocabulary; leaves the parameters at `new`.

    Recomputes the old distributions for each micro-batch: for a whole step they would take (tokens, V).
    """
    found = torch.zeros(2, dtype=torch.float64)  # sum of the KL, number of tokens
    for micro in step.micro_batches:
        assign(parameters, old)
        before = step.log_probs(micro)
        assign(parameters, new)
        found = found.to(before.device) + torch.stack(
            [kl_sum(before, step.log_probs(micro)), before.new_tensor(len(before))]
        )
    summed = step.total(found)
    return float(summed[0] / summed[1])


def kl_sum(old: Tensor, new: Tensor) -> Tensor:
    """Return the sum over tokens of KL(old || new), from log-probs (n, V)."""
    return (old.exp() * (old - new).masked_fill(old == float("-inf"), 0.0)).sum()


def total_loss(step: Step) -> float:
    """Return the loss of the whole step, over all processes."""
    return float(step.total(torch.stack([step.loss(micro).detach() for micro in step.micro_batches]).sum()))


def assign(parameters: list[Tensor], values: list[Tensor]) -> None:
    """Set the parameters in place."""
    for p, x in zip(parameters, values, strict=True):
        p.copy_(x)


def flat(tensors: Any) -> Tensor:
    """Concatenate the tensors to one vector, in float32 or better."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return torch.cat([x.detach().reshape(-1).to(wide) for x in tensors])


def unflat(vector: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """Split the vector into tensors with the shapes and dtypes of `like`."""
    parts = vector.split([x.numel() for x in like])
    return (part.view_as(x).to(x.dtype) for part, x in zip(parts, like, strict=True))
