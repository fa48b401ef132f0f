"""Make bitsandbytes on a CPU compute the same in evaluation as in training.

Without it (bitsandbytes 0.50): on a processor with AVX512-BF16 the first evaluation of a 4-bit layer repacks its weights for
bfloat16, which raises a RuntimeError for narrow layers, and 8-bit layers round their inputs to 8 bits in evaluation only. A
sampled token would have another log-prob in the rollout than in the update.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def compute_alike(model: nn.Module) -> None:
    """Make every quantised layer on the CPU compute in evaluation mode as in training mode, in place."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt) and module.weight.device.type == "cpu":
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
            else:
                module.__class__ = _steady()
                module.train()


@cache
def _steady() -> Any:
    """Return a `Linear8bitLt` that stays in training mode, where inputs are not rounded; it has no dropout."""
    from bitsandbytes.nn import Linear8bitLt

    class Steady8bit(Linear8bitLt):
        """Compute as in training, whatever mode it is set to."""

        def train(self, mode: bool = True) -> Steady8bit:
            return super().train(True)

    return Steady8bit
