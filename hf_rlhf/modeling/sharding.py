"""Fully sharded data parallelism (FSDP2, `torch.distributed.fsdp.fully_shard`; ZeRO-3, arXiv:1910.02054) around an `ActorCritic`.

Every process keeps a slice of each weight, of its gradient and of its optimizer state. A unit is a decoder layer; embeddings, the
last norm, the head and a value head lie in the root, the `ActorCritic` itself, through which every forward goes: the chunked head
finds its weight gathered. What reads a plain model (sampling, saving, an engine) reads a `WholeModel`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


def shard(root: nn.Module, device: torch.device, reshard_after_forward: bool) -> None:
    """Shard the parameters of an `ActorCritic`, or a model, in place, over all processes. Modules keep their identity."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = {name for m in root.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    for module in root.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    if hasattr(root, "states"):
        register_fsdp_forward_method(root, "states")


def reshard(root: nn.Module) -> None:
    """Free the whole weights of a sharded module and of those within."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(x: Any) -> bool:
    """Return whether a tensor is a shard of a larger one."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def whole(x: Any) -> Any:
    """Return the whole tensor. A collective where it is sharded by its first dimension, as FSDP2 shards all.

    `DTensor.full_tensor` gathers the same, but by a collective of gloo (`allgather_coalesced`, torch 2.13) that corrupts memory
    about once in a million calls.
    """
    if not is_sharded(x):
        return x
    part, processes = x.to_local(), x.device_mesh.size()
    rows = -(-len(x) // processes)
    padded = functional.pad(part, (*[0, 0] * (part.dim() - 1), 0, rows - len(part))).contiguous()
    gathered = padded.new_empty((rows * processes, *part.shape[1:]))
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(gathered, padded, group=x.device_mesh.get_group())
    return gathered[: len(x)]


def local(x: Any) -> Any:
    """Return this process's part of a tensor, a view."""
    return x.to_local() if is_sharded(x) else x


def as_shard(x: Tensor, like: Any) -> Any:
    """Return a whole tensor sharded as `like` is; every process has it, nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    device = local(like).device
    return distribute_tensor(x.to(device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def whole_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of every parameter and persistent buffer, by the names of `state_dict`, one at a time.

    Every process iterates together. Tied weights are one tensor. Without shards the tensors are the module's own.
    """
    owners = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    times = Counter(owners.values())
    tied: dict[int, Tensor] = {}
    for name, x in module.state_dict().items():
        owner = owners.get(name, 0)
        if times[owner] < 2:
            yield name, whole(x)
            continue
        if owner not in tied:
            tied[owner] = whole(x)
        yield name, tied[owner]


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors, which every process has, into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict(
        {name: as_shard(x, own[name]) if is_sharded(own.get(name)) else x for name, x in tensors.items()}
    )


def load_optimizer_shards(optimizer: torch.optim.Optimizer) -> None:
    """Shard the optimizer state that was loaded whole as its weights are."""
    for p, state in optimizer.state.items():
        if is_sharded(p):
            for name, x in state.items():
                if isinstance(x, Tensor) and x.shape == p.shape and not is_sharded(x):
                    state[name] = as_shard(x, p)


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors, as without shards; with `keep` only. All processes call it together."""
    found = optimizer.state_dict()
    states = {}
    for i, state in found["state"].items():
        states[i] = {name: _kept(x, keep) for name, x in state.items()}
    return {**found, "state": states}


def _kept(x: Any, keep: bool) -> Any:
    if not is_sharded(x):
        return x
    gathered = whole(x)
    return gathered.cpu() if keep else None


class WholeModel:
    """A plain twin of a model, of the same classes, that has weights only while it is open. Made before the model is sharded."""

    def __init__(self, model: nn.Module):
        self.sharded = model
        kept: dict[int, Any] = {id(b): b for b in model.buffers()}
        for p in model.parameters():
            kept[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        self.model = copy.deepcopy(model, kept)
        self._open = False

    @contextmanager
    def gathered(self, write: bool = False) -> Iterator[Any]:
        """Give the twin the weights that the sharded model has now; with `write` the model gets those of the twin at exit.

        All processes enter together; inside another `gathered` nothing is sent.
        """
        if self._open:
            yield self.model
            return
        reshard(self.sharded)  # a forward without a backward leaves whole weights, which are nobody's to read or write
        own = dict(self.sharded.named_parameters())
        gathered = {
            id(empty): nn.Parameter(whole(own[name].detach()), requires_grad=empty.requires_grad)
            for name, empty in self.model.named_parameters()
        }
        slots = [
            (module._parameters, name, p)
            for module in self.model.modules()
            for name, p in module._parameters.items()
            if p is not None
        ]
        for parameters, name, p in slots:
            parameters[name] = gathered[id(p)]
        self.model.train(self.sharded.training)
        self._open = True
        try:
            yield self.model
            if write:
                self._write(own)
        finally:
            self._open = False
            for parameters, name, p in slots:
                parameters[name] = p

    @torch.no_grad()
    def _write(self, own: Mapping[str, Any]) -> None:
        for name, p in self.model.named_parameters():
            if name in own:
                local(own[name]).copy_(local(as_shard(p.detach(), own[name])) if is_sharded(own[name]) else p)
