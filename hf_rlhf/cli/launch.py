"""The start of a run: its imports, and the same command in several processes that train together."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hf_rlhf.runtime.activity import doing
from hf_rlhf.runtime.errors import UserError


def start_processes(count: int) -> None:
    """Replace this process by torchrun, which runs this command without `--nproc` in `count` processes of this machine.

    Does not return. Raises `UserError` where there are fewer devices.
    """
    import torch

    devices = torch.accelerator.device_count()
    if 0 < devices < count:
        raise UserError(f"--nproc must be at most the {devices} devices of this machine, got {count}")
    words = list(sys.argv[1:])
    at = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--nproc")
    del words[at : at + (1 if "=" in words[at] else 2)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "hf_rlhf", *words]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *torchrun])  # without a shell, with this command's own words


@contextmanager
def importing() -> Iterator[None]:
    """Import without garbage collection, which would walk a million objects again and again that all stay.

    Later collections, and the one at exit, skip what was imported.
    """
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        with doing("importing PyTorch and transformers"):
            yield
    finally:
        if first:
            gc.freeze()
            gc.enable()
