"""Keep what a reward changes in this process from the run: everything is as before when its calls have ended. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hf_rlhf.runtime.plain_text import PlainStream

_ISOLATING = threading.RLock()
Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Functions that get a setting of the process and set it."""


@contextmanager
def isolated() -> Iterator[None]:
    """Restore global state after the block, in which autocast is off and prints go to stderr as plain text.

    Restored are the random generators of Python, NumPy and torch; torch's default dtype and device, gradient mode, autocast,
    threads and determinism; NumPy's error handling; signal handlers and mask; standard streams and their descriptors; working
    directory, environment and recursion limit. The rest of a process (modules, other objects, files) is shared. Of several
    threads at a time the first isolates: what it restores is the process's.
    """
    if not _ISOLATING.acquire(blocking=False):
        yield
        return
    try:
        with _restored():
            yield
    finally:
        _ISOLATING.release()


@contextmanager
def _restored() -> Iterator[None]:
    before = [(get, put, get()) for get, put in _settings()]
    streams = sys.stdin, sys.stdout, sys.stderr
    with _descriptors():
        sys.stdout = PlainStream(streams[2], getattr(streams[1], "rich_proxied_file", streams[1]))
        sys.stderr = PlainStream(streams[2])
        _autocast_off()
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = streams
            for get, put, value in before:
                if _differs(get(), value):
                    put(value)


def _settings() -> Iterator[Setting]:
    yield _folder, _set_folder
    yield lambda: dict(os.environ), _set_environment
    yield sys.getrecursionlimit, sys.setrecursionlimit
    yield random.getstate, random.setstate
    if threading.current_thread() is threading.main_thread():  # where Python runs handlers, and can set them
        for number in signal.valid_signals():
            if signal.getsignal(number) is not None:
                yield partial(signal.getsignal, number), partial(signal.signal, number)
        if hasattr(signal, "pthread_sigmask"):
            yield (
                partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()),
                partial(signal.pthread_sigmask, signal.SIG_SETMASK),
            )
    if (numpy := sys.modules.get("numpy")) is not None:
        yield numpy.geterr, lambda given: numpy.seterr(**given)
        yield numpy.random.get_state, numpy.random.set_state
    if (torch := sys.modules.get("torch")) is not None:
        yield from _settings_of(torch)


def _settings_of(torch: Any) -> Iterator[Setting]:
    cpu = torch.device("cpu")
    yield torch.get_default_device, lambda x: torch.set_default_device(None if x == cpu else x)
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield torch.get_num_threads, torch.set_num_threads
    yield torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    for device in AUTOCAST:
        yield partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)
        yield partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)
    yield torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_initialized():
        yield torch.cuda.get_rng_state, torch.cuda.set_rng_state


AUTOCAST = ("cpu", "cuda")
"""Kinds of devices whose autocast is turned off and restored."""


def _autocast_off() -> None:
    if (torch := sys.modules.get("torch")) is not None:
        for device in AUTOCAST:
            torch.set_autocast_enabled(device, False)


def _differs(now: Any, before: Any) -> bool:
    try:
        return bool(now != before)
    except (ValueError, RuntimeError):  # states that hold arrays
        return True


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _set_environment(given: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(given)


@contextmanager
def _descriptors() -> Iterator[None]:
    """Restore what the descriptors of the standard streams refer to."""
    kept: dict[int, int] = {}
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):  # it is closed
            kept[number] = os.dup(number)
    try:
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
