"""Bubblewrap where it cannot run, containers, and resource limits alone, which are no sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hf_rlhf_plugins.rewards._sandbox import bubblewrap as bubblewrap_module
from hf_rlhf_plugins.rewards._sandbox import engine as engine_module
from hf_rlhf_plugins.rewards._sandbox.backend import MIB, Answer, Limits, Question, SandboxError
from hf_rlhf_plugins.rewards._sandbox.bubblewrap import Bubblewrap
from hf_rlhf_plugins.rewards._sandbox.engine import Engine
from hf_rlhf_plugins.rewards._sandbox.rlimits import Rlimits
from tests.helpers.sandboxes import ask, bubblewrap, descendants, nothing_left, refused, seen
from tests.helpers.waits import scaled

SQUARE = "def f(x): return x * x"


@pytest.fixture(autouse=True)
def forget_problems():
    """Each test tries its backends anew."""
    yield
    for module in (bubblewrap_module, engine_module):
        module._problem.cache_clear()


# Bubblewrap where it cannot run


def test_a_machine_without_bubblewrap_is_told_how_to_install_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    bubblewrap_module._problem.cache_clear()
    problem = Bubblewrap().problem()
    assert "command bwrap not found: install it (Debian, Ubuntu: apt-get install bubblewrap" in problem
    assert "docker, podman or remote" in problem
    with pytest.raises(SandboxError, match="command bwrap not found"):
        ask(Bubblewrap(), SQUARE, "f(2)")


def test_a_bubblewrap_that_may_not_make_namespaces_says_so(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    bubblewrap_module._problem.cache_clear()
    problem = Bubblewrap().problem()
    assert "No permissions to create new namespace" in problem
    assert "user namespaces" in problem
    begin = time.monotonic()
    with pytest.raises(SandboxError, match="did not start"):
        ask(Bubblewrap(), SQUARE, "f(2)")
    assert time.monotonic() - begin < scaled(5)


def test_a_problem_is_looked_for_once(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    bubblewrap_module._problem.cache_clear()
    first = Bubblewrap().problem()
    monkeypatch.setattr(Bubblewrap, "run", None)
    assert Bubblewrap().problem() == first


def test_another_interpreter_brings_its_packages():
    bubblewrap()
    program = "import annotated_types\ndef f(): return annotated_types.__name__"
    assert refused(Bubblewrap(), program) == "ModuleNotFoundError"
    assert seen(Bubblewrap(sys.executable), "f()", program, seconds=20.0) == "annotated_types"
    with pytest.raises(SandboxError, match="python must be a working Python interpreter, got '/nowhere/python'"):
        ask(Bubblewrap("/nowhere/python"), SQUARE, "f(2)")


OTHER_USER = r"""
import os, sys
sys.path.insert(0, sys.argv[1])
from copied.backend import Answer, Limits, Question
from copied.bubblewrap import Bubblewrap

def ask(code, *calls, **limits):
    return [answer.text for answer in Bubblewrap().run(code, [Question("call", call) for call in calls], Limits(**limits))]

assert os.geteuid() == 1000
assert Bubblewrap().problem() is None, Bubblewrap().problem()
assert ask("import os", "os.getuid()", "open('/etc/passwd')") == ["65534", "raised FileNotFoundError"]
assert ask("import os\nwhile True: os.fork()", "1") == ["raised BlockingIOError"]
assert ask("import os\nos.kill(os.getppid(), 9)", "1") == ["ended the sandbox"]
assert ask("import os\nos.kill(-1, 9)", "1") == ["ended the sandbox"]
fill = "def fill():\n  for i in range(10**6):\n    try: open(f'/tmp/{i}', 'w').close()\n    except OSError: return i < 200"
assert ask(fill, "fill()", files=200) == ["true"]
libc = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)"
calls = ["libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 32, b'size=1g')", "libc.ptrace(16, os.getppid(), 0, 0)", "libc.setuid(0)"]
assert ask(libc, *calls) == ["-1"] * 3
print("as due")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as such a user")
def test_a_user_without_rights_has_the_same_sandbox():
    bubblewrap()
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    if python is None or subprocess.run([python, "-c", new_enough], check=False).returncode != 0:
        pytest.skip("no Python 3.11 that every user may start")
    folder = tempfile.mkdtemp()
    try:
        Path(folder).chmod(0o755)
        (Path(folder) / "copied").mkdir()
        for file in Path(bubblewrap_module.__file__).parent.glob("*.py"):
            shutil.copy(file, Path(folder) / "copied")
        command = [python, "-B", "-c", OTHER_USER, folder]
        done = subprocess.run(
            command, capture_output=True, text=True, user=1000, group=1000, extra_groups=[], cwd="/", env={}
        )
        assert done.stdout == "as due\n", done.stderr
    finally:
        shutil.rmtree(folder)


# Containers


def test_a_container_is_started_without_network_rights_or_a_place_to_write():
    command = Engine("docker", "mine:1").command(Limits(memory=100 * MIB, processes=3, disk=5 * MIB, files=99), "name")
    text = " ".join(command[: command.index("mine:1")])
    assert text.startswith("docker run --rm --interactive --pull never --name name --network none --read-only")
    assert "--tmpfs /tmp:rw,nosuid,nodev,mode=1777,size=5242880,nr_inodes=99 --workdir /tmp" in text
    assert "--user 65534:65534 --cap-drop ALL --security-opt no-new-privileges" in text
    assert "--memory 369m --memory-swap 369m --pids-limit 5" in text
    assert "volume" not in text
    assert "mount" not in text
    assert "privileged " not in text.replace("no-new-privileges", "")
    assert command[0] == "docker"
    assert Engine("podman").command(Limits(), "name")[0] == "podman"


def test_an_engine_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "command podman not found: install it" in Engine("podman").problem()
    with pytest.raises(SandboxError, match="podman does not start"):
        ask(Engine("podman"), SQUARE, "f(2)")


def engine(folder: Path, body: str) -> None:
    """A command `docker` that does what `body` says."""
    (folder / "docker").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "docker").chmod(0o755)


def test_an_engine_that_does_not_answer_and_an_image_that_is_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    engine(tmp_path, "echo 'Cannot connect to the daemon' >&2; exit 1")
    assert "the engine does not answer (Cannot connect to the daemon): start it" in Engine("docker").problem()
    engine_module._problem.cache_clear()
    engine(tmp_path, "[ $1 = info ] && exit 0; echo 'No such image' >&2; exit 1")
    problem = Engine("docker", "mine:1").problem()
    assert "image 'mine:1' not found (No such image): run `docker pull mine:1`" in problem


def test_the_harness_that_a_container_is_given_judges_programs(tmp_path, monkeypatch):
    """The command after the image's name, run here: all of it but the container."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    skip = f'[ $1 = run ] || exit 0; while [ "$1" != mine:1 ]; do shift; done; shift; cd {tmp_path}; exec {sys.executable} "$@"'
    engine(tmp_path, skip)
    backend = Engine("docker", "mine:1")
    assert backend.problem() is None
    answers = ask(
        backend, SQUARE + "\nif __name__ == '__main__': print(f(int(input())))", "f(3)", Question("stdin", "5")
    )
    assert answers == [Answer("value", "9"), Answer("stdout", "25\n")]
    assert ask(backend, "while True: pass", "1", seconds=1.0) == [Answer("failed", "no answer")]


def test_a_container_that_goes_on_is_removed_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(engine_module, "STARTING", 0.5)
    engine(tmp_path, f'echo "$@" >> {tmp_path}/asked; [ $1 = run ] && {{ echo ready; exec sleep 99; }}; exit 0')
    before = descendants()
    begin = time.monotonic()
    assert ask(Engine("docker"), SQUARE, "f(2)", seconds=0.5) == [Answer("failed", "took too long")]
    assert time.monotonic() - begin < scaled(8)
    started, removed = (
        (tmp_path / "asked").read_text().splitlines()[0],
        (tmp_path / "asked").read_text().splitlines()[-1],
    )
    name = started.split("--name ")[1].split()[0]
    assert removed == f"rm --force {name}"
    assert nothing_left(before)


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_a_real_container_holds_its_program(name):
    backend = Engine(name, os.environ.get("UNIT_TESTS_IMAGE"))
    problem = backend.problem()
    if problem:
        pytest.skip(problem)
    limits = {"seconds": 10.0}
    assert ask(backend, SQUARE, "f(3)", Question("stdin", ""), **limits) == [Answer("value", "9"), Answer("stdout", "")]
    assert refused(backend, "open('/x', 'w')", **limits) == "OSError"
    assert refused(backend, "import socket\nsocket.create_connection(('192.0.2.1', 53), 2)", **limits) == "OSError"
    assert refused(backend, "import os\nwhile True: os.fork()", **limits) == "BlockingIOError"
    assert seen(backend, "os.getuid()", "import os", **limits) == 65534
    fill = "def fill():\n  for i in range(99):\n    try: open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\n"
    fill += "    except OSError: return i"
    assert seen(backend, "fill()", fill, disk=5 * MIB, **limits) <= 5
    assert ask(backend, "while True: pass", "1", seconds=2.0) == [Answer("failed", "no answer")]


# Resource limits


def test_resource_limits_judge_programs_and_clean_up_after_them():
    backend = Rlimits()
    bubblewrap_or_not = descendants()
    assert backend.problem() is None
    assert ask(backend, SQUARE, "f(3)", "f('a')") == [Answer("value", "9"), Answer("failed", "raised TypeError")]
    assert ask(backend, "print(int(input()) + 1)", Question("stdin", "4")) == [Answer("stdout", "5\n")]
    assert refused(backend, "x = bytearray(10**10)") == "MemoryError"
    assert ask(backend, "while True: pass", "1", seconds=1.0) == [Answer("failed", "no answer")]
    orphan = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(99)\n  os._exit(0)"
    assert ask(backend, orphan, "1") == [Answer("value", "1")]
    assert nothing_left(bubblewrap_or_not)


def test_resource_limits_are_no_sandbox(tmp_path):
    """What the other backends refuse: here the program does it."""
    (tmp_path / "secret").write_text("93")
    assert seen(Rlimits(), f"open({str(tmp_path / 'secret')!r}).read()") == "93"
    assert seen(Rlimits(), f"open({str(tmp_path / 'left')!r}, 'w').write('x')") == 1
    assert (tmp_path / "left").exists()


def test_a_program_under_resource_limits_has_an_empty_folder_and_no_environment(monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret-93")
    program = "import os\ndef look(): return os.listdir('.'), os.getcwd(), sorted(os.environ)"
    listed, folder, names = seen(Rlimits(), "look()", program)["t"]
    assert listed == []
    assert "API_TOKEN" not in names
    assert not Path(folder).exists(), "it is removed"
    assert refused(Rlimits(), "import sandbox_child, backend") == "ModuleNotFoundError"
