"""An OpenEnv server whose sessions count down: the reward is 1 where the policy says the count. Argument: its port."""

from __future__ import annotations

import random
import sys
from typing import Any

import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
    message: str


class Count(Observation):
    text: str


class Countdown(Environment[Say, Count, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Count:
        self.count = random.Random(seed).choice([2, 3])
        return Count(text=str(self.count), done=False, reward=None)

    def step(self, action: Say, timeout_s: float | None = None, **_: Any) -> Count:
        reward, self.count = float(action.message == str(self.count)), self.count - 1
        return Count(text=str(self.count), done=self.count == 0, reward=reward)

    @property
    def state(self) -> State:
        return State()


if __name__ == "__main__":
    app = create_fastapi_app(Countdown, Say, Count, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
