"""One optimizer step as an update rule sees it: the loss and the policy's distributions, again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(kw_only=True)
class Step:
    """What the gradient of an optimizer step was made from, on this process.

    Functions of a micro-batch use the policy as it is when they are called, unwrapped: gradients stay on this process.
    """

    micro_batches: list[Any]
    """Each function takes one of these; none is empty, though one may hold no sampled token."""
    loss: Callable[[Any], Tensor]
    """The micro-batch's share of the step's loss, a scalar: the sum over micro-batches and processes is the loss."""
    log_probs: Callable[[Any], Tensor]
    """(n, V) log-probs of the whole vocabulary at the rollout's temperature, where each of n sampled tokens was chosen."""
    total: Callable[[Tensor], Tensor]
    """The sum of a tensor over all processes, without gradient."""
