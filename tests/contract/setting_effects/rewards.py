"""Two values of each setting of the reward models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_rlhf import load_plugin
from hf_rlhf.batch import Rollouts, Spans
from hf_rlhf.testing import rollouts
from tests.contract.setting_effects.base import EFFECTS, REWARDS, Hub, SettingEffect, forward_sizes
from tests.helpers.classifiers import (
    TEMPLATE,
    merging_tokenizer,
    save_model,
    save_sequence_classifier,
    save_token_classifier,
)

TEXTS = ["1.\n\n2", "12ab", "", "ab\n\n\n\n1. 2."]
STEPS = [[1, 2], [4], [], [2]]
SAVE: dict[str, Callable[..., str]] = {
    "reward_model": save_sequence_classifier,
    "token_reward_model": save_token_classifier,
    "process_reward_model": save_token_classifier,
}


def given() -> Rollouts:
    return rollouts(TEXTS, prompts=["a", "a", "b", "b"], columns={"steps": STEPS})


def loaded(name: str, run: str = "cpu", /, **settings: Any) -> Any:
    """The source, set up for a run on that device."""
    source = load_plugin("rewards", name, **settings)
    source.load_model(torch.device(run))
    return source


def numbers(source: Any) -> Any:
    """What it gives for a few texts: numbers, or (end, reward) for each token or step."""
    return [row.values if isinstance(row, Spans) else row for row in source(given())]


def scores(name: str, setting: str, **others: Any) -> Callable[[Path, Any], Any]:
    """`others` with a callable value are made of the folder."""

    def show(folder: Path, value: Any) -> Any:
        made = {"model": lambda place: SAVE[name](place), **others}
        settings = {key: x(folder) if callable(x) else x for key, x in made.items()}
        return numbers(loaded(name, **{**settings, setting: value}))

    return show


def of_seed(name: str, folder: Path, seed: int) -> Any:
    return numbers(loaded(name, model=SAVE[name](folder / str(seed), seed=seed)))


def of_revision(name: str, folder: Path, revision: str | None) -> Any:
    with Hub(folder, lambda place, seed: SAVE[name](place, seed=seed)) as path:
        return numbers(loaded(name, model=path, revision=revision))


def of_tokenizer(name: str, folder: Path, other: bool) -> Any:
    """With the tokenizer beside the model, or with one that has no token for two characters."""
    model = SAVE[name](folder / "model")
    plain = merging_tokenizer()
    plain.backend_tokenizer.model.dropout = 1.0  # no merges
    plain.save_pretrained(folder / "plain")
    return numbers(loaded(name, model=model, tokenizer=str(folder / "plain") if other else None))


def sizes(name: str, folder: Path, **settings: Any) -> list[int]:
    source = loaded(name, model=SAVE[name](folder), **settings)
    return forward_sizes(source._loaded.model, lambda: source(given()))


def place(name: str, folder: Path, **settings: Any) -> str:
    """Where the weights lie between calls of a run on another device."""
    return str(loaded(name, "meta", model=SAVE[name](folder), **settings)._loaded.model.device)


def attention(name: str, folder: Path, kind: str) -> str:
    source = loaded(name, model=SAVE[name](folder), model_kwargs={"attn_implementation": kind})
    return str(source._loaded.model.config._attn_implementation)


def chatting(name: str) -> Callable[[Path], str]:
    return lambda folder: SAVE[name](folder, tokenizer=merging_tokenizer(TEMPLATE))


def pair(folder: Path) -> str:
    """A model whose tokenizer puts a separator between two texts."""
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processor("<bos> $A", "<bos> $A <eos> $B")
    return save_sequence_classifier(folder, tokenizer=tokenizer)


def processor(single: str, double: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    ids = merging_tokenizer().convert_tokens_to_ids(["<bos>", "<eos>"])
    return TemplateProcessing(
        single=single, pair=double, special_tokens=list(zip(["<bos>", "<eos>"], ids, strict=True))
    )


def causal(folder: Path) -> str:
    return save_model(folder, "AutoModelForCausalLM", pad_token_id=0)


def effect(name: str, setting: str, first: Any, second: Any, show: Callable[[Path, Any], Any] | None = None) -> None:
    EFFECTS[f"rewards.{name}.{setting}"] = SettingEffect(first, second, show or scores(name, setting))


for reward_name, save in SAVE.items():
    REWARDS[reward_name] = lambda folder, save=save: {"model": save(folder / "model")}
    effect(reward_name, "model", 0, 1, lambda folder, value, n=reward_name: of_seed(n, folder, value))
    effect(reward_name, "revision", None, "v2", lambda folder, value, n=reward_name: of_revision(n, folder, value))
    effect(reward_name, "tokenizer", False, True, lambda folder, value, n=reward_name: of_tokenizer(n, folder, value))
    effect(reward_name, "device", "auto", "cpu", lambda folder, value, n=reward_name: place(n, folder, device=value))
    effect(reward_name, "offload", False, True, lambda folder, value, n=reward_name: place(n, folder, offload=value))
    effect(
        reward_name, "model_kwargs", "eager", "sdpa", lambda folder, value, n=reward_name: attention(n, folder, value)
    )
    effect(reward_name, "batch_size", 16, 3, lambda folder, value, n=reward_name: sizes(n, folder, batch_size=value))
    effect(
        reward_name,
        "max_tokens_per_batch",
        None,
        9,
        lambda folder, value, n=reward_name: sizes(n, folder, max_tokens_per_batch=value),
    )
    effect(reward_name, "dtype", "float32", "bfloat16")
    effect(reward_name, "max_length", None, 4)
    effect(reward_name, "chat", False, True, scores(reward_name, "chat", model=chatting(reward_name)))
    two = {"model": lambda folder, save=save: save(folder, num_labels=2)}
    effect(reward_name, "output", 0, 1, scores(reward_name, "output", **two))
for reward_name in ("reward_model", "token_reward_model"):
    effect(reward_name, "value", "logit", "probability")
effect("reward_model", "pair", False, True, scores("reward_model", "pair", model=pair))
effect("process_reward_model", "value", "probability", "log_odds")
effect("process_reward_model", "delimiter", "\n\n", ".")
effect("process_reward_model", "step_column", None, "steps")
effect("process_reward_model", "step_token", None, "<step>")
effect("process_reward_model", "reduce", "none", "min")
effect(
    "process_reward_model",
    "keep_delimiter",
    True,
    False,
    scores("process_reward_model", "keep_delimiter", step_token="<step>"),
)
for setting, first, second, others in (
    ("good_token", "+", "*", {"bad_token": "-"}),
    ("bad_token", None, "-", {"good_token": "+"}),
):
    effect(
        "process_reward_model", setting, first, second, scores("process_reward_model", setting, model=causal, **others)
    )
