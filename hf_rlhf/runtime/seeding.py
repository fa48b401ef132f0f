"""Random numbers that depend on where a run stands and on nothing that came before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """A 32-bit seed from (run seed, rollout, process, ...): equal parts give equal seeds on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's global generators inside, and puts their states, the default dtype and the
    gradient mode back after: whatever runs inside leaves the training's random numbers as they were."""
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
    """A permutation of 0..n-1 that depends on `parts` alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*parts))).tolist()
