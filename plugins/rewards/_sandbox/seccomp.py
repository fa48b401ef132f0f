"""A seccomp filter for programs that nobody trusts: system calls that hold no place in a test and much of a kernel's risk.

It adds to namespaces and limits what these leave open: memory that no limit of a process counts (System V and POSIX
shared memory and queues, memory files), new user namespaces, reading another process, the kernel's keys, modules, tracing
and asynchronous I/O, and sockets of families that a network namespace does not hold (VSOCK reaches the host of a machine).
"""

from __future__ import annotations

import errno
import platform
import struct

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine -> its AUDIT_ARCH, and its place in `DENIED`."""
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
"""System call -> its number on x86_64 and on aarch64 (-1: not there)."""
CLONE, CLONE3, SOCKET = (56, 220), 435, (41, 198)
NAMESPACES = 0x7E020000
"""CLONE_NEW*: all flags of `clone` that make a namespace."""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6."""
X32 = 0x40000000
"""Bit of the calls of a second set on x86_64, which no filter by number would know."""

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Places in the data that a filter sees."""


def known_machine() -> bool:
    return platform.machine() in ARCHITECTURES


def program() -> bytes:
    """The filter in the kernel's form, for this machine. Raises `KeyError` where `known_machine` is False."""
    architecture, place = ARCHITECTURES[platform.machine()]
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    code += [(AT_LEAST, 0, 1, X32), _error(errno.ENOSYS)]
    code += [(EQUAL, 0, 1, CLONE3), _error(errno.ENOSYS)]  # the C library then uses clone, whose flags can be seen
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
