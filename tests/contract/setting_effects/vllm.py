"""Two values of each setting with which the engine `vllm` asks its servers, or takes their answers, otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hf_rlhf import load_plugin
from hf_rlhf_plugins._http import HttpError
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers import runs
from tests.helpers.servers import Raw
from tests.helpers.vllm_stub import GENERATE, Stub, Trouble

ENVIRONMENT = {"NO_PROXY": "127.0.0.1", "FIRST_KEY": "1", "SECOND_KEY": "2"}
QUIET: Trouble = lambda route, body, number: None  # noqa: E731


def outcome(folder: Path, trouble: Trouble = QUIET, **settings: Any) -> Any:
    """What a server is asked in one rollout, and what comes of it: texts, or an error."""
    with patch.dict("os.environ", ENVIRONMENT), Stub(folder / "model", trouble) as server:
        rollout = {**runs.SAMPLED, "use": "vllm", "url": server.url, **settings}
        made = runs.trainer(folder, rollout=rollout)
        try:
            texts: Any = made.collector.collect(0).extra["texts"]["completion"]
        except (HttpError, RuntimeError) as error:
            texts = type(error).__name__
        made.close()
        keys = {request.headers.get("authorization") for request in server.requests}
        loaded = {str(Path(body["args"][0]).parent) for body in server.sent("/collective_rpc") if "args" in body}
        return texts, sorted(map(repr, server.sent(GENERATE))), keys, loaded


def effect(
    setting: str, first: Any, second: Any, trouble: Callable[[], Trouble] = lambda: QUIET, **others: Any
) -> None:
    EFFECTS[f"rollout.vllm.{setting}"] = SettingEffect(
        first, second, lambda folder, value: outcome(folder, trouble(), **{**others, setting: value})
    )


def at_first(answer: Any) -> Callable[[], Trouble]:
    """The first completions asked for after the probe meet trouble: an answer, or seconds of silence."""

    def trouble(route: str, body: Any, number: int) -> Any:
        if route != GENERATE or number != 1:
            return None
        return time.sleep(answer) if isinstance(answer, float) else answer

    return lambda: trouble


effect("prompts", 4, 2)
effect("num_generations", 4, 3)
effect("temperature", 1.0, 0.7)
effect("skip_special_tokens", True, False, max_new_tokens=20)
effect("max_new_tokens", 5, 3)
effect("top_p", 1.0, 0.5)
effect("top_k", 0, 3)
effect("min_p", 0.0, 0.2)
effect("repetition_penalty", 1.0, 1.5)
effect("stop_strings", [], ["a"])
effect("max_sampler_gap", 0.05, 1e-12)
effect("token_env", "FIRST_KEY", "SECOND_KEY")
effect("request_timeout", 5.0, 0.2, at_first(0.8), request_retries=0)
effect("request_retries", 0, 1, at_first(Raw(status=500)))
effect("max_wait", 30.0, 0.1, at_first(Raw(status=429, headers={"Retry-After": "0.3"})))


def by_folder(folder: Path, name: str) -> Any:
    return outcome(folder, sync={"use": "folder", "path": str(folder / name)})


EFFECTS["sync.folder.path"] = SettingEffect("a", "b", by_folder)


def by_transport(folder: Path, name: str) -> Any:
    """What the workers are asked to do."""
    with patch.dict("os.environ", ENVIRONMENT), Stub(folder / "model") as server:
        made = runs.trainer(folder, rollout={**runs.SAMPLED, "use": "vllm", "url": server.url, "sync": name})
        made.collector.collect(0)
        made.close()
        return [body["method"] for body in server.sent("/collective_rpc")]


EFFECTS["rollout.vllm.sync"] = EFFECTS["sync.gloo"] = SettingEffect("gloo", "folder", by_transport)
for name in ("nccl", "ipc"):
    EFFECTS[f"sync.{name}"] = SettingEffect(
        name, "gloo", lambda folder, value: load_plugin("sync", value).serve_flags()
    )


def at_once(folder: Path, value: int) -> int:
    """The most completions that were asked for at a time."""
    now: list[int] = []
    most = [0]

    def slow(route: str, body: Any, number: int) -> None:
        if route == GENERATE:
            now.append(number)
            most.append(len(now))
            time.sleep(0.1)
            now.remove(number)

    outcome(folder, slow, num_workers=value)
    return max(most)


EFFECTS["rollout.vllm.num_workers"] = SettingEffect(1, 4, at_once)


def started(folder: Path, serve: Any) -> Any:
    """Whether a server that is there is asked, or one is started where none may answer yet."""
    with patch("hf_rlhf_plugins.rollout._vllm_child.GRACE", 0.0):
        try:
            return bool(outcome(folder, serve=serve))
        except ValueError as error:
            return str(error)


def which(folder: Path, place: int) -> Any:
    """Whether each of two servers is asked."""
    with Stub(folder / "model") as other:
        found = outcome(folder, **({"url": other.url} if place else {}))
        return bool(other.requests), bool(found[1])


EFFECTS["rollout.vllm.serve"] = SettingEffect(
    None, {"python": "/nowhere"}, lambda folder, serve: started(folder, serve)
)
EFFECTS["rollout.vllm.url"] = SettingEffect(0, 1, which)
