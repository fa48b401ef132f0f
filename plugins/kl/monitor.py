"""KL that is only logged; costs the reference's forward pass and changes no gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLPlacement

from ._remarks import of_the_value

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class Monitor(KLPlacement):
    """Logs the KL and adds it to nothing."""

    name = "monitor"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from of_the_value(self)


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [Monitor]
