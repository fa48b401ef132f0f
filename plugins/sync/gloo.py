"""Weights over gloo, from main memory over the network: for servers on CPUs, and to run on a CPU the calls that `nccl` makes.

vLLM's weight transfer API gets the backend from the worker extension. The servers connect to a port of the training's machine.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hf_rlhf import hookimpl
from hf_rlhf.axes import WeightSync

from ._transfer import Transfer

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import EngineServer

SECONDS = 120
"""Longest wait for the other side."""


@dataclass(kw_only=True)
class Gloo(Transfer):
    """Sends the weights over gloo."""

    name = "gloo"
    backend = "gloo"

    def _rendezvous(self, server: EngineServer, world: int) -> tuple[dict[str, Any], Callable[[], Any]]:
        from torch.distributed import TCPStore

        address, patience = address_towards(server.url), timedelta(seconds=SECONDS)
        store = TCPStore(address, 0, world, is_master=True, timeout=patience, wait_for_workers=False)
        info = {"address": address, "port": store.port, "world": world, "seconds": SECONDS}
        return info, lambda: join(store, address, world, patience)

    def _broadcast(self, group: Any, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            group.broadcast([tensor.cpu()]).wait()


def address_towards(url: str) -> str:
    """Return the address of this machine from which it reaches the host of a URL."""
    parts = urlsplit(url)
    family, kind, protocol, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as towards:
        towards.connect(place)  # of datagrams: nothing is sent
        return str(towards.getsockname()[0])


def join(store: Any, address: str, world: int, patience: timedelta) -> Any:
    """Return the group of this process, the first one, and a server's workers."""
    from torch.distributed import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = patience
    return gloo(store, 0, world, options)


@hookimpl
def sync() -> list[type[WeightSync]]:
    return [Gloo]
