"""For every setting two values that give different results: a setting that nothing reads cannot be in this table.

`EFFECTS` has a key `axis.name.setting` for each setting of each plugin, `axis.name` for a plugin without any (it is compared
with a neighbour on its axis) and `section.setting` for the sections of a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import RolloutCorrection, UpdateRule
from hf_rlhf.batch import Prompt
from hf_rlhf.conformance.tensor_inputs import OUTPUTS, draw_tensors
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import load_model
from hf_rlhf.modeling.policy import Policy
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import rollouts, scored, tiny_policy
from tests.helpers import runs


@dataclass(frozen=True)
class SettingEffect:
    """Two values of a setting, and what shows which of them was set: `show(folder, value)`."""

    first: Any
    second: Any
    show: Callable[[Path, Any], Any]


EFFECTS: dict[str, SettingEffect] = {}

Parts = dict[str, Any]


# Tensor functions


def tensors(axis: str, name: str, **settings: Any) -> Any:
    """What a tensor function gives on random input."""
    return OUTPUTS[axis](load_plugin(axis, name, **settings), draw_tensors())


def of_tensors(axis: str, name: str, setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"{axis}.{name}.{setting}"] = SettingEffect(
        first, second, lambda folder, value: tensors(axis, name, **{setting: value}, **others)
    )


def neighbours(axis: str, *names: str) -> None:
    """Plugins without settings: each gives something else than the next."""
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        EFFECTS[f"{axis}.{name}"] = SettingEffect(name, other, lambda folder, value: tensors(axis, value))


of_tensors("policy_loss", "ppo_clip", "epsilon_low", 0.2, 0.05)
of_tensors("policy_loss", "ppo_clip", "epsilon_high", 0.2, 0.05)
of_tensors("aggregation", "seq_mean_token_sum_norm", "length", 1024, 8)
of_tensors("loss_terms", "entropy", "coef", 0.01, -0.5)
neighbours("aggregation", "token_mean", "seq_mean_token_mean", "seq_mean_token_sum")
neighbours("kl_estimator", "k1", "k2", "k3")
neighbours("policy_loss", "reinforce", "surrogate")


# Small runs


def after(make: Callable[[Path, Any], Parts]) -> Callable[[Path, Any], Any]:
    """The parameters after a run with these parts."""
    return lambda folder, value: runs.parameters(runs.trained(folder, **make(folder, value)))


def logged(make: Callable[[Path, Any], Parts]) -> Callable[[Path, Any], Any]:
    """What a run logs, without times."""

    def show(folder: Path, value: Any) -> Any:
        entries = runs.entries(runs.trained(folder, **make(folder, value)))
        return [
            {k: v for k, v in entry.items() if not k.startswith(("time/", "memory/", "perf/"))} for entry in entries
        ]

    return show


def collected(make: Callable[[Path, Any], Parts]) -> Callable[[Path, Any], Any]:
    """How many rows and groups the first rollout has."""

    def show(folder: Path, value: Any) -> Any:
        buffer = runs.trainer(folder, **make(folder, value)).collector.collect(0)
        return [len(buffer.mask), len(buffer.group_ids.unique())]

    return show


def one_kl(name: str, setting: str, value: Any) -> Parts:
    """Two rollouts: in the first the policy is still the reference."""
    kl = {"use": name, "estimator": "k3", setting: value}
    return {"kl": [kl], "reference": "frozen", "update": {"mini_batches": 1}}


for kl_name in ("in_loss", "in_reward", "monitor"):
    show = logged if kl_name == "monitor" else after
    for setting, values in {"estimator": ("k2", "k3"), "level": ("token", "sequence"), "beta": (0.1, 1.0)}.items():
        if (kl_name, setting) != ("monitor", "beta"):
            EFFECTS[f"kl.{kl_name}.{setting}"] = SettingEffect(
                *values, show(lambda folder, value, n=kl_name, s=setting: one_kl(n, s, value))
            )


def with_critic(name: str, setting: str, value: Any) -> Parts:
    critic = {"use": name, "coef": 5.0, setting: value}
    return {"critic": critic, "advantages": "gae", "update": {"epochs": 2}}


CRITIC = {"coef": (5.0, 0.5), "value_clip": ("none", 1e-3), "learning_rate": (None, 0.01), "warmup_steps": (0, 1)}
for critic_name in ("separate", "value_head"):
    for setting, values in CRITIC.items():
        EFFECTS[f"critic.{critic_name}.{setting}"] = SettingEffect(
            *values, after(lambda folder, value, n=critic_name, s=setting: with_critic(n, s, value))
        )
EFFECTS["critic.value_head.trunk_gradient"] = SettingEffect(
    1.0, 0.0, after(lambda folder, value: with_critic("value_head", "trunk_gradient", value))
)


def critic_from(folder: Path, init: str) -> Any:
    """The critic's weights at the start."""
    place = str(folder / "other") if init == "path" else init
    tiny_policy(seed=7)[0].save_pretrained(folder / "other")
    return runs.parameters(load_plugin("critic", "separate", init=place).build(tiny_policy()[0], None))


EFFECTS["critic.separate.init"] = SettingEffect("policy", "path", critic_from)
EFFECTS["critic.none"] = SettingEffect(
    "none", "value_head", lambda folder, value: load_plugin("critic", value).build(tiny_policy()[0], None) is None
)


def flat_groups(folder: Path, resample: int) -> Parts:
    flat = [{**row, "completions": ["zz"] * 8} for row in runs.problems(3)]
    rewards = [{"use": "length", "unit": "characters", "target": 1, "maximum": 99}]
    data = [*flat, *runs.problems(3, seed=4)]
    return {"filters": [{"use": "zero_variance", "resample": resample}], "data": data, "rewards": rewards}


EFFECTS["filters.zero_variance.resample"] = SettingEffect(0, 9, collected(flat_groups))


def with_lora(name: str) -> Any:
    """Log-probs of the reference after a rollout's updates, from a policy that begins with an adapter of its own."""
    from peft import get_peft_model

    torch.manual_seed(0)
    policy = get_peft_model(tiny_policy()[0], runs.adapter())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.1)
        reference = load_plugin("reference", name)
        model = reference.build(policy)
        ids = torch.tensor([[5, 6, 7]])
        if model is not None:
            return model(ids).logits
        if not reference.provides:
            return None
        with reference.active(policy):
            return policy(ids).logits


for reference_name, other in (("adapter_off", "frozen"), ("none", "adapter_off")):
    EFFECTS[f"reference.{reference_name}"] = SettingEffect(
        reference_name, other, lambda folder, value: with_lora(value)
    )


@dataclass(kw_only=True)
class Still(UpdateRule):
    """An optimizer that does not move."""

    name = "still"

    def build(self, policy: Any, groups: Any) -> Any:
        return torch.optim.SGD(policy.parameters(), lr=0.0)


@dataclass(kw_only=True)
class Doubled(RolloutCorrection):
    """Twice every token's loss, without a look at the sampler."""

    name = "doubled"
    needs = frozenset({"sampler_logps"})

    def __call__(self, old_logps: Any, sampler_logps: Any, mask: Any) -> Any:
        return 2 * mask


EFFECTS["optimizer.trainer"] = SettingEffect("trainer", Still(), after(lambda folder, value: {"optimizer": value}))
EFFECTS["rollout_correction.none"] = SettingEffect(
    load_plugin("rollout_correction", "none"),
    Doubled(),
    lambda folder, value: value(*[torch.zeros(1, 2)] * 2, torch.ones(1, 2)),
)


# Rewards

REWARDS: dict[str, Callable[[Path], Parts]] = {
    "exact_match": lambda folder: {},
    "format": lambda folder: {"pattern": "[ -O].*"},
    "function": lambda folder: {"function": function_file(folder) + ":length"},
    "length": lambda folder: {"target": 1, "maximum": 9},
    "math_answer": lambda folder: {"workers": "inline"},
}


def function_file(folder: Path) -> str:
    file = folder / "functions.py"
    file.write_text(
        "def length(completions):\n    return [float(len(text)) for text in completions]\n"
        "def first(completions):\n    return [float(ord((text + ' ')[0])) for text in completions]\n"
    )
    return str(file)


def one_reward(name: str, setting: str) -> Callable[[Path, Any], Parts]:
    def make(folder: Path, value: Any) -> Parts:
        source = {"use": name, **REWARDS[name](folder), setting: value}
        return {"rewards": [source], "advantages": "group_mean", "training": {"max_steps": 1}}

    return make


COLUMNS = {
    "answer": ["5", "5", "x", "7"],
    "other": ["7", "X", "", "5"],
}


def scores(name: str, setting: str, **others: Any) -> Callable[[Path, Any], Any]:
    """What a reward gives to a few texts."""

    def show(folder: Path, value: Any) -> Any:
        settings = {**REWARDS[name](folder), **others, setting: value}
        source = load_plugin("rewards", name, **settings)
        try:
            given = rollouts(["5", " the answer is X", "x", "#### 7"], columns=COLUMNS)
            given.completions[2] = "x "
            return [-1.0 if x is None else float(x) for x in source(given)]
        finally:
            source.close()

    return show


def of_scores(name: str, setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"rewards.{name}.{setting}"] = SettingEffect(first, second, scores(name, setting, **others))


of_scores("exact_match", "column", "answer", "other")
of_scores("exact_match", "strip", True, False)
EFFECTS["rewards.exact_match.ignore_case"] = SettingEffect(
    False,
    True,
    lambda folder, value: load_plugin("rewards", "exact_match", ignore_case=value)(
        rollouts(["X", "x"], columns={"answer": ["x", "x"]})
    ),
)
of_scores("format", "pattern", ".*[0-9]", "x.*")
of_scores("length", "unit", "tokens", "words")
of_scores("length", "target", 1, 4)
of_scores("length", "maximum", 9, 99)
of_scores("math_answer", "column", "answer", "other")
EFFECTS["rewards.function.runs_model"] = SettingEffect(
    False, True, lambda folder, value: load_plugin("rewards", "function", function=len, runs_model=value).runs_model
)
EFFECTS["rewards.function.function"] = SettingEffect(
    "length",
    "first",
    lambda folder, value: list(
        load_plugin("rewards", "function", function=f"{function_file(folder)}:{value}")(rollouts(["5", "ab"]))
    ),
)


def own(axis: str, default: str, other: str, call: Callable[[Any], Any]) -> None:
    EFFECTS[f"{axis}.function.function"] = SettingEffect(
        default,
        other,
        lambda folder, value: call(
            load_plugin(axis, "function", function=f"tests.helpers.own_functions:{value}")
        ).tolist(),
    )


own("advantages", "adv", "ones", lambda plugin: plugin(scored()))
own("filters", "keep", "keep_all", lambda plugin: plugin(scored()))
own("kl_estimator", "k3", "k2", lambda plugin: plugin(torch.ones(2), torch.zeros(2) - 1))
own("policy_loss", "loss", "twice", lambda plugin: plugin(*[torch.ones(1, 2)] * 4)[0])


def forward_sizes(module: Any, call: Callable[[], Any]) -> list[int]:
    """The rows of each forward of `module` during `call`."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    call()
    handle.remove()
    return seen


@dataclass
class Hub:
    """A cache of the Hub in a folder, with one repository of two revisions; nothing is fetched."""

    folder: Path
    save: Callable[[Path, int], Any]
    revisions: dict[str, int] = field(default_factory=lambda: {"main": 0, "v2": 1})

    def __enter__(self) -> str:
        from huggingface_hub import constants

        repository = self.folder / "hub" / "models--someone--model"
        for name, seed in self.revisions.items():
            commit = f"{seed}" * 40
            (repository / "refs").mkdir(parents=True, exist_ok=True)
            (repository / "refs" / name).write_text(commit)
            self.save(repository / "snapshots" / commit, seed)
        self._stack = ExitStack()
        self._stack.enter_context(patch.object(constants, "HF_HUB_CACHE", str(self.folder / "hub")))
        self._stack.enter_context(patch.object(constants, "HF_HUB_OFFLINE", True))
        return "someone/model"

    def __exit__(self, *reason: Any) -> None:
        self._stack.close()


def model_of_revision(folder: Path, revision: str | None) -> Any:
    with Hub(folder, lambda place, seed: tiny_policy(seed=seed)[0].save_pretrained(place)) as name:
        return runs.parameters(load_model(Model(path=name, revision=revision)))


EFFECTS["model.revision"] = SettingEffect(None, "v2", model_of_revision)


# Rollouts


ENGINES: dict[str, Parts] = {
    "generate": {"rollout": runs.SAMPLED},
    "scripted": {"rollout": runs.SCRIPTED},
    "mixed": runs.DISTILLED,
}


def engine(name: str, setting: str) -> Callable[[Path, Any], Parts]:
    base = ENGINES[name]
    return lambda folder, value: {**base, "rollout": {**base["rollout"], setting: value}}


for engine_name in ENGINES:
    EFFECTS[f"rollout.{engine_name}.prompts"] = SettingEffect(4, 2, collected(engine(engine_name, "prompts")))
    EFFECTS[f"rollout.{engine_name}.num_generations"] = SettingEffect(
        4, 3, collected(engine(engine_name, "num_generations"))
    )


def shown(name: str) -> Callable[[Path, Any], Any]:
    """The completions as rewards see them; scripted ones hold <unk>, sampled ones may."""

    def show(folder: Path, value: bool) -> Any:
        data = [{**row, "completions": [[2, 5, 6]] * 8, "answer": [2, 5, 6]} for row in runs.problems()]
        made = runs.trainer(folder, data=data, **engine(name, "skip_special_tokens")(folder, value))
        return made.collector.collect(0).extra["texts"]["completion"]

    return show


for engine_name in ENGINES:
    EFFECTS[f"rollout.{engine_name}.skip_special_tokens"] = SettingEffect(True, False, shown(engine_name))
EFFECTS["rollout.scripted.temperature"] = SettingEffect(1.0, 0.7, after(engine("scripted", "temperature")))


def mixed(setting: str) -> Callable[[Path, Any], Any]:
    """The completions of a rollout that takes some from the dataset."""

    def show(folder: Path, value: Any) -> Any:
        data = [{**row, "question": row["prompt"]} for row in runs.problems()]
        parts = {**runs.DISTILLED, "rollout": {**runs.DISTILLED["rollout"], setting: value}}
        return runs.trainer(folder, data=data, **parts).collector.collect(0).extra["texts"]["completion"]

    return show


EFFECTS["rollout.mixed.share"] = SettingEffect(0.0, 1.0, mixed("share"))
EFFECTS["rollout.mixed.column"] = SettingEffect("answer", "question", mixed("column"))
EFFECTS["rollout.scripted.mask_column"] = SettingEffect(None, "masks", after(engine("scripted", "mask_column")))


def reported(folder: Path, column: str | None) -> Parts:
    data = [{**row, "reported": [[-0.5] * len(mask) for mask in row["masks"]]} for row in runs.problems()]
    engine = {**runs.SCRIPTED, "mask_column": "masks", "logps_column": column}
    return {"data": data, "rollout": engine, "rollout_correction": "truncated" if column else "none"}


EFFECTS["rollout.scripted.logps_column"] = SettingEffect(None, "reported", after(reported))


def other_column(folder: Path, column: str) -> Parts:
    data = [{**row, "backwards": row["completions"][::-1]} for row in runs.problems()]
    return {"data": data, "rollout": {**runs.SCRIPTED, "column": column}}


EFFECTS["rollout.scripted.column"] = SettingEffect("completions", "backwards", after(other_column))


SAMPLERS: dict[str, Parts] = {"generate": {}, "mixed": {"share": 1.0}}
"""Engines that sample, with settings by which they sample every row."""


def samples(engine: str, setting: str, value: Any, show: Callable[[Any, Callable[[], Any]], Any] | None = None) -> Any:
    """The completions that an engine samples, always with the same random numbers."""
    model, tokenizer = tiny_policy()
    policy = Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"))
    prompts = [Prompt(ids=[5, 6, 7][: 1 + i], prompt="") for i in range(3)]
    chosen = load_plugin("rollout", engine, **{"max_new_tokens": 12, **SAMPLERS[engine], setting: value})
    with seeded(0, "effect"), torch.no_grad():
        return show(model, lambda: chosen(policy, prompts, 4)) if show else chosen(policy, prompts, 4).ids


CUTS = {
    "max_new_tokens": (12, 5),
    "temperature": (1.0, 0.3),
    "top_p": (1.0, 0.1),
    "top_k": (0, 1),
    "min_p": (0.0, 0.95),
    "repetition_penalty": (1.0, 9.0),
}
for sampler in SAMPLERS:
    for setting, values in CUTS.items():
        EFFECTS[f"rollout.{sampler}.{setting}"] = SettingEffect(
            *values, lambda folder, value, name=sampler, s=setting: samples(name, s, value)
        )
    EFFECTS[f"rollout.{sampler}.max_rows"] = SettingEffect(
        None, 4, lambda folder, value, name=sampler: max(samples(name, "max_rows", value, forward_sizes), default=0)
    )
