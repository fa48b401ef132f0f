"""Weights in place on one GPU that training and server share, through vLLM's own backend of its weight transfer API.

The server gets handles of the policy's CUDA memory (CUDA IPC) and copies from there. It has one worker, on the GPU of the first
process. No GPU was at hand: this was not run.
"""

from __future__ import annotations

import base64
import pickle
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
class Ipc(FromGpu):
    """Hands the server the policy's memory on the GPU that both share."""

    name = "ipc"
    backend = "ipc"

    def serve_flags(self) -> tuple[dict[str, str], list[str]]:
        """Return the backend's flag, and the variable that lets vLLM read handles, which are pickled."""
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, super().serve_flags()[1]

    def _rendezvous(self, server: EngineServer, world: int) -> tuple[dict[str, Any], Callable[[], Any]]:
        if world != 2:
            raise ValueError(
                f"rollout.sync=ipc needs a server of one worker on the training's GPU, got {world - 1} at {server.url}. Set "
                "rollout.sync.use=nccl"
            )
        return {"packed": False}, lambda: None

    def _handles(self, tensors: list[tuple[str, Tensor]]) -> dict[str, Any]:
        """Return the handles as vLLM's HTTP client sends them: per tensor, GPU -> arguments that rebuild it."""
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = str(torch.cuda.get_device_properties(self._device).uuid)
        handles = [{gpu: reduce_tensor(x)[1]} for _, x in tensors]
        torch.cuda.synchronize(self._device)
        return {"ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode("ascii")}

    def _broadcast(self, group: Any, tensors: list[Tensor]) -> None:
        """Nothing travels: the tensors are the policy's, or copies that `collect` holds, until the server has read them."""


@hookimpl
def sync() -> list[type[WeightSync]]:
    return [Ipc]
