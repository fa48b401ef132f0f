"""Constant beta."""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLController


@dataclass(kw_only=True)
class Fixed(KLController):
    """Keeps the recipe's beta for the whole run."""

    name = "fixed"

    def __call__(self, beta: float) -> float:
        return beta


@hookimpl
def kl_controller() -> list[type[KLController]]:
    return [Fixed]
