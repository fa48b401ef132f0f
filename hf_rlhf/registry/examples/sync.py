"""Send weights through a shared folder in half precision: half the bytes to write and to read.

Try it: `hf-rlhf train quickstart 'rollout={use: vllm, sync: half_folder}'`

`hf-rlhf serve-engine` starts the server that it needs.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hf_rlhf import hookimpl
from hf_rlhf.axes import EngineServer, Weights, WeightSync

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class HalfFolder(WeightSync):
    """Write the weights in bfloat16; a server that computes in bfloat16 loses nothing by it."""

    name = "half_folder"

    path: str = str(Path(tempfile.gettempdir()) / "hf_rlhf_half_folder")
    """Folder that every server can read."""

    def collect(self, weights: Weights) -> None:
        """Take the weights in half precision."""
        self._half = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in weights.named()}
        self._model = weights.policy.model

    async def send(self, server: EngineServer) -> None:
        """Write a folder for a server, and let it load that."""
        folder = str(Path(self.path) / server.url.rpartition(":")[2])
        self._model.save_pretrained(folder, state_dict=self._half)
        await server.call("hf_rlhf_load", folder)


@hookimpl
def sync() -> list[type[WeightSync]]:
    return [HalfFolder]
