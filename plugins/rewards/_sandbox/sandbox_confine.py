"""Confinement of processes inside the sandbox, and their killing. Runs there with `sandbox_child`; imports nothing from
the package."""

from __future__ import annotations

import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SIGKILL = 9
OPEN_FILES = 128


class Bounds:
    """Resource limits of a program, in the units of `sandbox_child.LIMITS`."""

    seconds: float
    memory: int
    processes: int
    disk: int
    files: int
    user: int


def confine(bounds: Bounds) -> None:
    """Drop this process's rights irrevocably: limits first, then groups, user and capabilities."""
    seconds = int(bounds.seconds) + 1
    for name, most in (
        ("CPU", seconds),
        ("AS", bounds.memory),
        ("NPROC", bounds.processes),
        ("FSIZE", bounds.disk),
        ("NOFILE", OPEN_FILES),
        ("CORE", 1),  # 0 would still start the machine's crash handler
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None or (name == "NPROC" and bounds.processes == 0):
            continue
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (ValueError, OSError):  # macOS rejects some of them
            continue
    if bounds.user >= 0:
        os.setgroups([])
        os.setresgid(bounds.user, bounds.user, bounds.user)
        os.setresuid(bounds.user, bounds.user, bounds.user)
    drop_capabilities()


def libc() -> Any:
    """Load the C library; returns None if this Python has no ctypes."""
    try:
        import ctypes

        return ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):
        return None


LIBC = libc()
LINUX = LIBC is not None and sys.platform == "linux"


def drop_capabilities() -> None:
    """Drop all capabilities, so that no exec can regain them."""
    if not LINUX:
        return
    import ctypes

    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if LIBC.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    die_with_parent()


def die_with_parent() -> None:
    """Kill this process when its parent ends."""
    if LINUX and os.getpid() != 1:  # the first process of a container sees no parent
        LIBC.prctl(1, SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def harden(bounds: Bounds) -> None:
    """Harden the harness: make its memory unreadable, adopt orphans, die with the parent.

    Also limits the number of files if the sandbox has its own temporary folder.
    """
    if not LINUX:
        return
    LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    die_with_parent()
    if bounds.files:
        options = b"size=%d,nr_inodes=%d" % (bounds.disk, bounds.files)
        remount, no_suid, no_dev = 32, 2, 4
        if LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", remount | no_suid | no_dev, options) != 0:
            raise OSError("cannot limit the temporary folder")
    if bounds.user < 0:
        drop_capabilities()


def sweep(pid: int) -> None:
    """Kill the process group `pid` and, if they can be found, the processes that it left behind."""
    _kill(os.killpg, pid)
    if os.getpid() in (1, 2):  # in a separate process namespace: all processes but its reaper
        _kill(os.kill, -1)
    else:
        for _ in range(1000):
            found = _children()
            for child in found:
                _kill(os.kill, child)
                os.waitpid(child, 0)
            if not found:
                break
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _kill(call: Callable[[int, int], None], place: int) -> None:
    try:
        call(place, SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _children() -> list[int]:
    """Return the children of this process: programs and adopted orphans."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listed:
            return [int(pid) for pid in listed.read().split()]
    except OSError:
        return []
