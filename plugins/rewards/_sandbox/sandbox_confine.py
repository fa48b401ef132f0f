"""What a process inside the sandbox gives up, and how it ends others. Runs there beside `sandbox_child`; imports nothing of
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
    """What a program may use; `sandbox_child.LIMITS` says in what units."""

    seconds: float
    memory: int
    processes: int
    disk: int
    files: int
    user: int


def confine(bounds: Bounds) -> None:
    """Give up what this process may do, for good: limits first, then groups, user and capabilities."""
    seconds = int(bounds.seconds) + 1
    for name, most in (
        ("CPU", seconds),
        ("AS", bounds.memory),
        ("NPROC", bounds.processes),
        ("FSIZE", bounds.disk),
        ("NOFILE", OPEN_FILES),
        ("CORE", 1),  # 0 still starts the program of the machine that collects crashes
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
        except (ValueError, OSError):  # macOS refuses some of them
            continue
    if bounds.user >= 0:
        os.setgroups([])
        os.setresgid(bounds.user, bounds.user, bounds.user)
        os.setresuid(bounds.user, bounds.user, bounds.user)
    drop_capabilities()


def libc() -> Any:
    """The C library, or None where this Python has no ctypes."""
    try:
        import ctypes

        return ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):
        return None


LIBC = libc()
LINUX = LIBC is not None and sys.platform == "linux"


def drop_capabilities() -> None:
    """No capability is left, and none can come back through an exec."""
    if not LINUX:
        return
    import ctypes

    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if LIBC.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    die_with_parent()


def die_with_parent() -> None:
    """The end of the parent is the end of this process."""
    if LINUX and os.getpid() != 1:  # the first process of a container has no parent in sight
        LIBC.prctl(1, SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def harden(bounds: Bounds) -> None:
    """Shut the harness itself: nobody reads its memory, orphans become its children, it dies with its parent; and bound the
    number of files where the sandbox gave it a temporary folder of its own."""
    if not LINUX:
        return
    LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    die_with_parent()
    if bounds.files:
        options = b"size=%d,nr_inodes=%d" % (bounds.disk, bounds.files)
        remount, no_suid, no_dev = 32, 2, 4
        if LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", remount | no_suid | no_dev, options) != 0:
            raise OSError("the temporary folder cannot be bounded")
    if bounds.user < 0:
        drop_capabilities()


def sweep(pid: int) -> None:
    """End the process group `pid` and, as far as they can be found, the processes that it left behind."""
    _kill(os.killpg, pid)
    if os.getpid() in (1, 2):  # a process namespace of our own: all that is in it, but its reaper
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
    """Processes whose parent is this one: programs, and, since orphans come to it, what they left behind."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listed:
            return [int(pid) for pid in listed.read().split()]
    except OSError:
        return []
