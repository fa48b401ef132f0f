"""Nothing that an inline reward does to its process reaches the run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Rollouts
from hf_rlhf.scoring.runners.isolation import isolated
from hf_rlhf.scoring.scorer import Scorer


def texts(*completions: str) -> Rollouts:
    rows = len(completions)
    return Rollouts(
        prompts=["?"] * rows,
        completions=list(completions),
        prompt_ids=[[1]] * rows,
        completion_ids=[[1]] * rows,
        masks=[[1]] * rows,
        finish_reasons=["stop"] * rows,
        group_ids=list(range(rows)),
    )


def scorer(function: Callable[..., Any], **settings: Any) -> Scorer:
    return Scorer([("mine", load_plugin("rewards", "function", function=function, **settings))])


def state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        **{f"autocast {d}": (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")},
        "cache": torch.is_autocast_cache_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "errors": np.geterr(),
        "python": random.getstate(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "files": [os.fstat(number).st_ino for number in (0, 1, 2)],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "recursion": sys.getrecursionlimit(),
    }


def _chdir() -> None:
    os.chdir("/")


def _environment() -> None:
    os.environ["HF_RLHF_TEST_LEFT_BEHIND"] = "1"
    os.environ.pop("PATH", None)


def _streams() -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _close_streams() -> None:
    sys.stdout.close()
    sys.stderr.close()


def _descriptors() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def _signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _autocast() -> None:
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_cache_enabled(False)


def _draw() -> None:
    random.random()
    np.random.rand()
    torch.rand(3)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


CHANGES: dict[str, Callable[[], Any]] = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "gradients": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "determinism": lambda: torch.use_deterministic_algorithms(True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "autocast": _autocast,
    "draws": _draw,
    "seeds": _seed,
    "numpy errors": lambda: np.seterr(all="raise"),
    "signals": _signals,
    "streams": _streams,
    "closed streams": _close_streams,
    "descriptors": _descriptors,
    "folder": _chdir,
    "environment": _environment,
    "recursion": lambda: sys.setrecursionlimit(5000),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("then", ["return", "raise", "exit"])
def test_a_reward_leaves_the_process_as_it_was(name, rowwise, then):
    def reward(completions: list[str], **_: Any) -> list[float]:
        CHANGES[name]()
        if then == "raise":
            raise ValueError("after it")
        if then == "exit":
            sys.exit(0)
        return [1.0] * len(completions)

    with scorer(reward, rowwise=rowwise) as mine:
        before = state()
        found = mine.ask(texts("a", "b"), 1)["mine"]
        assert state() == before
    assert bool(found.failures) == (then != "return")


def test_an_async_reward_leaves_the_process_as_it_was():
    async def reward(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        for name in ("default dtype", "draws", "streams", "folder", "environment"):
            CHANGES[name]()
        return [1.0] * len(completions)

    with scorer(reward) as mine:
        before = state()
        assert mine.ask(texts("a"))["mine"].answers == [1.0]
        assert state() == before


def test_a_reward_sees_no_autocast():
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32)] * len(completions)

    with scorer(reward) as mine, torch.autocast("cpu", torch.bfloat16):
        assert mine.ask(texts("a"))["mine"].answers == [1.0]
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_one_source_does_not_see_what_another_changed():
    def spoils(completions: list[str], **_: Any) -> list[float]:
        for change in ("default dtype", "folder", "environment"):
            CHANGES[change]()
        return [0.0] * len(completions)

    def sees(completions: list[str], **_: Any) -> list[float]:
        return [float(torch.get_default_dtype() == torch.float32 and "PATH" in os.environ)] * len(completions)

    sources = [(f.__name__, load_plugin("rewards", "function", function=f)) for f in (spoils, sees)]
    with Scorer(sources) as both:
        assert both.ask(texts("a"))["sees"].answers == [1.0]


def test_what_a_reward_prints_goes_to_stderr_as_plain_text(capsys):
    def reward(completions: list[str], **_: Any) -> list[float]:
        print(completions[0])
        print(completions[0], file=sys.stderr)
        return [1.0] * len(completions)

    with scorer(reward) as mine:
        mine.ask(texts("\x1b[2Jgone"))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "\\x1b[2Jgone\n" * 2)


def test_a_live_display_goes_on_writing_to_its_own_stream():
    from rich.console import Console

    with isolated():
        assert Console().file is not sys.stderr
        assert getattr(sys.stdout, "rich_proxied_file", None) is not None
        shown = Console().file
    assert shown is sys.stdout


def test_the_default_device_of_the_run_is_restored():
    torch.set_default_device("meta")
    try:
        with isolated(), contextlib.suppress(ValueError):
            torch.set_default_device("cpu")
            raise ValueError
        assert torch.get_default_device() == torch.device("meta")
    finally:
        torch.set_default_device(None)


def test_it_costs_less_than_two_milliseconds():
    import timeit

    def once() -> None:
        with isolated():
            pass

    assert min(timeit.repeat(once, number=10, repeat=5)) / 10 < 0.002
