"""Checks of environments: episodes with an engine that says the same at every call."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_rlhf.axes import Environment, RolloutEngine
from hf_rlhf.batch import Completions, Context, Prompt
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.conformance.common import Checks
from hf_rlhf.contract.plugin_copy import fresh
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.training.environments.episode import EnvironmentFailure
from hf_rlhf.training.environments.rollout import Played, Players

SAID = ("5", "no idea")
"""Texts of the policy: in some episodes it says one at every turn, in others the other."""
LONGEST_S = 10.0
"""Seconds that an environment may take between two turns here."""


@dataclass(kw_only=True)
class _Says(RolloutEngine):
    """Says one text at every call."""

    name = "says"

    text: str
    """The text."""

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        tokenizer = policy.tokenizer
        ids = [*tokenizer(self.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows = len(prompts) * num_generations
        return Completions(ids=[list(ids) for _ in range(rows)], finish_reasons=["stop"] * rows)


def environment_checks(
    plugin: Environment, policy: Callable[[], Any], tokenizer: Any, prompts: Sequence[Prompt]
) -> Checks:
    """Yield the checks of an environment in episodes that begin with these prompts."""
    recipe = load_recipe("quickstart").algorithm()
    model = policy()

    def play(text: str, group: int = 3, own: Environment | None = None, **settings: Any) -> Played:
        own = own or copy.copy(plugin)
        settings = {"when": None, "timeout": min(plugin.timeout, LONGEST_S), "on_error": "none"} | settings
        if own.plays_in_processes:
            settings["workers"] = "inline"
        for name, value in settings.items():
            setattr(own, name, value)
        players = Players(
            algorithm=replace(recipe, environment=[own], rollout=_Says(text=text)),
            policy=Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu")),
            autocast=nullcontext,
        )
        return players(copy.deepcopy(prompts), list(range(len(prompts))), group, None, ("conformance",), (0,))

    yield "its episodes end, with an outcome or over", lambda: _end(play)
    yield "equal seeds give equal episodes", lambda: _repeats(play)
    yield "an episode does not depend on those that play beside it", lambda: _alone(play)
    yield "it ends where the policy has no turn left", lambda: _end(play, max_turns=1)
    yield "it ends where the policy has no token left", lambda: _end(play, max_tokens=1)
    yield "it leaves no process behind", lambda: _leaves_nothing(plugin, play)
    yield "only the model that it is given samples", lambda: _samples_nothing(plugin, play, model, tokenizer)
    yield "its columns have a plain value for each row", lambda: _has_plain_columns(play)
    for schema in plugin.tool_schemas():
        name = schema["function"]["name"]
        yield f"a wrong call of its tool {name} does not end an episode", partial(_survives, play, name)


def _end(play: Callable[..., Played], **settings: Any) -> None:
    for text in SAID:
        try:
            played = play(text, **settings)
        except EnvironmentFailure as error:
            raise AssertionError(str(error)) from error
        for row, end in enumerate(played.completions.columns["episode/end"]):
            assert end in ("played", "over"), (
                f"episode {row}, in which the policy says {text!r}, ended with {end}: {played.reasons[row]}. Let Over pass, or "
                "catch it and return an outcome"
            )


def _shown(played: Played, rows: Sequence[int] | None = None) -> list[Any]:
    c = played.completions
    chosen = range(len(c.ids)) if rows is None else rows
    columns = {name: [values[i] for i in chosen] for name, values in c.columns.items()}
    return [[c.ids[i] for i in chosen], columns, [played.messages[i] for i in chosen]]


def _repeats(play: Callable[..., Played]) -> None:
    for text in SAID:
        random.seed(1)
        torch.manual_seed(1)
        first = _shown(play(text))
        random.seed(2)
        torch.manual_seed(2)
        again = _shown(play(text))
        assert repr(first) == repr(again), (
            "equal tasks give different episodes. Draw random numbers from task.seed alone"
        )


def _alone(play: Callable[..., Played]) -> None:
    for text in SAID:
        several, one = play(text, group=3), play(text, group=1)
        rows = [i for i, episode in enumerate(several.completions.episodes or ()) if episode % 3 == 0]
        assert repr(_shown(several, rows)) == repr(_shown(one)), (
            "an episode differs by what plays beside it. Keep what belongs to an episode in local variables of play"
        )


def _leaves_nothing(plugin: Environment, play: Callable[..., Played]) -> None:
    before = _children()
    play(SAID[0])
    left = _children() - before
    assert not left, f"processes {sorted(left)} are left. Start them in setup and stop them in close, or in play"
    _in_use(plugin, None, lambda own: play(SAID[0], own=own))
    left = _children() - before
    assert not left, f"processes {sorted(left)} are left after close, which must stop what setup started"


def _in_use(plugin: Environment, context: Context | None, use: Callable[[Environment], Any]) -> None:
    """Set up a copy of the environment, use it, and close it."""
    own = fresh(plugin)
    try:
        own.setup(context or Context(device=torch.device("cpu"), policy=None, tokenizer=None))
        use(own)
    finally:
        own.close()


def _samples_nothing(plugin: Environment, play: Callable[..., Played], model: Any, tokenizer: Any) -> None:
    """Play with an engine that runs no model, and a policy that notes whether it is run."""
    runs: list[Any] = []
    context = Context(device=torch.device("cpu"), policy=model, tokenizer=tokenizer)
    hook = model.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        _in_use(plugin, context, lambda own: play(SAID[0], own=own))
    finally:
        hook.remove()
    assert not runs, (
        f"it ran the policy {len(runs)} times by itself, whose tokens nobody keeps. Ask the model that play gets"
    )


def _has_plain_columns(play: Callable[..., Played]) -> None:
    for text in SAID:
        found = play(text).completions
        for name, values in found.columns.items():
            assert len(values) == len(found.ids)
            for value in values:
                try:
                    json.dumps(value)
                except TypeError as error:
                    raise AssertionError(
                        f"column {name} must hold plain data, got {type(value).__name__}. Put numbers, texts, lists or mappings "
                        "of them into Outcome.columns"
                    ) from error


def _survives(play: Callable[..., Played], tool: str) -> None:
    """Let the policy call a tool without arguments, with unknown ones, and one that there is not."""
    for call in (f"[{tool}()]", f"[{tool}(nothing=1)]", "[no_such_tool()]"):
        played = play(call)
        for row, end in enumerate(played.completions.columns["episode/end"]):
            assert end in ("played", "over"), (
                f"episode {row}, in which the policy says {call}, ended with {end}: {played.reasons[row]}. Give the policy the "
                "error to read"
            )


def _children() -> set[int]:
    """Return the child processes of this one."""
    import psutil

    return {child.pid for child in psutil.Process().children()}
