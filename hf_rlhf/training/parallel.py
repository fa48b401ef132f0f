"""Parallelism of policy and critic: replicated on each process, gradients averaged (DistributedDataParallel).

No other module depends on it: code that wraps a module, splits a step into micro-batches, reads a norm, or reads whole
weights to save, merge or send them, calls this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Parallel:
    """Wrap, synchronize and clip a module on the processes of an `Accelerator`."""

    accelerator: Accelerator

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module whose backward averages gradients over processes."""
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

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
        """Accumulate the gradients of one micro-batch; processes average them at the last one of a step."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last else self.accelerator.no_sync(wrapped):
            yield

    def clip_grad_norm(self, module: nn.Module, limit: float) -> Any:
        """Scale the module's gradients to at most this norm, and return the norm they had."""
        return self.accelerator.clip_grad_norm_(module.parameters(), limit)


def gradients_are_finite(module: nn.Module) -> bool:
    """Return whether every gradient of the module, the same on every process, is finite."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    return not gradients or bool(torch.stack(torch._foreach_norm(gradients, 2, wide)).isfinite().all())


def whole_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of every parameter and persistent buffer, by the names of `state_dict`, one at a time.

    Every process iterates together. The tensors are the module's own: copy what is kept beyond the next optimizer step.
    """
    yield from module.state_dict().items()


def state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the `whole_parameters` by name, as `save_pretrained` and `load_state_dict` take them."""
    return dict(whole_parameters(module))


def load_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `state_dict` returned, on any number of processes."""
    module.load_state_dict(dict(tensors))
