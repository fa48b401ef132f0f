"""Optimizer step as an update rule sees it: functions of the loss and of the policy's distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(kw_only=True)
class Step:
    """Micro-batches of an optimizer step on this process, and functions of them.

    The functions use the policy as it is when they are called, unwrapped: gradients stay on this process.
    """

    micro_batches: list[Any]
    """Arguments of the functions. None is empty, although one may hold no sampled token."""
    loss: Callable[[Any], Tensor]
    """Return the micro-batch's share of the loss, a scalar: the sum over micro-batches and processes is the loss."""
    log_probs: Callable[[Any], Tensor]
    """Return the log-probs of the whole vocabulary (n, V) for n sampled tokens, at the rollout's temperature."""
    total: Callable[[Tensor], Tensor]
    """Return the sum of a tensor over all processes, without gradient."""
