"""KL estimator from a Python function of yours, `kl(logps, ref_logps)`: the short door before a plugin.

Further parameters without a default are what it needs, of the same shape: `def kl(logps, ref_logps, old_logps)`. Before a
model is loaded it is checked by the facts of the conformance kit. Set `kl.stops_gradient = True` for one that detaches a part
of its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

from .._functions import FromFunction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Function(FromFunction, KLEstimator):
    """The KL (...), elementwise, that the function returns."""

    name = "function"
    KIND = "KL function"
    GIVEN = ("logps", "ref_logps")
    PROPERTIES = ("stops_gradient",)

    def __call__(self, logps: Tensor, ref_logps: Tensor, **needed: Tensor) -> Tensor:
        value: Tensor = self._call({"logps": logps, "ref_logps": ref_logps, **needed})
        return value


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [Function]
