"""What programs take and where they look in the Bubblewrap sandbox, and what they get."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from hf_rlhf_plugins.rewards._sandbox.backend import MIB, Answer, Question
from tests.helpers.paths import ROOT
from tests.helpers.sandboxes import all_stays_well, ask, bubblewrap, refused, seen
from tests.helpers.waits import scaled


@pytest.fixture(scope="module")
def sandbox():
    return bubblewrap()


@pytest.fixture(autouse=True)
def all_is_well(sandbox):
    with all_stays_well(sandbox):
        yield


# Taking more than is given


def test_a_fork_bomb_is_stopped_by_the_number_of_processes(sandbox):
    assert refused(sandbox, "import os\nwhile True: os.fork()") == "BlockingIOError"
    threads = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    assert refused(sandbox, threads) == "RuntimeError"


def test_a_fork_bomb_that_goes_on_ends_with_its_time(sandbox):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    begin = time.monotonic()
    assert ask(sandbox, bomb, "1", seconds=1.0) == [Answer("failed", "no answer")]
    assert time.monotonic() - begin < scaled(4)


def test_a_memory_bomb_hits_the_bound_of_its_process(sandbox):
    assert refused(sandbox, "x = bytearray(10**10)") == "MemoryError"
    assert ask(sandbox, "", "len([0] * 10**10)", "1 + 1")[1] == Answer("value", "2")
    assert seen(sandbox, "len(bytearray(100 << 20))", memory=256 * MIB) == 100 << 20
    assert ask(sandbox, "", "len(bytearray(100 << 20))", memory=96 * MIB)[0] == Answer("failed", "raised MemoryError")


@pytest.mark.parametrize("call", ["os.memfd_create('x')", "libc.shmget(0, 1 << 30, 0o1600)", "libc.msgget(0, 0o1600)"])
def test_memory_that_no_process_is_charged_for_cannot_be_had(sandbox, call):
    code = f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nif {call} == -1: raise OSError(ctypes.get_errno(), '')"
    assert refused(sandbox, code) == "PermissionError"


def test_printing_without_end_ends_the_program(sandbox):
    (answer,) = ask(sandbox, "while True: print('x' * 1000)", Question("stdin", ""), output=100_000)
    assert answer == Answer("failed", "too much output")


def test_values_without_end_are_cut_off(sandbox):
    flood = "import os\nwhile True:\n  for fd in range(3, 30):\n    try: os.write(fd, b'x' * 65536)\n    except OSError: pass"
    assert ask(sandbox, flood, "1", "2", seconds=2.0) == [Answer("failed", "no answer")] * 2


def test_the_temporary_folder_is_full_at_its_size(sandbox):
    fill = "def fill():\n  n = 0\n  try:\n    for i in range(99):\n      with open(f'/tmp/{i}', 'wb', 0) as f:\n"
    fill += "        while f.tell() < 1 << 20: n += f.write(bytes(1 << 16))\n  except OSError as e: return n, e.errno"
    written, error = seen(sandbox, "fill()", fill, disk=4 * MIB)["t"]
    assert 3 * MIB < written <= 4 * MIB
    assert error == 28  # ENOSPC


def test_the_temporary_folder_runs_out_of_files(sandbox):
    fill = "def fill():\n  for i in range(10**6):\n    try: open(f'/tmp/{i}', 'w').close()\n"
    fill += "    except OSError as e: return i, e.errno"
    made, error = seen(sandbox, "fill()", fill, files=200)["t"]
    assert 150 < made <= 200
    assert error == 28


def test_a_program_that_sleeps_or_spins_ends_with_its_time_and_keeps_what_it_answered(sandbox):
    for hang in ("while True: pass", "import time; time.sleep(99)"):
        begin = time.monotonic()
        answers = ask(sandbox, f"def f():\n  {hang}", "1 + 1", "f()", "3", seconds=1.5)
        assert answers == [Answer("value", "2"), Answer("failed", "no answer"), Answer("failed", "no answer")]
        assert time.monotonic() - begin < scaled(1.5 + 3)


def test_one_test_that_hangs_costs_its_own_time_only(sandbox):
    answers = ask(sandbox, "def f():\n  while True: pass", "f()", "3", seconds=9.0, test_seconds=0.5)
    assert answers == [Answer("failed", "no answer"), Answer("value", "3")]


def test_children_that_sleep_on_are_gone_with_the_program(sandbox):
    daemon = (
        "import os, time, signal\nif os.fork() == 0:\n  os.setsid()\n  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    )
    daemon += "  if os.fork() == 0: time.sleep(999)\n  os._exit(0)"
    begin = time.monotonic()
    assert ask(sandbox, daemon, "5") == [Answer("value", "5")]
    assert ask(sandbox, daemon + "\nprint(7)", Question("stdin", "")) == [Answer("stdout", "7\n")]
    assert time.monotonic() - begin < scaled(9)
    # `all_is_well` looks for the processes


# Looking around


def test_the_environment_holds_no_variable_of_ours(sandbox, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret-93")
    environment = dict(seen(sandbox, "dict(os.environ)", "import os")["d"])
    assert environment.keys() == {"PATH", "HOME", "PYTHONHASHSEED", "OMP_NUM_THREADS", "PWD", "LC_CTYPE"}


def test_home_repository_and_accounts_are_not_there(sandbox, tmp_path):
    (tmp_path / "secret").write_text("93")
    places = [
        ROOT / "pyproject.toml",
        Path(__file__),
        tmp_path / "secret",
        "/etc/shadow",
        "/etc/passwd",
        "/etc/hostname",
    ]
    for place in map(str, places):
        assert Path(place).exists()
        assert refused(sandbox, f"open({place!r})") == "FileNotFoundError"
    assert seen(sandbox, "os.listdir('/tmp')", "import os") == []
    top = set(seen(sandbox, "os.listdir('/')", "import os"))
    ways = {Path(folder).parts[1] for folder in (sys.base_prefix, sys.base_exec_prefix)}
    assert top <= {"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "tmp", "dev", "etc", "harness"} | ways
    home, python = str(Path.home()), sys.base_prefix
    found = f"[f for f in os.listdir({home!r}) if not {python!r}.startswith(os.path.join({home!r}, f))]"
    assert ask(sandbox, "import os", found)[0] in (Answer("value", "[]"), Answer("failed", "raised FileNotFoundError"))


def test_a_working_folder_among_the_systems_own_is_covered(tmp_path, monkeypatch):
    from hf_rlhf_plugins.rewards._sandbox import bubblewrap

    monkeypatch.chdir(tmp_path)
    assert bubblewrap._private([str(tmp_path.parent)]) == [str(tmp_path)]
    assert bubblewrap._private([str(tmp_path / "prefix")]) == []


def test_there_is_no_proc(sandbox):
    for place in ("/proc/self/status", "/proc/1/environ", "/proc/mounts", f"/proc/{os.getpid()}/fd/0", "/sys/kernel"):
        assert refused(sandbox, f"open({place!r})") == "FileNotFoundError"


def test_symlinks_out_of_the_temporary_folder_lead_nowhere(sandbox):
    for place in (str(ROOT / "pyproject.toml"), "/etc/shadow", "/root/.bashrc"):
        assert refused(sandbox, f"import os\nos.symlink({place!r}, '/tmp/l')\nopen('/tmp/l')") == "FileNotFoundError"


def test_nothing_but_the_temporary_folder_can_be_written(sandbox):
    places = ["/x", "/usr/x", "/etc/x", "/dev/x", "/harness/x", "/harness/sandbox_child.py", f"{sys.base_prefix}/x"]
    for place in places:
        assert refused(sandbox, f"open({place!r}, 'w')") in ("OSError", "PermissionError"), place
    assert not any(Path(place).exists() for place in ("/x", "/usr/x", "/etc/x", f"{sys.base_prefix}/x"))
    assert seen(sandbox, "open('/tmp/x', 'w').write('y')") == 1
    assert refused(sandbox, "import os\nos.chmod('/usr/bin', 0o777)") in ("OSError", "PermissionError")
    assert refused(sandbox, "import os\nos.mknod('/tmp/sda', 0o60600, os.makedev(8, 0))") == "PermissionError"


def test_a_server_in_the_parent_sees_no_connection(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        name = f"\0sandbox-{os.getpid()}"
        unix.bind(name)
        unix.listen()
        code = "import socket\ns = socket.socket(%s)\ns.settimeout(1)\ns.connect(%r)"
        assert refused(sandbox, code % ("", tcp.getsockname())) in ("OSError", "ConnectionRefusedError")
        assert refused(sandbox, code % ("socket.AF_UNIX", name)) == "ConnectionRefusedError"
        assert refused(sandbox, code % ("", ("192.0.2.1", 53))) == "OSError"
        for server in (tcp, unix):
            server.settimeout(0.2)
            with pytest.raises(TimeoutError):
                server.accept()


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_NETLINK", "AF_PACKET", "AF_ALG"])
def test_sockets_of_other_families_are_refused(sandbox, family):
    assert refused(sandbox, f"import socket\nsocket.socket(socket.{family}, socket.SOCK_RAW)") == "OSError"
    assert seen(sandbox, "[s.family for s in socket.socketpair()]", "import socket") == [1, 1]


CALLS = {
    "unshare(CLONE_NEWUSER)": "libc.unshare(0x10000000)",
    "clone(CLONE_NEWUSER)": "libc.syscall(56 if platform.machine() == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0)",
    "mount": "libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
    "umount": "libc.umount(b'/tmp')",
    "chroot": "libc.chroot(b'/tmp')",
    "ptrace": "libc.ptrace(16, os.getppid(), 0, 0)",
    "process_vm_readv": "libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)",
    "keyctl": "libc.syscall(250 if platform.machine() == 'x86_64' else 219, 0, -3)",
    "setuid": "libc.setuid(0)",
    "sethostname": "libc.sethostname(b'x', 1)",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_into_the_kernel_is_refused(sandbox, name):
    code = f"import ctypes, os, platform\nlibc = ctypes.CDLL(None, use_errno=True)\nfound = {CALLS[name]}"
    result, error = seen(sandbox, "found, ctypes.get_errno()", code)["t"]
    assert result == -1
    assert error in (1, 22)  # EPERM, or EINVAL for a user that the sandbox does not have
