"""Weights over NCCL, from GPU to GPU, through vLLM's own backend of its weight transfer API.

The training creates NCCL's unique id and joins as the first rank, by `torch.cuda.nccl`: vLLM is not in its environment. The
NCCL of both environments must be able to speak with each other. No GPU was at hand: this was not run.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import WeightSync

from ._transfer import FromGpu

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import EngineServer


@dataclass(kw_only=True)
class Nccl(FromGpu):
    """Sends the weights over NCCL."""

    name = "nccl"
    backend = "nccl"

    def _rendezvous(self, server: EngineServer, world: int) -> tuple[dict[str, Any], Callable[[], Any]]:
        from torch.cuda import nccl

        unique = nccl.unique_id()
        info = {
            "rank_offset": 1,
            "world_size": world,
            "nccl_unique_id_b64": base64.b64encode(bytes(unique)).decode("ascii"),
        }
        return info, lambda: self._join(unique, world)

    def _join(self, unique: Any, world: int) -> Any:
        """Return a communicator; vLLM's workers begin with a sum of one number."""
        import torch
        from torch.cuda import nccl

        with torch.cuda.device(self._device):
            group = nccl.init_rank(world, unique, 0)
            nccl.all_reduce([torch.zeros(1, device=self._device)], comms=[group])
            torch.cuda.synchronize()
        return group

    def _broadcast(self, group: Any, tensors: list[Tensor]) -> None:
        import torch
        from torch.cuda import nccl

        with torch.cuda.device(self._device):
            for tensor in tensors:
                nccl.broadcast([tensor], comms=[group])
            torch.cuda.synchronize()


@hookimpl
def sync() -> list[type[WeightSync]]:
    return [Nccl]
