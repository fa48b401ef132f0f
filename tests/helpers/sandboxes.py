"""What the tests of sandboxes share: the one to try, asking a program, and the processes that are left."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf_plugins.rewards._sandbox.backend import Answer, Backend, Limits, Question
from hf_rlhf_plugins.rewards._sandbox.bubblewrap import Bubblewrap


def bubblewrap() -> Bubblewrap:
    """The sandbox, or a skip that says why it cannot run; in CI (`CI=true`) it must."""
    backend = Bubblewrap()
    adopt_orphans()
    problem = backend.problem()
    if problem and not os.environ.get("CI"):
        pytest.skip(problem)
    assert problem is None
    return backend


def adopt_orphans() -> None:
    """Whatever outlives its parent below this process becomes its child, so that `descendants` finds it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def descendants() -> dict[int, str]:
    """Processes below this one that run: number -> command."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            name, _, rest = (entry / "stat").read_text().rpartition(")")
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and rest.split()[0] != "Z":
            parents[int(entry.name)], names[int(entry.name)] = int(rest.split()[1]), name
    found: dict[int, str] = {}
    for pid in parents:
        place = pid
        while place in parents and place != os.getpid():
            place = parents[place]
        if place == os.getpid() != pid:
            found[pid] = names[pid]
    return found


def nothing_left(before: dict[int, str]) -> bool:
    """Whether the processes below this one are again those of `before`, within a few seconds."""
    for _ in range(500):
        if descendants().keys() <= before.keys():
            return True
        time.sleep(0.01)
    return False


def ask(backend: Backend, code: str, *questions: str | Question, **limits: Any) -> list[Answer]:
    """What a program answers to expressions, within 5 s where nothing else is said."""
    asked = [question if isinstance(question, Question) else Question("call", question) for question in questions]
    return backend.run(code, asked, Limits(**{"seconds": 5.0, "test_seconds": 5.0, **limits}))


def value(answer: Answer) -> Any:
    """The JSON of a value."""
    assert answer.kind == "value", answer
    return json.loads(answer.text)


def seen(backend: Backend, expression: str, code: str = "", **limits: Any) -> Any:
    """The JSON of an expression's value."""
    return value(ask(backend, code, expression, **limits)[0])


def refused(backend: Backend, code: str, **limits: Any) -> str:
    """The name of the error that a program raises."""
    (answer,) = ask(backend, code, "1", **limits)
    assert answer.kind == "failed", answer
    return answer.text.removeprefix("raised ")


@contextmanager
def all_stays_well(backend: Backend) -> Iterator[None]:
    """Afterwards no process is left, no file is open that was not, and the next program runs as ever."""
    good = ("def double(x): return 2 * x", "double(4)")
    ask(backend, *good)
    before, files = descendants(), set(os.listdir("/proc/self/fd"))
    yield
    assert nothing_left(before)
    assert set(os.listdir("/proc/self/fd")) <= files
    assert ask(backend, *good) == [Answer("value", "8")]
