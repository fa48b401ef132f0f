"""Where tensors lie while nothing reads them: on their device, or away from it.

Away from a GPU and its like is main memory (pinned with CUDA): tensors are copied over for the phases that read them, and
what has changed is copied back. Away from a CPU is a file that is mapped into memory: pages come in as they are read or
written, and the process lets go of all of them after the phase. The system then keeps them in its cache of files for as long
as it has room, and on the disk. The file has no name, so it is gone with the process; it lies in TMPDIR where that is set, else
in /var/tmp, which is on a disk where /tmp may be memory.

A tensor stays the same Python object throughout, and may be read and written wherever it lies: optimizers, checkpoints and
whatever else holds it need not know. Numbers are copied, never changed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes between whose multiples a tensor begins in a file."""
PREFIX = "hf_rlhf-"
"""How the name of a file begins as long as it has one."""


def keeper(tensors: Callable[[], Iterable[Tensor]], device: torch.device, offload: bool, **options: bool) -> Keeper:
    """What keeps `tensors` of a run on `device`: there all the time, or with `offload` only when they are asked for.

    `tensors` is asked anew at every move, for an optimizer makes its own in its first step. `options` are `ToMainMemory`'s.
    """
    if not offload:
        return Keeper(tensors)
    return ToFile(tensors) if device.type == "cpu" else ToMainMemory(tensors, device, **options)


def tensors_of(module: nn.Module | None) -> Callable[[], Iterator[Tensor]]:
    """The parameters and buffers of a module, those that are tied once; nothing of None."""

    def tensors() -> Iterator[Tensor]:
        if module is not None:
            yield from module.parameters()
            yield from module.buffers()

    return tensors


class Keeper:
    """Keeps tensors on their device all the time."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        self._tensors = tensors
        self._asked = 0

    def bring(self) -> None:
        """Has them on their device; nothing to do where they are."""

    def send(self) -> None:
        """Has them away from it, if that is where they are kept; nothing to do where they are."""

    def away(self) -> int:
        """Bytes of them that are kept away from the device."""
        return 0

    @contextmanager
    def there(self) -> Iterator[None]:
        """On their device until the outermost of such blocks is left."""
        self._asked += 1
        try:
            if self._asked == 1:
                self.bring()
            yield
        finally:
            self._asked -= 1
            if self._asked == 0:
                self.send()

    def _plain(self) -> list[Tensor]:
        """The tensors as they are now. Raises TypeError where one is more than its numbers."""
        import torch

        now = [x for x in self._tensors() if x.numel()]
        for x in now:
            if type(x) not in (torch.Tensor, torch.nn.Parameter):
                raise TypeError(
                    f"offload moves plain tensors, and here is a {type(x).__name__}, as quantised weights and the states of "
                    "8-bit and 4-bit optimizers are: set offload: false"
                )
        return now


class ToMainMemory(Keeper):
    """Keeps tensors of a device in main memory.

    Args:
        tensors: those to keep. What another device holds at first, as some optimizers' step counters, stays there.
        device: the one that they are brought to.
        changes: whether they change while they are there, so that sending them copies them back.
        at_home: they are in main memory at first, all of them.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[Tensor]],
        device: torch.device,
        *,
        changes: bool = False,
        at_home: bool = False,
    ):
        super().__init__(tensors)
        self._device, self._changes = device, changes
        self._homes: dict[int, tuple[Tensor, Tensor]] = {}
        for x in self._plain() if at_home else ():
            if device.type == "cuda":
                x.data = x.detach().pin_memory()
            self._homes[id(x)] = x, x.detach()

    def bring(self) -> None:
        for x in self._plain():
            _, home = self._homes.get(id(x), (None, None))
            if home is not None and x.data_ptr() == home.data_ptr():
                x.data = home.to(self._device, non_blocking=True, copy=True)

    def send(self) -> None:
        import torch

        homes: dict[int, tuple[Tensor, Tensor]] = {}
        copied = False
        for x in self._plain():
            if id(x) in self._homes:
                homes[id(x)] = self._homes[id(x)]
            elif x.device.type == self._device.type:
                pinned = self._device.type == "cuda"
                homes[id(x)] = x, torch.empty_like(x.detach(), device="cpu", pin_memory=pinned)
            else:
                continue
            home = homes[id(x)][1]
            if x.data_ptr() != home.data_ptr() and (self._changes or id(x) not in self._homes):
                home.copy_(x.detach(), non_blocking=True)
                copied = True
        if copied and self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        for x, home in homes.values():
            x.data = home
        self._homes = homes

    def away(self) -> int:
        return sum(home.nbytes for _, home in self._homes.values())


class ToFile(Keeper):
    """Keeps tensors of the CPU in mapped files, one for all that are new when they are sent."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        super().__init__(tensors)
        self._mapped: dict[int, tuple[Tensor, int]] = {}
        self._files: WeakSet[mmap.mmap] = WeakSet()  # a mapping ends with the last tensor in it

    def send(self) -> None:
        here = [x for x in self._plain() if x.device.type == "cpu"]
        self._mapped = {id(x): self._mapped[id(x)] for x in here if self._is_mapped(x)}
        if new := [x for x in here if id(x) not in self._mapped]:
            self._files.add(mapped(new))
            self._mapped |= {id(x): (x, x.data_ptr()) for x in new}
        for file in list(self._files):
            if hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)

    def away(self) -> int:
        return sum(x.nbytes for x, _ in self._mapped.values())

    def _is_mapped(self, x: Tensor) -> bool:
        return id(x) in self._mapped and self._mapped[id(x)][1] == x.data_ptr()


def mapped(tensors: list[Tensor]) -> mmap.mmap:
    """Moves CPU tensors into a new mapped file, each with a storage of its own there. Raises OSError where the disk is full."""
    import torch

    places, size = [], 0
    for x in tensors:
        places.append(size)
        size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    file = _file(size)
    for x, place in zip(tensors, places, strict=True):
        old = x.detach()
        flat: Any = torch.frombuffer(file, dtype=x.dtype, count=x.numel(), offset=place)
        dense = torch.empty_like(old, device="meta")  # in the order of dimensions that it has
        x.data = flat.as_strided(dense.size(), dense.stride()).copy_(old)
    return file


def folder() -> str:
    """Where files are made."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())


def _file(size: int) -> mmap.mmap:
    """A mapped file of `size` bytes with room on the disk and without a name."""
    with tempfile.NamedTemporaryFile(prefix=PREFIX, dir=folder()) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk would else end the process when a page is written
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"offload: no room for {size >> 20} MiB ({error.strerror}); set TMPDIR to a larger disk",
                folder(),
            ) from error
        return mmap.mmap(file.fileno(), size)
