"""Weights through vLLM's weight transfer API: its workers connect once, then start an update, receive, and finish it.

The worker extension makes these four calls of vLLM's workers, an update's in one request: no two processes can be in the middle
of one, and what fails is reported instead of ending vLLM's engine. `gloo`, `nccl` and `ipc` differ in how tensors travel alone.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_rlhf.axes import Context, WeightSync

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import EngineServer, Weights

TRIES = 3
"""Times that an update is sent, as a server may be started again in the middle of one."""


@dataclass
class Connection:
    """A connection of this process with the workers of a server."""

    name: str
    group: Any
    """Argument of `_broadcast`."""


@dataclass(kw_only=True)
class Transfer(WeightSync):
    """Base of the transports by vLLM's weight transfer API."""

    backend: ClassVar[str]
    """Name of vLLM's backend."""

    def __post_init__(self) -> None:
        self._tensors: list[tuple[str, Tensor]] = []
        self._connections: dict[str, Connection] = {}

    def serve_flags(self) -> tuple[dict[str, str], list[str]]:
        """Return the flag that chooses the backend."""
        return {}, ["--weight-transfer-config", f'{{"backend": "{self.backend}"}}']

    def collect(self, weights: Weights) -> None:
        """Take the policy's tensors, by the names that a checkpoint has."""
        self._tensors = list(checkpoint_tensors(weights.policy.model, dict(weights.named())))

    async def send(self, server: EngineServer) -> None:
        """Send the tensors to a server; again where it or the connection was lost in the middle."""
        for _ in range(TRIES - 1):
            try:
                await self._send(server)
                return
            except RuntimeError:
                self._connections.pop(server.url, None)
        await self._send(server)

    async def _send(self, server: EngineServer) -> None:
        workers = await server.call("hf_rlhf_describe")
        known = self._connections.get(server.url)
        if known is None or any(worker["connection"] != known.name for worker in workers):
            known = self._connections[server.url] = await self._connect(server, 1 + workers[0]["workers"])
        tensors = self._tensors
        update = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(x.dtype).removeprefix("torch.") for _, x in tensors],
            "shapes": [list(x.shape) for _, x in tensors],
            **self._handles(tensors),
        }
        group = known.group
        received = server.call("hf_rlhf_receive", known.name, update, repeat=False)
        await beside(received, lambda: self._broadcast(group, [x for _, x in tensors]))

    async def _connect(self, server: EngineServer, world: int) -> Connection:
        name = uuid.uuid4().hex
        info, join = self._rendezvous(server, world)
        return Connection(name, await beside(server.call("hf_rlhf_connect", name, info, repeat=False), join))

    @abstractmethod
    def _rendezvous(self, server: EngineServer, world: int) -> tuple[dict[str, Any], Callable[[], Any]]:
        """Return what the workers need to connect, and the call that connects this process, the first of `world`."""

    def _handles(self, tensors: list[tuple[str, Tensor]]) -> dict[str, Any]:
        """Return further fields of an update."""
        return {}

    @abstractmethod
    def _broadcast(self, group: Any, tensors: list[Tensor]) -> None:
        """Send the tensors in turn."""

    def close(self) -> None:
        """Drop the connections."""
        self._connections, self._tensors = {}, []


@dataclass(kw_only=True)
class FromGpu(Transfer):
    """Base of the transports that begin in the memory of a GPU."""

    def setup(self, context: Context) -> None:
        """Check that the policy is on one. Raises `ValueError`."""
        if context.device.type != "cuda":
            raise ValueError(
                f"rollout.sync={self.name} sends from the memory of a GPU, and the policy is on {context.device.type}. Set "
                "rollout.sync.use=folder or rollout.sync.use=gloo"
            )
        self._device = context.device


def checkpoint_tensors(model: Any, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors by the names, and in the form, of its checkpoints; those that it shares once."""
    from transformers.core_model_loading import revert_weight_conversion

    seen: set[tuple[int, tuple[int, ...]]] = set()
    own = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen or not tensor.numel():
            own[name] = tensor
        seen.add(key)
    for name, tensor in revert_weight_conversion(model, own).items():
        yield name, tensor.detach().contiguous()


async def beside(call: Coroutine[Any, Any, Any], work: Callable[[], Any]) -> Any:
    """Await a server's part while this process' part runs in a thread, and return what that returns; the first error of either
    is raised without waiting for the other."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_result(result) if error is None else done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as failed:
            error = failed
        with suppress(RuntimeError):  # the other side failed, and nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True, name="hf_rlhf-weights").start()
    theirs = asyncio.ensure_future(call)
    try:
        await asyncio.gather(theirs, done)
        return done.result()
    finally:
        for part in (theirs, done):
            part.cancel()
        await asyncio.gather(theirs, return_exceptions=True)
