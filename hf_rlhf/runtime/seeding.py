"""Random numbers that depend on the position in a run and on nothing that came before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """Return a 32-bit seed from (run seed, rollout, process, ...); equal parts give equal seeds on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch inside the block, and restore them after it.

    The default dtype and the gradient mode are restored too, so that code inside leaves training's random numbers unchanged.
    """
    python, numpy = random.getstate(), np.random.get_state()
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        seed = seed_of(*parts)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)


def permutation(n: int, *parts: int | str) -> list[int]:
    """Return a permutation of 0..n-1 that depends only on `parts`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*parts))).tolist()
