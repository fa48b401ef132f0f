"""Seccomp filter for untrusted programs: denies system calls that tests do not need and that expose the kernel.

It closes what namespaces and limits leave open: memory outside of a process's limits (System V and POSIX shared memory and
queues, memory files), new user namespaces, access to other processes, the kernel's keys, modules, tracing and asynchronous
I/O, and socket families that a network namespace does not isolate (VSOCK reaches a virtual machine's host).
"""

from __future__ import annotations

import errno
import platform
import struct

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH of each machine, and its index in `DENIED`."""
DENIED: dict[str, tuple[int, int]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, -1),
    "iopl": (172, -1),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "modify_ldt": (154, -1),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
"""Numbers of denied system calls on x86_64 and on aarch64 (-1: absent)."""
CLONE, CLONE3, SOCKET = (56, 220), 435, (41, 198)
NAMESPACES = 0x7E020000
"""CLONE_NEW*: all flags of `clone` that create a namespace."""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6."""
X32 = 0x40000000
"""Bit of the x32 system calls on x86_64, which a filter by number would miss."""

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in the data that a filter sees."""


def known_machine() -> bool:
    return platform.machine() in ARCHITECTURES


def program() -> bytes:
    """Return the filter for this machine as BPF. Raises `KeyError` if `known_machine` is False."""
    architecture, place = ARCHITECTURES[platform.machine()]
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    code += [(AT_LEAST, 0, 1, X32), _error(errno.ENOSYS)]
    code += [(EQUAL, 0, 1, CLONE3), _error(errno.ENOSYS)]  # the C library then uses clone, whose flags are visible
    for numbers in DENIED.values():
        if numbers[place] >= 0:
            code += [(EQUAL, 0, 1, numbers[place]), _error(errno.EPERM)]
    code += [
        (EQUAL, 0, 4, CLONE[place]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 0, 1, NAMESPACES),
        _error(errno.EPERM),
    ]
    code += [(RETURN, 0, 0, ALLOW)]
    families = [(EQUAL, len(FAMILIES) - index, 0, family) for index, family in enumerate(FAMILIES)]
    code += [(EQUAL, 0, len(families) + 2, SOCKET[place]), (LOAD, 0, 0, FIRST_ARGUMENT), *families]
    code += [_error(errno.EAFNOSUPPORT), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _error(number: int) -> tuple[int, int, int, int]:
    return RETURN, 0, 0, 0x00050000 | number
