"""Base class of the axis `sync`: transport of the policy's weights to the servers of a rollout engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from hf_rlhf.contract.axis import Axis
from hf_rlhf.contract.base import Plugin

if TYPE_CHECKING:
    from hf_rlhf.contract.rollout_engine import Weights


class EngineServer(Protocol):
    """A server of a rollout engine, as a transport of weights sees it."""

    url: str

    async def call(self, method: str, *arguments: Any, repeat: bool = True) -> list[dict[str, Any]]:
        """Call a method of the server's workers, and return what each of them returned.

        A call that fails on the way is repeated, unless `repeat` is False. Raises `RuntimeError` with what a worker returned as
        `error`.
        """

    async def load_adapter(self, folder: Path) -> None:
        """Load an adapter that peft has saved in a folder; the next completions are sampled with it."""


@dataclass(kw_only=True)
class WeightSync(Plugin, ABC):
    """Send the policy's weights to the servers of a rollout engine. Axis `sync`, nested in engines that have servers."""

    axis = Axis(section="Rollouts", metric_prefix="sync", nested="rollout: {use: vllm, sync: folder}")

    adapters: ClassVar[bool] = False
    """True if it sends the adapter of a policy that has one, and nothing else."""

    def serve_flags(self) -> tuple[dict[str, str], list[str]]:
        """Return environment variables and flags that the server's command needs for it."""
        return {}, []

    @abstractmethod
    def collect(self, weights: Weights) -> None:
        """Take the weights that `send` sends. Called on all processes together; the tensors are the policy's own until the
        next call."""

    @abstractmethod
    async def send(self, server: EngineServer) -> None:
        """Load the weights into a server, which generates nothing meanwhile.

        The first process sends to every server after `collect`, at the same time; later any process may, to a server that was
        started again.
        """
