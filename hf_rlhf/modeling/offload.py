"""Keep tensors in main memory while no phase reads them.

A run on a GPU (or the like) copies offloaded tensors to the device for the phases that read them and copies back what has
changed. With CUDA they are in a few large pinned blocks, filled one tensor after the other, because torch rounds each pinned
block up to a power of two and keeps it. On a CPU everything is in main memory already, and `offload` changes nothing.

A tensor stays the same Python object throughout and may be read and written wherever its data is: optimizers, checkpoints and
other holders need not know. Copies never change a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ALIGNMENT = 64
"""Each tensor in a block starts at a multiple of this many bytes."""
SMALLEST_BLOCK = 4096
"""Bytes of the smallest block of main memory."""


def keeper(tensors: Callable[[], Iterable[Tensor]], device: torch.device, offload: bool, **options: bool) -> Keeper:
    """Return the keeper of a run's `tensors` on `device`: always there, or with `offload` only on request.

    `tensors` is called at every move, because an optimizer creates its state in its first step. `options` are those of
    `ToMainMemory`.
    """
    return ToMainMemory(tensors, device, **options) if offload and device.type != "cpu" else Keeper(tensors)


def tensors_of(module: nn.Module | None) -> Callable[[], Iterator[Tensor]]:
    """Return a callable that yields the parameters and buffers of a module, tied ones once; nothing for None."""

    def tensors() -> Iterator[Tensor]:
        if module is not None:
            yield from module.parameters()
            yield from module.buffers()

    return tensors


class Keeper:
    """Keep tensors on their device all the time."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        self._tensors = tensors
        self._asked = 0

    def load(self, changed: bool = True) -> None:
        """Bring the tensors to the device if they are not there. `changed`: whether they may change there."""

    def offload(self) -> None:
        """Move the tensors off the device, if they are kept elsewhere."""

    def offloaded_bytes(self) -> int:
        """Return the bytes kept off the device."""
        return 0

    @contextmanager
    def on_device(self, changed: bool = True) -> Iterator[None]:
        """Keep the tensors on the device until the outermost such block ends. With `changed=False` the block only reads them."""
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
        """Return the current tensors, each once. Raises TypeError if one is not a plain tensor."""
        import torch

        now = list({id(x): x for x in self._tensors() if x.numel()}.values())
        for x in now:
            if type(x) not in (torch.Tensor, torch.nn.Parameter):
                raise TypeError(
                    f"offload requires plain tensors, got a {type(x).__name__} (quantised weights or the state of an 8-bit or "
                    "4-bit optimizer): set offload: false"
                )
        return now


class ToMainMemory(Keeper):
    """Keep a device's tensors in main memory between uses.

    Args:
        tensors: the tensors to keep. Those that start on another device, such as step counters of some optimizers, stay there.
        device: the device they are brought to.
        changes: whether they change on the device, so that offloading copies them back.
        at_home: whether all of them start in main memory.
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
        self._as_home: dict[int, int] = {}  # addresses of unchanged copies
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


def in_blocks(tensors: list[Tensor], pinned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tensor, uninitialised tensor like it in main memory), block by block.

    Each has its own storage; a block is freed with the last tensor in it.
    """
    import torch

    for size, inside in blocks([aligned(x) for x in tensors]):
        block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).numpy()
        for i, place in inside:
            yield tensors[i], _view(block, place, tensors[i].detach())


def blocks(sizes: list[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Pack items of these sizes into blocks: (bytes, a power of two; [(index, offset), ...]) per block.

    The largest item goes first, each into the first block with room. A new block is the largest that the remaining items
    would fill, or the smallest that holds the item.
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
    """Return the bytes of a tensor, padded to the alignment."""
    return -(-x.nbytes // ALIGNMENT) * ALIGNMENT


def _view(buffer: Any, place: int, like: Tensor) -> Tensor:
    """Return a tensor at an offset of a buffer, with its own storage and the strides of `like`."""
    import torch

    flat: Any = torch.frombuffer(buffer, dtype=like.dtype, count=like.numel(), offset=place)
    dense = torch.empty_like(like, device="meta")
    viewed: Tensor = flat.as_strided(dense.size(), dense.stride())
    return viewed
