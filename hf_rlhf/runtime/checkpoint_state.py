"""State files of a checkpoint: what a plugin may keep, written and read back, and weights that are finite."""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_rlhf.runtime.errors import CheckpointError

STATE = "rlhf_state_{rank}.pt"
LOADED_BY_RESUME = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "rlhf_state_*.pt")
NUMBERS = (type(None), bool, int, float, complex, str, bytes)


def plain(value: Any, place: str) -> Any:
    """Return state as `torch.load(weights_only=True)` gives it back, with NumPy's exact numbers as Python's.

    Raises `CheckpointError` naming `place` for a type that would come back as another one, or not at all.
    """
    kind = type(value)
    if kind in NUMBERS:
        return value
    if kind in (Tensor, nn.Parameter):
        return value.detach().clone()  # a plugin may change its own in place
    if isinstance(value, np.float64 | np.integer | np.bool_ | np.str_ | np.bytes_):  # equal to Python's in arithmetic
        return value.item()
    try:
        if kind in (list, tuple, set):
            return kind(plain(x, f"{place}[{i}]") for i, x in enumerate(value))
        if kind in (dict, OrderedDict):
            return kind(
                (plain(key, f"{place}, key {key!r}"), plain(x, f"{place}[{key!r}]")) for key, x in value.items()
            )
        if kind is Counter:
            return Counter(
                {plain(key, f"{place}, key {key!r}"): plain(n, f"{place}[{key!r}]") for key, n in value.items()}
            )
    except RecursionError:
        raise CheckpointError(f"{place[:200]} must not contain itself") from None
    raise CheckpointError(
        f"{place} must hold numbers, strings, tensors, lists and dicts, got {kind.__module__}.{kind.__qualname__}. "
        "Return list(x), dict(x), float(x) or torch.from_numpy(x), and convert it back in load_state_dict"
    )


def save_state(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Save one process's part: buffer, stream, plugin state, meters."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / STATE.format(rank=rank))


def load_state(folder: Path, rank: int) -> dict[str, Any]:
    """Load what `save_state` wrote; only plain containers and tensors are read."""
    return torch.load(folder / STATE.format(rank=rank), map_location="cpu", weights_only=True)


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save a module's state by name as safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    copied = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    save_file(copied, folder / "model.safetensors", metadata={"format": "pt"})


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Load what `save_tensors` wrote."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def read_back(folder: Path) -> None:
    """Load each state file as a resumed run would, with tensors left on disk. Raises `CheckpointError` naming the first that
    cannot be loaded."""
    from transformers import TrainerState
    from transformers.trainer_pt_utils import safe_globals

    for path in sorted(path for pattern in LOADED_BY_RESUME for path in folder.glob(pattern)):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} was written and cannot be loaded: {error}") from error
    state = folder / "trainer_state.json"
    try:
        if state.exists():
            TrainerState.load_from_json(str(state))
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{state} was written and cannot be loaded: {error}") from error


@torch.no_grad()
def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first floating-point tensor with an infinity or a NaN. One wait for the device.

    A sum is finite only if all its terms are, and takes one pass at memory speed; finite terms may overflow it, so that a
    tensor whose sum is not finite is looked at again.
    """
    named = [(name, x) for name, x in tensors if x.is_floating_point() and x.dtype.itemsize > 1 and x.numel()]
    if not named:
        return None
    device = named[0][1].device
    sums = [x.sum(dtype=torch.float32 if x.dtype.itemsize < 4 else x.dtype) for _, x in named]
    finite = torch.stack([x.isfinite().to(device) for x in sums]).tolist()
    suspect = (pair for pair, whole in zip(named, finite, strict=True) if not whole)
    return next((name for name, x in suspect if not bool(x.isfinite().all())), None)
