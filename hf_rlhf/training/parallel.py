"""Parallelism of policy and critic: replicated on each process, gradients averaged (DistributedDataParallel), or sharded (FSDP2).

No other module depends on it: code that wraps a module, splits a step into micro-batches, reads a norm, or reads whole
weights to save, merge or send them, calls this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_rlhf.config.sharding import Sharding
from hf_rlhf.modeling.sharding import (
    load_optimizer_shards,
    load_whole,
    local,
    optimizer_state,
    reshard,
    shard,
    whole,
    whole_parameters,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "Parallel",
    "gradients_are_finite",
    "load_optimizer_shards",
    "load_state_dict",
    "optimizer_state",
    "state_dict",
]
__all__ += ["whole", "whole_parameters"]


@dataclass(frozen=True)
class Parallel:
    """Wrap, synchronize and clip a module on the processes of an `Accelerator`."""

    accelerator: Accelerator
    sharding: Sharding | None = None
    roots: list[Any] = field(default_factory=list)
    """Sharded modules; empty where each process holds whole ones."""

    def shard(self, root: nn.Module) -> None:
        """Shard an `ActorCritic` over all processes."""
        assert self.sharding is not None
        shard(root, self.accelerator.device, self.sharding.reshard_after_forward)
        self.roots.append(root)

    def reshard(self) -> None:
        """Free the whole weights that are kept after a forward, for a backward that may not come."""
        for root in self.roots:
            reshard(root)

    def most(self, count: int) -> int:
        """Return the largest of the processes' counts where they are sharded, as all run as many forwards; else `count`."""
        if self.sharding is None:
            return count
        found = torch.tensor(count, device=self.accelerator.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module whose backward averages gradients over processes."""
        if self.sharding is not None:
            return module
        wrapped: nn.Module = self.accelerator.prepare_model(module, device_placement=False)  # a critic may be elsewhere
        return wrapped

    def count_as_prepared(self, module: Any) -> None:
        """Keep Trainer from wrapping a module, which gets autocast alone."""
        module._is_accelerate_prepared = False  # TRL prepares references itself
        self.accelerator.prepare_model(module, evaluation_mode=True)

    def unwrap(self, module: Any) -> Any:
        """Return the module that was wrapped."""
        return self.accelerator.unwrap_model(module)

    def forget(self, module: Any) -> None:
        """Let a module that an evaluation has prepared be wrapped again: else processes would silently not average gradients."""
        self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        self.accelerator._models.clear()
        module._is_accelerate_prepared = False

    @contextmanager
    def micro_batch(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Accumulate the gradients of one micro-batch; processes average them at the last one of a step, shards at each one."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last or self.sharding is not None else self.accelerator.no_sync(wrapped):
            yield

    def clip_grad_norm(self, module: nn.Module, limit: float) -> Any:
        """Scale the module's gradients to at most this norm, and return the norm they had."""
        if self.sharding is None:
            return self.accelerator.clip_grad_norm_(module.parameters(), limit)
        gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
        if not gradients:  # of none, on every process alike
            return torch.zeros((), device=self.accelerator.device)
        square = torch.stack(torch._foreach_norm(gradients, 2)).square().sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        if math.isfinite(limit):
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gradients_are_finite(self, module: nn.Module) -> bool:
        """Return whether every gradient of the module, on every process, is finite."""
        return not self.most(int(not gradients_are_finite(module)))


def gradients_are_finite(module: nn.Module) -> bool:
    """Return whether every gradient of the module, of a sharded one this process's part, is finite."""
    gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    if not gradients:
        return True
    norms = [x.to(gradients[0].device) for x in torch._foreach_norm(gradients, 2, wide)]
    return bool(torch.stack(norms).isfinite().all())


def state_dict(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Return the `whole_parameters` by name, as `save_pretrained` and `load_state_dict` take them.

    All processes call it together. Of a sharded module only those that `keep` get them.
    """
    return {name: x for name, x in whole_parameters(module) if keep}


def load_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `state_dict` returned, on any number of processes."""
    load_whole(module, tensors)
