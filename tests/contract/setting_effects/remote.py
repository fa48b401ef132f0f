"""Two values of each setting of the sources that ask a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hf_rlhf import load_plugin
from hf_rlhf.testing import rollouts
from hf_rlhf_plugins._http import HttpError
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers.servers import Raw, Server

TEXTS = ["5", "ab"]
COLUMNS = {"answer": ["x", "y"]}
ENVIRONMENT = {"NO_PROXY": "127.0.0.1", "FIRST_KEY": "1", "SECOND_KEY": "2"}


def judged(body: Any, number: int) -> Any:
    message = {"content": 'Score: 4 [[6]] {"score": 8}'}
    return {"choices": [{"message": message}], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


def scored(body: Any, number: int) -> Any:
    return {"version": 1, "scores": [len(text) for text in body["completions"]]}


ANSWERS: dict[str, Callable[[Any, int], Any]] = {"judge": judged, "remote": scored}
URLS = {"judge": "base_url", "remote": "url"}


def outcome(name: str, reply: Callable[[Any, int], Any] | None = None, **settings: Any) -> Any:
    """What a server is asked, what comes of it in two calls, or that it is an error, and what is logged."""
    with patch.dict("os.environ", ENVIRONMENT), Server(reply or ANSWERS[name]) as server:
        needed = {URLS[name]: server.url, **({"model": "m"} if name == "judge" else {})}
        given = {**needed, **settings}
        if str(given[URLS[name]]).startswith("/"):
            given[URLS[name]] = server.url + given[URLS[name]]
        source = load_plugin("rewards", name, **given)
        try:
            scores: Any = [asyncio.run(source(rollouts(TEXTS, columns=COLUMNS))) for _ in range(2)]
        except HttpError:
            scores = "error"
        finally:
            source.close()
        asked = [(x.path, x.body, x.headers.get("authorization"), x.headers.get("x-team")) for x in server.requests]
        return sorted(map(repr, asked)), scores, source.take_logs()


def effect(name: str, setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"rewards.{name}.{setting}"] = SettingEffect(
        first, second, lambda folder, value: outcome(name, **{**others, setting: value})
    )


def once(trouble: Raw | float, answer: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """The first request meets trouble: this answer, or seconds of silence."""

    def reply(body: Any, number: int) -> Any:
        if number == 0 and isinstance(trouble, Raw):
            return trouble
        time.sleep(trouble if number == 0 and isinstance(trouble, float) else 0)
        return answer(body, number)

    return reply


for plugin, answer in ANSWERS.items():
    busy = Raw(status=429, headers={"Retry-After": "0.3"})
    effect(plugin, "token_env", "FIRST_KEY", "SECOND_KEY")
    effect(plugin, "headers", {"X-Team": "red"}, {"X-Team": "${SECOND_KEY}"})
    effect(plugin, "request_timeout", 5.0, 0.2, request_retries=0, reply=once(0.8, answer))
    effect(plugin, "request_retries", 0, 1, reply=once(Raw(status=500), answer))
    effect(plugin, "max_wait", 30.0, 0.1, reply=once(busy, answer))
effect("remote", "url", "/a", "/b")
effect("remote", "send", [], ["answer"])
effect("remote", "send_ids", False, True)
effect("remote", "batch_size", 64, 1)
effect("judge", "base_url", "/v1", "/v2")
effect("judge", "model", "m", "n")
effect("judge", "template", None, "Grade {completion}, which should be {answer}.")
effect("judge", "system", None, "Be strict.")
effect("judge", "pattern", None, r"\[\[(\d+)\]\]")
effect("judge", "json_field", None, "score")
effect("judge", "minimum", 0, 1)
effect("judge", "maximum", 10, 8)
effect("judge", "temperature", 0.0, 0.5)
effect("judge", "max_tokens", 1024, None)
effect("judge", "seed", None, 3)
effect("judge", "extra", {}, {"reasoning_effort": "low"})
effect("judge", "prompt_price", None, 2.0, completion_price=1.0)
effect("judge", "completion_price", None, 2.0, prompt_price=1.0)


def replies(folder: Path, kept: bool) -> Any:
    return outcome("judge", cache=str(folder / "replies.sqlite") if kept else None)[0]


def are_apart(folder: Path, rate: float) -> bool:
    """Return True if the requests are more than 0.2 s apart on average."""
    times: list[float] = []

    def reply(body: Any, number: int) -> Any:
        times.append(time.monotonic())
        return judged(body, number)

    outcome("judge", reply, requests_per_minute=rate)
    return max(times) - min(times) > 0.2 * (len(times) - 1)  # one that arrives late comes closer to the next


EFFECTS["rewards.judge.cache"] = SettingEffect(False, True, replies)
EFFECTS["rewards.judge.requests_per_minute"] = SettingEffect(60_000.0, 200.0, are_apart)
