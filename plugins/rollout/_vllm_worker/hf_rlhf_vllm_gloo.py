"""Backend `gloo` of vLLM's weight transfer API: tensors from a training on another machine, or without a GPU."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class Init(WeightTransferInitInfo):
    """Address at which the training waits, and the number of processes with it."""

    address: str
    port: int
    world: int
    seconds: float


@dataclass
class Update(WeightTransferUpdateInfo):
    """The tensors that come, in turn."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class Gloo(WeightTransferEngine):
    """Receive each tensor as a broadcast of rank 0, the training."""

    init_info_cls = Init
    update_info_cls = Update
    group: Any = None

    def init_transfer_engine(self, init_info: Init) -> None:
        """Join the training."""
        patience = timedelta(seconds=init_info.seconds)
        store = TCPStore(init_info.address, init_info.port, init_info.world, is_master=False, timeout=patience)
        with socket.create_connection((init_info.address, init_info.port), init_info.seconds) as towards:
            address = towards.getsockname()[0]
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = patience
        own = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        self.group = gloo(store, 1 + own, init_info.world, options)

    def start_weight_update(self) -> None:
        """Begin to load."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load; vLLM's own waits for an accelerator afterwards, and there may be none."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Update) -> None:
        """Load the tensors as they come."""
        self.model.load_weights(self._tensors(update_info))

    def _tensors(self, update_info: Update) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            self.group.broadcast([tensor]).wait()
            yield name, tensor

    def finish_weight_update(self) -> None:
        """Put what was loaded in place."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Drop the connection."""
        self.group = None
