"""Gather rows of unequal number and length from every process, and sum numbers over processes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Reduce:
    """Sums and extremes over the processes of `accelerator`; without one, the numbers themselves."""

    accelerator: Accelerator | None = None

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every process's `x`."""
        return x if self.accelerator is None else self.each(x).sum(0)

    def max(self, x: Tensor) -> Tensor:
        """Return the largest of every process's `x`."""
        return x if self.accelerator is None else self.each(x).amax(0)

    def each(self, x: Tensor) -> Tensor:
        """Return every process's `x`, with the processes as first dimension."""
        assert self.accelerator is not None
        found: Tensor = self.accelerator.gather(x.unsqueeze(0))
        return found


def gather_rows(accelerator: Accelerator, wide: dict[str, Tensor], narrow: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of every process, in the order of the processes.

    `wide` holds (n, T) and `narrow` (n, ...) tensors of this process, where n and T differ between processes; the result
    holds (N, T) and (N, ...), with T the longest. Dtypes are kept. Three collectives.
    """
    if accelerator.num_processes == 1:
        return {**wide, **narrow}
    first = next(iter(wide.values()))
    shapes = accelerator.gather(torch.tensor([list(first.shape)], device=accelerator.device)).tolist()
    n, t = max(s[0] for s in shapes), max(s[1] for s in shapes)
    stack = torch.stack(
        [functional.pad(x.to(_number(wide)), (0, t - x.size(1), 0, n - x.size(0))) for x in wide.values()]
    )
    pieces = accelerator.gather(stack.to(accelerator.device).unsqueeze(0))
    gathered: dict[str, Tensor] = {}
    for k, (key, like) in enumerate(wide.items()):
        rows = torch.cat([pieces[rank, k, : shapes[rank][0]] for rank in range(len(shapes))])
        gathered[key] = rows.to(like.dtype)
    flat = torch.cat([_flat(x) for x in narrow.values()], 1)
    pieces = accelerator.gather(functional.pad(flat, (0, 0, 0, n - len(flat))).to(accelerator.device).unsqueeze(0))
    rows = torch.cat([pieces[rank, : shapes[rank][0]] for rank in range(len(shapes))])
    parts = rows.split([math.prod(x.shape[1:]) for x in narrow.values()], 1)
    for (key, like), part in zip(narrow.items(), parts, strict=True):
        gathered[key] = part.reshape(-1, *like.shape[1:]).to(like.dtype)
    return gathered


def exchange(accelerator: Accelerator, parcels: Sequence[Any]) -> list[Any]:
    """Return what every process sent to this one: `parcels[rank]` goes to that process.

    Plain containers and tensors, which arrive on the CPU. Two collectives, in which a process gets its own parcels alone.
    """
    packed = [io.BytesIO() for _ in parcels]
    for file, parcel in zip(packed, parcels, strict=True):
        torch.save(parcel, file)
    sent = torch.tensor([file.tell() for file in packed], device=accelerator.device)
    coming = torch.empty_like(sent)
    torch.distributed.all_to_all_single(coming, sent)
    content = torch.frombuffer(bytearray(b"".join(file.getvalue() for file in packed)), dtype=torch.uint8)
    sizes = coming.tolist()
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=accelerator.device)
    torch.distributed.all_to_all_single(received, content.to(accelerator.device), sizes, sent.tolist())
    files = [io.BytesIO(bytes(x.cpu().numpy())) for x in received.split(sizes)]
    return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


def _flat(x: Tensor) -> Tensor:
    """Return (n, ...) as (n, k), in float64."""
    return x.double().flatten(1) if x.dim() > 1 else x.double().unsqueeze(1)


def _number(tensors: dict[str, Tensor]) -> torch.dtype:
    """Return float64 if any tensor has it, so that nothing is rounded; a byte for truth values."""
    if all(x.dtype == torch.bool for x in tensors.values()):
        return torch.uint8
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32


def sum_over_processes(accelerator: Accelerator, numbers: Sequence[Tensor | float]) -> list[float]:
    """Sum each number over every process, with one collective and one wait for the device."""
    if not numbers:
        return []
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
    flat = torch.stack([torch.as_tensor(x, dtype=dtype, device=accelerator.device) for x in numbers])
    total: Any = accelerator.reduce(flat, "sum") if accelerator.num_processes > 1 else flat
    return total.tolist()


def from_first_process(accelerator: Accelerator, value: str) -> str:
    """Return the first process's value on every process. One collective."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return str(broadcast_object_list([value])[0])
