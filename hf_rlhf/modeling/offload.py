"""Where tensors lie while nothing reads them: on their device, or away from it.

Away from a GPU and its like is main memory (with CUDA in a few large pinned blocks, which the tensors fill one after the
other: torch takes a power of two of bytes for each block that is pinned, and keeps it): tensors are copied over for the
phases that read them, and what has changed is copied back. Away from a CPU is a file that is mapped into memory: pages come
in as they are read or written, and the process lets go of all of them after the phase. The system then keeps them in its
cache of files for as long as it has room, and on the disk. The file has no name, so it is gone with the process; it lies in
TMPDIR where that is set, else in /var/tmp, which is on a disk where /tmp may be memory.

A tensor stays the same Python object throughout, and may be read and written wherever it lies: optimizers, checkpoints and
whatever else holds it need not know. Numbers are copied, never changed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ALIGNMENT = 64
"""A tensor begins at a multiple of so many bytes in a file or a block."""
SMALLEST_BLOCK = 4096
"""Bytes of the smallest block of main memory."""
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

    def load(self, changed: bool = True) -> None:
        """Has them on their device; nothing to do where they are. `changed`: whether they may change there."""

    def offload(self) -> None:
        """Has them away from it, if that is where they are kept; nothing to do where they are."""

    def offloaded_bytes(self) -> int:
        """Bytes of them that are kept away from the device."""
        return 0

    @contextmanager
    def on_device(self, changed: bool = True) -> Iterator[None]:
        """On their device until the outermost of such blocks is left. Without `changed` nothing changes them in this block."""
        self._asked += 1
        try:
            if self._asked == 1 or changed:
                self.load(changed)
            yield
        finally:
            self._asked -= 1
            if self._asked == 0:
                self.offload()

    def _plain(self) -> list[Tensor]:
        """The tensors as they are now, each once. Raises TypeError where one is more than its numbers."""
        import torch

        now = list({id(x): x for x in self._tensors() if x.numel()}.values())
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
        self._as_home: dict[int, int] = {}  # where the copies lie that do not change
        own = self._plain() if at_home else []
        if device.type == "cuda":
            for x, home in in_blocks(own, pinned=True):
                x.data = home.copy_(x.detach())
        self._homes = {id(x): (x, x.detach()) for x in own}

    def load(self, changed: bool = True) -> None:
        if changed:
            self._as_home.clear()
        for x in self._plain():
            _, home = self._homes.get(id(x), (None, None))
            if home is not None and x.data_ptr() == home.data_ptr():
                x.data = home.to(self._device, non_blocking=True, copy=True)
                if not changed:
                    self._as_home[id(x)] = x.data_ptr()

    def offload(self) -> None:
        import torch

        known, new = [], []
        for x in self._plain():
            if id(x) in self._homes:
                known.append(self._homes[id(x)])
            elif x.device.type == self._device.type:
                new.append(x)
        made = list(in_blocks(new, pinned=self._device.type == "cuda"))
        changed = [(x, home) for x, home in known if self._changes and x.data_ptr() != home.data_ptr()]
        copied = made + [(x, home) for x, home in changed if self._as_home.get(id(x)) != x.data_ptr()]
        for x, home in copied:
            home.copy_(x.detach(), non_blocking=True)
        if copied and self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        for x, home in (*known, *made):
            x.data = home
        self._homes = {id(x): (x, home) for x, home in (*known, *made)}
        self._as_home.clear()

    def offloaded_bytes(self) -> int:
        return sum(home.nbytes for _, home in self._homes.values())


class ToFile(Keeper):
    """Keeps tensors of the CPU in mapped files, one for all that are new when they are sent."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        super().__init__(tensors)
        self._mapped: dict[int, tuple[Tensor, int]] = {}
        self._files: WeakSet[mmap.mmap] = WeakSet()  # a mapping ends with the last tensor in it

    def offload(self) -> None:
        here = [x for x in self._plain() if x.device.type == "cpu"]
        self._mapped = {id(x): self._mapped[id(x)] for x in here if self._is_mapped(x)}
        if new := [x for x in here if id(x) not in self._mapped]:
            self._files.add(mapped(new))
            self._mapped |= {id(x): (x, x.data_ptr()) for x in new}
        for file in list(self._files):
            if hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)

    def offloaded_bytes(self) -> int:
        return sum(x.nbytes for x, _ in self._mapped.values())

    def _is_mapped(self, x: Tensor) -> bool:
        return id(x) in self._mapped and self._mapped[id(x)][1] == x.data_ptr()


def mapped(tensors: list[Tensor]) -> mmap.mmap:
    """Moves CPU tensors into a new mapped file, each with a storage of its own there. Raises OSError where the disk is full."""
    sizes = [aligned(x) for x in tensors]
    file = _file(sum(sizes))
    for x, place in zip(tensors, accumulate(sizes, initial=0), strict=False):
        x.data = _view(file, place, x.detach()).copy_(x.detach())
    return file


def in_blocks(tensors: list[Tensor], pinned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor, one like it in main memory whose numbers are still to be written), block by block; each has a storage of its
    own, and a block goes with the last that lies in it."""
    import torch

    for size, inside in blocks([aligned(x) for x in tensors]):
        block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).numpy()
        for i, place in inside:
            yield tensors[i], _view(block, place, tensors[i].detach())


def blocks(sizes: list[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Blocks for things of these sizes: bytes, a power of two, and (index, place) of what lies in it.

    The largest go first, each into the first block with room; where there is none, the next block is the largest that what
    is left would fill, or the smallest that holds it.
    """
    made: list[tuple[int, list[tuple[int, int]]]] = []
    free: list[int] = []
    left = sum(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((k for k, room in enumerate(free) if room >= sizes[i]), len(made))
        if at == len(made):
            filled, holding = 1 << left.bit_length() - 1, 1 << (sizes[i] - 1).bit_length()
            made.append((max(filled, holding, SMALLEST_BLOCK), []))
            free.append(made[at][0])
        made[at][1].append((i, made[at][0] - free[at]))
        free[at] -= sizes[i]
        left -= sizes[i]
    return made


def aligned(x: Tensor) -> int:
    """Bytes of a tensor, and what lies empty up to the next."""
    return -(-x.nbytes // ALIGNMENT) * ALIGNMENT


def _view(buffer: Any, place: int, like: Tensor) -> Tensor:
    """A tensor at a place of a buffer, with a storage of its own, and the order of dimensions of another."""
    import torch

    flat: Any = torch.frombuffer(buffer, dtype=like.dtype, count=like.numel(), offset=place)
    dense = torch.empty_like(like, device="meta")
    viewed: Tensor = flat.as_strided(dense.size(), dense.stride())
    return viewed


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
