"""bitsandbytes on the CPU: one way to compute, whether a module trains or not.

In evaluation mode its layers take other kernels than in training mode there: 4-bit weights are packed anew for bfloat16 where
the processor has AVX512-BF16, and 8-bit layers round what they are given to 8 bits as well. A sampled token would then have
another log-prob in the rollout than in the update.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def compute_alike(model: nn.Module) -> None:
    """Lets every quantised layer on the CPU compute in evaluation mode as it does in training mode, in place."""
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
    """`Linear8bitLt` that stays in training mode: it has no dropout, and what it is given is not rounded."""
    from bitsandbytes.nn import Linear8bitLt

    class Steady8bit(Linear8bitLt):
        """Computes as in training, whatever mode it is set to."""

        def train(self, mode: bool = True) -> Steady8bit:
            return super().train(True)

    return Steady8bit
