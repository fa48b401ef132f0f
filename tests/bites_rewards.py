"""Two values of each setting of the reward models over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bites import BITES, REWARDS, Bite, Hub, after, forward_sizes, logged, one_reward
from classifiers import save_token_classifier

from hf_rlhf import load_plugin
from hf_rlhf.testing import rollouts

TEXTS = ["1.\n\n2", "12ab", "", "ab\n\n\n\n1. 2."]


def loaded(name: str, **settings: Any) -> Any:
    source = load_plugin("rewards", name, **settings)
    source.load_model(torch.device("cpu"))
    return source


def spans(name: str, **settings: Any) -> Any:
    """(end, reward) for each token or step of a few texts."""
    return [row.values for row in loaded(name, **settings)(rollouts(TEXTS))]


def of_seed(name: str, folder: Path, seed: int) -> Any:
    return spans(name, model=save_token_classifier(folder / str(seed), seed=seed))


def of_revision(name: str, folder: Path, revision: str | None) -> Any:
    with Hub(folder, lambda place, seed: save_token_classifier(place, seed=seed)) as path:
        return spans(name, model=path, revision=revision)


def sizes(name: str, folder: Path, batch_size: int) -> list[int]:
    source = loaded(name, model=save_token_classifier(folder), batch_size=batch_size)
    return forward_sizes(source._loaded[0], lambda: source(rollouts(TEXTS)))


for reward_name in ("token_reward_model", "process_reward_model"):
    REWARDS[reward_name] = lambda folder: {"model": save_token_classifier(folder / "tokens")}
    key = f"rewards.{reward_name}"
    BITES[f"{key}.weight"] = Bite(1.0, -2.0, after(one_reward(reward_name, "weight")))
    BITES[f"{key}.label"] = Bite("one", "other", logged(one_reward(reward_name, "label")))
    BITES[f"{key}.model"] = Bite(0, 1, lambda folder, value, n=reward_name: of_seed(n, folder, value))
    BITES[f"{key}.revision"] = Bite(None, "v2", lambda folder, value, n=reward_name: of_revision(n, folder, value))
    BITES[f"{key}.batch_size"] = Bite(16, 3, lambda folder, value, n=reward_name: sizes(n, folder, value))
    for setting, first, second in (("dtype", "float32", "bfloat16"), ("max_length", None, 3)):
        BITES[f"{key}.{setting}"] = Bite(
            first,
            second,
            lambda folder, value, n=reward_name, s=setting: spans(n, model=save_token_classifier(folder), **{s: value}),
        )
for setting, first, second in (("delimiter", "\n\n", "."), ("value", "probability", "logit")):
    BITES[f"rewards.process_reward_model.{setting}"] = Bite(
        first,
        second,
        lambda folder, value, s=setting: spans(
            "process_reward_model", model=save_token_classifier(folder), **{s: value}
        ),
    )
