"""Bubblewrap: Linux namespaces, without a daemon or images.

The program sees /usr, /lib*, Python, five harmless devices and an empty /tmp: no /proc, no home, no repository, no
network except its own loopback. Run by root, the sandbox has a user namespace with two users: root, which runs the harness
and has no rights outside of it, and the program's user, which owns no files and whose id is unique to the sandbox, so that
its processes can be counted. Run by another user, both are that user, mapped to 65534.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import cache_from_source
from pathlib import Path

from . import seccomp
from .backend import (
    GRACE,
    INSIDE,
    Answer,
    Backend,
    Limits,
    Question,
    SandboxError,
    bootstrap,
    exchange,
    kill_group,
    new_nonce,
    packed,
)

INSTALL = "install it (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
OTHERS = "or set `sandbox` to docker, podman or remote"
NOBODY = 65534
FIRST_USER, USERS = 1 << 30, 1 << 29
"""User ids that programs run as, far from those that systems assign."""
DEVICES = ("null", "zero", "full", "random", "urandom")
CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_SYS_ADMIN")
"""Capabilities of the harness within the sandbox's namespaces: to change user, kill the program and limit the number of
files. The program has none."""
FOLDER = "/harness"


@dataclass(frozen=True)
class Interpreter:
    """Python executable with the folders that it needs; `packages` says if it sees installed packages."""

    executable: str
    folders: tuple[str, ...]
    packages: bool


def interpreter(python: str | None) -> Interpreter:
    """Return the Python at a path with its packages, by default this process's without any. Raises `SandboxError`."""
    if python is None:
        executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        return Interpreter(
            executable, (os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)), False
        )
    return _other(python)


@cache
def _other(python: str) -> Interpreter:
    asked = "import json, sys; print(json.dumps([sys.executable, sys.prefix, sys.base_prefix, sys.base_exec_prefix]))"
    try:
        told = subprocess.run(
            [python, "-I", "-c", asked], capture_output=True, timeout=60, check=True, text=True
        ).stdout
        executable, *folders = json.loads(told)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SandboxError(f"python must be a working Python interpreter, got {python!r}: {error}") from error
    return Interpreter(executable, (*folders, *map(os.path.realpath, folders)), True)


class Bubblewrap(Backend):
    """Backend that starts `bwrap` once per program."""

    def __init__(self, python: str | None = None) -> None:
        self.python = python

    def problem(self) -> str | None:
        return _problem(self.python)

    def run(self, code: str, questions: Sequence[Question], limits: Limits) -> list[Answer]:
        begin, nonce = time.monotonic(), new_nonce()
        mapped = _maps_users()
        user = NOBODY if mapped else -1
        processes = limits.processes + (1 if mapped else 5)  # the test launcher; without users, its parents too
        job = packed(
            code, questions, limits, nonce=nonce, deadline=begin + limits.seconds, user=user, processes=processes
        )
        seconds = limits.seconds + GRACE
        process, child = self._start(limits, mapped, begin + seconds)
        return exchange(
            process,
            job,
            questions,
            nonce=nonce,
            seconds=begin + seconds - time.monotonic(),
            output=limits.output,
            kill=lambda: _kill(process, child),
        )

    def _start(self, limits: Limits, mapped: bool, deadline: float) -> tuple[subprocess.Popen[bytes], int]:
        """Start a sandbox; returns the process and a handle of the first one in its namespace (-1: unknown)."""
        command, python = self._command(limits), self._python()
        told, tell = os.pipe()
        wait, release = os.pipe()
        rules, written = os.pipe()
        os.write(written, seccomp.program())  # fits into a pipe
        os.close(written)
        more = ["--seccomp", str(rules), "--info-fd", str(tell)]
        more += ["--userns-block-fd", str(wait)] if mapped else ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        try:
            process = subprocess.Popen(
                [*command, *more, "--", *python],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                start_new_session=True,
                pass_fds=[rules, tell, wait],
            )
        except OSError as error:
            os.close(told)
            os.close(release)
            raise SandboxError(f"bubblewrap does not start: {error}") from error
        finally:
            for fd in (tell, wait, rules):
                os.close(fd)
        try:
            return process, _release(told, release, mapped, deadline)
        except BaseException:
            kill_group(process)
            process.communicate()
            raise

    def _command(self, limits: Limits) -> list[str]:
        capabilities = [word for name in CAPABILITIES for word in ("--cap-add", name)]
        room = ["--perms", "1777", "--size", str(limits.disk), "--tmpfs", "/tmp"]
        before, after = self._view  # an interpreter below /tmp is mounted over the empty one
        return [*before, *room, *after, "--remount-ro", "/", "--chdir", "/tmp", "--cap-drop", "ALL", *capabilities]

    def _python(self) -> list[str]:
        packages = [] if interpreter(self.python).packages else ["-S"]
        flags = ["-s", "-B", *packages, "-X", "utf8"]
        return [interpreter(self.python).executable, *flags, "-c", bootstrap(FOLDER)]

    @cached_property
    def _view(self) -> tuple[list[str], list[str]]:
        """Fixed parts of the command: namespaces and environment, and the visible parts of the machine."""
        command = [_bwrap(), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
        command += ["--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "PYTHONHASHSEED", "0"]
        command += ["--setenv", "OMP_NUM_THREADS", "1", "--hostname", "sandbox"]
        seen: list[str] = ["/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            place = Path("/", name)
            if place.is_symlink():
                command += ["--symlink", os.readlink(place), str(place)]
            elif place.is_dir():
                seen.append(str(place))
        for folder in interpreter(self.python).folders:
            if not any(Path(folder).is_relative_to(other) for other in seen):
                seen.append(folder)
        shown = [*_parents(*seen, FOLDER), *(word for place in seen for word in ("--ro-bind", place, place))]
        hidden = [word for place in _private(seen) for word in ("--tmpfs", place, "--remount-ro", place)]
        rest = [*shown, *hidden, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dir", "/dev"]
        rest += [word for name in DEVICES for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
        for file in (Path(__file__).with_name(f"{name}.py") for name in INSIDE):
            compiled = Path(cache_from_source(str(file)))
            rest += ["--ro-bind", str(file), f"{FOLDER}/{file.name}"]
            rest += ["--ro-bind-try", str(compiled), f"{FOLDER}/__pycache__/{compiled.name}"]
        return command, rest


def _parents(*places: str) -> list[str]:
    """Return arguments for the parent folders of `places`, which only root could traverse otherwise."""
    found = {str(parent) for place in places for parent in Path(place).parents if parent != Path("/")}
    return [word for parent in sorted(found | {FOLDER, f"{FOLDER}/__pycache__", "/etc"}) for word in ("--dir", parent)]


def _private(seen: list[str]) -> list[str]:
    """Return the folders to hide: home, working folder and repository, if they are within visible folders."""
    root = Path(__file__).resolve().parents[3]
    places = {os.path.realpath(os.path.expanduser("~")), os.path.realpath(os.getcwd())}
    places |= set() if root.name in ("site-packages", "dist-packages") else {str(root)}
    inside = [place for place in places if any(place != s and Path(place).is_relative_to(s) for s in seen)]
    return sorted(place for place in inside if not any(Path(s).is_relative_to(place) for s in seen))


def _bwrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(f"sandbox `bubblewrap`: command bwrap not found: {INSTALL}, {OTHERS}")
    return found


@cache
def _maps_users() -> bool:
    """Return True if this process may map a second user: it is root, and not in a container without users."""
    if os.geteuid() != 0:
        return False
    try:
        rows = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return False
    return any(first <= FIRST_USER and first + count >= FIRST_USER + USERS for first, _, count in rows)


def _release(told: int, release: int, mapped: bool, deadline: float) -> int:
    """Map the two users of a waiting sandbox; returns a handle of its first process, -1 if it ended before."""
    try:
        waiting, text = select.poll(), b""  # unlike `select` it supports high descriptors
        waiting.register(told, select.POLLIN)
        while not text.rstrip().endswith(b"}"):
            ready = waiting.poll(1000 * max(0.0, deadline - time.monotonic()))
            chunk = os.read(told, 4096) if ready else b""
            if not chunk:
                return -1
            text += chunk
        pid = json.loads(text)["child-pid"]
        child = os.pidfd_open(pid)
        if mapped:
            user = FIRST_USER + random.SystemRandom().randrange(USERS)
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{NOBODY} {user} 1\n")
            os.write(release, b"1")
        return child
    except OSError as error:
        raise SandboxError(f"cannot map the sandbox's users: {error}") from error
    finally:
        os.close(told)
        os.close(release)


def _kill(process: subprocess.Popen[bytes], child: int) -> None:
    """Kill the sandbox through the first process of its namespace."""
    if child >= 0:
        try:
            signal.pidfd_send_signal(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(child)
    kill_group(process)


@cache
def _problem(python: str | None) -> str | None:
    """Run a trial program that forks; returns the problem found, or None."""
    if sys.platform != "linux" or not seccomp.known_machine():
        return f"sandbox `bubblewrap` needs Linux on {' or '.join(seccomp.ARCHITECTURES)}. Set `sandbox` to docker or remote"
    probe = (
        "import os\npid = os.fork()\nif not pid: os._exit(7)\nchild = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    )
    try:
        answers = Bubblewrap(python).run(probe, [Question("call", "child * 6")], Limits())
    except SandboxError as error:
        text = str(error)
        if "sandbox `bubblewrap`" in text:
            return text
        return (
            f"sandbox `bubblewrap`: {text}. It needs user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0; in a container, one that may make them), "
            f"{OTHERS}"
        )
    if answers != [Answer("value", "42")]:
        return f"sandbox `bubblewrap`: a trial program returned {answers[0].text!r} instead of 42; fix it, {OTHERS}"
    return None
