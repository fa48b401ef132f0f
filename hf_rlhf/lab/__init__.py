"""The lab: exact expected gradients of plugin combinations, by enumeration of a small tabular policy.

    from hf_rlhf.lab import run

    for row in run("rloo", ["aggregation=token_mean"]):
        print(row.aggregation, row.objective, row.cosine, row.is_gradient)

`run` returns one `hf_rlhf.lab.study.Row` per aggregation; `Matrix().sections()` the rows of every combination that the
installed plugins allow; `World` defines what is enumerated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_rlhf.lab.matrix import Matrix
    from hf_rlhf.lab.single import run
    from hf_rlhf.lab.world import World

__all__ = ["Matrix", "World", "run"]


def __getattr__(name: str) -> Any:
    homes = {"Matrix": "matrix", "World": "world", "run": "single"}
    if name not in homes:
        raise AttributeError(f"module 'hf_rlhf.lab' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"hf_rlhf.lab.{homes[name]}"), name)
