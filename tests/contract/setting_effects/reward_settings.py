"""Two values of each setting that every reward source has; the core reads them, so once is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Context
from hf_rlhf.scoring.scorer import RewardError, Scorer
from hf_rlhf.testing import rollouts
from tests.contract.setting_effects.base import EFFECTS, REWARDS, SettingEffect, after, logged, one_reward
from tests.helpers import runs
from tests.helpers.flaky_rewards import ByWord

CONTEXT = Context(device=torch.device("cpu"), tokenizer=None, policy=None)
TEXTS = ["raise", "abc", "ab", "once "]


def asked(cls: type, texts: list[str], calls: int = 1, **settings: Any) -> Any:
    """What the last of some calls gave, as text; or the error."""
    given = rollouts(["abc"] * len(texts), columns={"task": ["maths", "code"] * (len(texts) // 2)})
    given.completions = list(texts)
    with Scorer([("mine", cls(**settings))], CONTEXT) as scorer:
        try:
            for _ in range(calls):
                found = scorer.ask(given)["mine"]
        except RewardError as error:
            return str(error)[:60]
        kinds = [(failure.row, failure.kind, failure.reason[:30]) for failure in found.failures]
        return [repr(found.answers), kinds, len(getattr(scorer._runners["mine"], "_workers", ()))]


def of_source(setting: str, first: Any, second: Any, texts: list[str], calls: int = 1, **others: Any) -> None:
    EFFECTS[f"rewards.{setting}"] = SettingEffect(
        first, second, lambda folder, value: asked(ByWord, texts, calls, **others, **{setting: value})
    )


EFFECTS["rewards.weight"] = SettingEffect(1.0, -2.0, after(one_reward("length", "weight")))
EFFECTS["rewards.label"] = SettingEffect("one", "other", logged(one_reward("length", "label")))
EFFECTS["rewards.clip"] = SettingEffect(None, (-0.5, 0.0), after(one_reward("length", "clip")))


def normalized(folder: Path, value: str) -> Any:
    """A mean that is subtracted shows where groups are not compared."""
    source = {"use": "length", **REWARDS["length"](folder), "normalize": value}
    made = runs.trained(folder, rewards=[source], advantages="reinforce", training={"max_steps": 2})
    return runs.parameters(made)


EFFECTS["rewards.normalize"] = SettingEffect("std", "mean_std", normalized)
of_source("when", None, {"task": "maths"}, ["a", "bb", "ccc", "d"])
of_source("workers", "inline", "threads", ["a", "bb"])
of_source("num_workers", 1, 3, ["a", "bb"], workers="threads")
of_source("timeout", 30.0, 0.1, ["abc", "block"])
of_source("on_error", "none", -1.0, ["abc", "raise"])
of_source("failure_budget", 0.2, 0.5, ["abc", "raise"] * 4, calls=3)
of_source("memory_mib", 1024, 2048, ["abc", "take 1200"], workers="processes", num_workers=1)
of_source("resources", None, {"num_cpus": 0.5}, ["assigned"] * 2, workers="ray", num_workers=1)


EFFECTS["rewards.missing_eos"] = SettingEffect("stop", "length", lambda folder, reason: finished(reason))
EFFECTS["rewards.function.rowwise"] = SettingEffect(False, True, lambda folder, value: called(value))


def finished(reason: str) -> list[float]:
    """What a completion that ended like this gets."""
    given = rollouts(["a"])
    given.finish_reasons = [reason]
    return load_plugin("rewards", "missing_eos")(given)


def called(rowwise: bool) -> list[int]:
    """How many rows each call of a function gets."""
    seen: list[int] = []

    def function(completions: list[str]) -> list[float]:
        seen.append(len(completions))
        return [0.0] * len(completions)

    source = load_plugin("rewards", "function", function=function, rowwise=rowwise)
    Scorer([("mine", source)]).ask(rollouts(["a", "b"]))
    return seen


def retried(folder: Path, value: int) -> Any:
    file = folder / f"file{value}"
    file.unlink(missing_ok=True)
    return asked(ByWord, ["abc", f"once {file}"], retries=value)[:1]


EFFECTS["rewards.retries"] = SettingEffect(0, 1, retried)
