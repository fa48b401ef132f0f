"""KL that is only logged; it costs the reference's forward pass and changes no gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLPlacement

from ._probe import is_exponential

if TYPE_CHECKING:
    from hf_rlhf.algorithm import Algorithm


@dataclass(kw_only=True)
class Monitor(KLPlacement):
    """Measures the KL and adds it nowhere."""

    name = "monitor"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.level == "sequence" and is_exponential(self.estimator):
            yield f"{self.estimator.name} at level sequence is the exponential of a sum and may overflow"


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [Monitor]
