"""Runner on another machine, over HTTP: sends code, expressions and inputs as JSON and receives results as JSON.

docs/sandbox.md documents the protocol; `server` is a runner. Expected results are never sent.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from .backend import MIB, Answer, Backend, Limits, Question, SandboxError, new_nonce

VERSION = 1
WAITING = 30.0
"""Seconds that a request may take beyond the program's time, for the network and a busy runner."""
BOUNDS = ("seconds", "test_seconds", "memory", "processes", "disk", "files", "output")


class Remote(Backend):
    """Backend that posts each program to a URL."""

    def __init__(self, url: str, token_env: str | None = None) -> None:
        self.url = url
        self.token_env = token_env

    def problem(self) -> str | None:
        if self.token_env is not None and not os.environ.get(self.token_env):
            return f"token_env: environment variable {self.token_env} is not set"
        return _problem(self.url, self.token_env)

    def run(self, code: str, questions: Sequence[Question], limits: Limits) -> list[Answer]:
        nonce = new_nonce()
        asked = {
            "version": VERSION,
            "nonce": nonce,
            "code": code,
            "tests": [{question.kind: question.text} for question in questions],
            "limits": {name: getattr(limits, name) for name in BOUNDS},
        }
        told = self._post(asked, limits.seconds + WAITING, 4 * limits.output + MIB)
        if not isinstance(told, dict) or not secrets.compare_digest(str(told.get("nonce")), nonce):
            raise SandboxError(f"{self.url}: the answer must repeat the nonce of its request")
        results = told.get("results")
        if not isinstance(results, list) or len(results) != len(questions):
            raise SandboxError(f"{self.url}: results must be a list of one per test, {len(questions)} in all")
        return [self._answer(result) for result in results]

    def _answer(self, result: Any) -> Answer:
        match result:
            case {"value": str(text)}:
                return Answer("value", text)
            case {"stdout": str(text)}:
                return Answer("stdout", text)
            case {"failed": str(text)}:
                return Answer("failed", text)
        raise SandboxError(f"{self.url}: a result must be value, stdout or failed with a text, got {result!r:.200}")

    def _post(self, asked: Mapping[str, Any], seconds: float, most: int) -> Any:
        import httpx

        end = time.monotonic() + seconds
        headers = {"Authorization": f"Bearer {os.environ[self.token_env]}"} if self.token_env else {}
        try:
            with httpx.Client(timeout=seconds, trust_env=False) as client:
                body = json.dumps(asked).encode()
                headers["Content-Type"] = "application/json"
                with client.stream("POST", self.url, content=body, headers=headers) as reply:
                    text = bytearray()
                    for chunk in reply.iter_bytes():
                        text += chunk
                        if time.monotonic() > end:
                            raise SandboxError(f"{self.url}: no complete answer within {seconds:g} s")
                        if len(text) > most:
                            raise SandboxError(f"{self.url}: the answer exceeds {most} bytes")
            if reply.status_code != 200:
                raise SandboxError(f"{self.url}: status {reply.status_code}: {bytes(text[:300])!r}")
            return json.loads(text)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            raise SandboxError(f"{self.url}: {type(error).__name__}: {error}") from error


@cache
def _problem(url: str, token_env: str | None) -> str | None:
    try:
        answers = Remote(url, token_env).run("x = 6", [Question("call", "x * 7")], Limits())
    except SandboxError as error:
        return f"sandbox `remote`: {error}. Start a runner there (docs/sandbox.md), or fix `url`"
    if answers != [Answer("value", "42")]:
        return f"sandbox `remote`: {url} returned {answers[0].text!r} instead of 42 for a trial program"
    return None
