"""Send weights through a shared folder in half precision: half the bytes to write and to read.

Try it with a server that `hf-rlhf serve-engine quickstart rollout.use=vllm` starts:
`hf-rlhf train quickstart 'rollout={use: vllm, sync: half_folder}'`
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, EngineServer, Weights, WeightSync

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class HalfFolder(WeightSync):
    """Write the weights in bfloat16; a server that computes in bfloat16 loses nothing by it."""

    name = "half_folder"

    path: str = str(Path(tempfile.gettempdir()) / "hf_rlhf_half_folder")
    """Folder that every server can read."""

    def __post_init__(self) -> None:
        self._first = True

    def setup(self, context: Context) -> None:
        """Note whether this process writes."""
        self._first = context.process_index == 0

    def collect(self, weights: Weights) -> None:
        """Write the weights from the first process."""
        half = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in weights.named()}
        if self._first:
            weights.policy.model.save_pretrained(self.path, state_dict=half)

    async def send(self, server: EngineServer) -> None:
        """Let a server load the folder."""
        await server.call("hf_rlhf_load", self.path)


@hookimpl
def sync() -> list[type[WeightSync]]:
    return [HalfFolder]
