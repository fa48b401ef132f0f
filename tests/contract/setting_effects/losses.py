"""What shows each setting of the policy losses, aggregations, rollout corrections, filters and loss terms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_rlhf import load_plugin
from hf_rlhf.axes import Context
from hf_rlhf.batch import Scored
from hf_rlhf.conformance.tensor_inputs import draw_tensors
from hf_rlhf.testing import tiny_policy
from tests.contract.setting_effects.base import EFFECTS, Parts, SettingEffect, collected, of_tensors
from tests.contract.setting_effects.sections import dataset_folder
from tests.helpers import runs

Show = Callable[[Path, Any], Any]

# Policy losses, far from the old policy


def wide() -> dict[str, torch.Tensor]:
    """Log-ratios within 1.6, of which some tokens are selected; the sampler is not the trainer."""
    drawn = draw_tensors()
    drawn["old_logps"] = drawn["logps"] + 8 * (drawn["old_logps"] - drawn["logps"])
    drawn["total_score"] = draw_tensors(seed=1)["advantages"].sum(1)
    drawn["selected"] = (drawn["entropy"] > 0.5).double() * drawn["mask"]
    return drawn


def loss_of(plugin: Any) -> Any:
    """The loss and its gradient."""
    t = wide()
    logps = t["logps"].requires_grad_()
    extras = {name: t[name] for name in plugin.needs - {"old_logps"}}
    loss, _ = plugin(logps, t["old_logps"], t["advantages"], t["mask"], **extras)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), logps)]


def of_loss(name: str, setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"policy_loss.{name}.{setting}"] = SettingEffect(
        first, second, lambda folder, value: loss_of(load_plugin("policy_loss", name, **{setting: value}, **others))
    )


for clipping in ("dual_clip", "cispo", "gspo", "gmpo", "clip_cov"):
    of_loss(clipping, "epsilon_low", 0.2, 0.05)
    of_loss(clipping, "epsilon_high", 0.2, 0.05)
of_loss("dual_clip", "c", 3.0, 1.5)
of_loss("cispo", "bound", "relative", "absolute", epsilon_high=1.5)
of_loss("gspo", "level", "sequence", "token")
of_loss("gspo", "ratio", "mean", "product")
of_loss("sapo", "tau_positive", 1.0, 2.0)
of_loss("sapo", "tau_negative", 1.05, 2.0)
of_loss("dppo_tv", "low", 0.15, 0.01)
of_loss("dppo_tv", "high", 0.15, 0.01)
of_loss("dppo_tv", "c", 20.0, 1.2)
of_loss("dppo_tv", "anchor", "old", "sampler")
of_loss("dro", "beta", 0.1, 1.0)
of_loss("topr", "level", "sequence", "token")
of_loss("topr", "sign", "advantage", "score")
for side in ("positive", "negative"):
    of_loss("vespo", f"k_{side}", 2.5, 0.5)
    of_loss("vespo", f"lambda_{side}", 2.5, 0.5)
of_loss("vespo", "anchor", "old", "sampler")
of_loss("kl_cov", "beta", 1.0, 0.1)
of_loss("trpo_penalty", "coef", 1.0, 0.1)
of_loss("trpo_penalty", "reduce", "mean", "max")


def selection(name: str) -> Show:
    def show(folder: Path, fraction: float) -> Any:
        t = draw_tensors()
        return load_plugin("policy_loss", name, fraction=fraction).select(t["old_logps"], t["advantages"], t["mask"])

    return show


for selecting in ("clip_cov", "kl_cov"):
    EFFECTS[f"policy_loss.{selecting}.fraction"] = SettingEffect(2e-4, 0.2, selection(selecting))


def step_selection(folder: Path, fraction: float) -> Any:
    t, plugin = draw_tensors(), load_plugin("policy_loss", "token_entropy", fraction=fraction)
    return plugin.select(t["old_logps"], t["advantages"], t["mask"], old_entropy=t["old_entropy"])


def balance(setting: str) -> Show:
    def show(folder: Path, value: Any) -> Any:
        t, term = draw_tensors(), load_plugin("loss_terms", "router_balance", **{"coef": 0.1, setting: value})
        return term(t["logps"], t["mask"], router_logits=t["router_logits"], routing_fractions=t["routing_fractions"])

    return show


for setting, value, other in (("coef", 0.1, 0.2), ("pool", "layer", "model")):
    EFFECTS[f"loss_terms.router_balance.{setting}"] = SettingEffect(value, other, balance(setting))
EFFECTS["policy_loss.token_entropy.fraction"] = SettingEffect(0.1, 0.5, step_selection)
of_loss("token_entropy", "loss", "ppo_clip", {"use": "sapo", "tau_positive": 3.0})


def after_a_rollout(axis: str, name: str, setting: str, show: Callable[[Any], Any], **seen: float) -> Show:
    """What a plugin gives after it observed `seen`."""

    def observed(folder: Path, value: Any) -> Any:
        plugin = load_plugin(axis, name, **{setting: value})
        plugin.observe({f"policy/{key}": x for key, x in seen.items()})
        return show(plugin)

    return observed


EFFECTS["policy_loss.trpo_penalty.target"] = SettingEffect(
    0.01, 0.1, after_a_rollout("policy_loss", "trpo_penalty", "target", loss_of, approx_kl=0.02)
)

# Aggregations and rollout corrections


def weights(folder: Path, name: str) -> Any:
    t, aggregation = draw_tensors(), load_plugin("aggregation", name)
    return aggregation(t["mask"], **{key: t[key] for key in aggregation.needs})


EFFECTS["aggregation.prompt_mean"] = SettingEffect("prompt_mean", "token_mean", weights)
for correction, bound in (("truncated", 2.0), ("masked", 5.0)):
    of_tensors("rollout_correction", correction, "c", bound, 1.01)
    of_tensors("rollout_correction", correction, "level", "token", "sequence")
of_tensors("rollout_correction", "masked", "low", 0.5, 0.99)

# Filters


def long_and_short() -> list[dict[str, Any]]:
    """Half of the prompts have completions without an end alone, of which every other row is one token long."""
    unended = [[[5], [6]][i % 2] for i in range(8)]
    return [{**row, "completions": unended} for row in runs.problems(3)] + runs.problems(3, seed=4)


def with_filter(name: str, **settings: Any) -> Callable[[Path, Any], Parts]:
    def make(folder: Path, resample: int) -> Parts:
        rewards = [{"use": "length", "unit": "tokens", "target": 1, "maximum": 99}]
        return {
            "filters": [{"use": name, "resample": resample, **settings}],
            "data": long_and_short(),
            "rewards": rewards,
        }

    return make


def refusals(name: str) -> Show:
    """What the checks of a recipe with this filter say of rounds of resampling."""

    def show(folder: Path, resample: int) -> list[str]:
        chosen = load_plugin("filters", name, resample=resample)
        return runs.recipe(filters=[chosen]).algorithm().problems()

    return show


def kept(name: str, setting: str) -> Show:
    def show(folder: Path, value: Any) -> Any:
        t = draw_tensors()
        batch = Scored(
            mask=t["mask"],
            token_rewards=t["token_rewards"],
            group_ids=t["group_ids"],
            old_logps=t["old_logps"],
            sampler_logps=t["sampler_logps"],
            advantages=t["advantages"],
            completion_ids=5 * t["mask"].long(),
        )
        return load_plugin("filters", name, **{setting: value})(batch)

    return show


for rows_filter in ("overlong", "too_short"):
    EFFECTS[f"filters.{rows_filter}.resample"] = SettingEffect(0, 9, collected(with_filter(rows_filter)))
EFFECTS["filters.function.resample"] = SettingEffect(
    0, 9, collected(with_filter("function", function="tests.helpers.own_functions:ended"))
)
for whole_filter in ("duplicates", "opsm"):
    EFFECTS[f"filters.{whole_filter}.resample"] = SettingEffect(0, 1, refusals(whole_filter))
EFFECTS["filters.overlong.max_tokens"] = SettingEffect(None, 3, kept("overlong", "max_tokens"))
EFFECTS["filters.too_short.min_tokens"] = SettingEffect(1, 4, kept("too_short", "min_tokens"))
EFFECTS["filters.opsm.delta"] = SettingEffect(0.0, 9.0, kept("opsm", "delta"))


def repeated(folder: Path, keep: int) -> Any:
    ones = torch.ones(4, 2)
    batch = Scored(mask=ones, token_rewards=ones, group_ids=torch.zeros(4).long(), completion_ids=ones.long())
    return load_plugin("filters", "duplicates", keep=keep)(batch)


EFFECTS["filters.duplicates.keep"] = SettingEffect(1, 2, repeated)

# Loss terms


def term_of(name: str, setting: str) -> Show:
    """The weighted loss of a term."""

    def show(folder: Path, value: Any) -> Any:
        return weighted(load_plugin("loss_terms", name, **{setting: value}))

    return show


def weighted(term: Any) -> Any:
    t = draw_tensors()
    t["total_score"] = t["score"]
    extras = {name: t[name] for name in term.needs}
    also = {name: x for name, x in extras.items() if name != "entropy"}
    return term(t["logps"], t["mask"], **extras) * term.weights(t["mask"], **also)


EFFECTS["loss_terms.positive_nll.coef"] = SettingEffect(0.1, 0.2, term_of("positive_nll", "coef"))
EFFECTS["loss_terms.positive_nll.threshold"] = SettingEffect(0.0, 0.6, term_of("positive_nll", "threshold"))
EFFECTS["loss_terms.adaptive_entropy.coef"] = SettingEffect(0.0, 0.1, term_of("adaptive_entropy", "coef"))
for setting, values in {"target": (0.2, 2.0), "delta": (0.005, 0.01), "maximum": (1.0, 0.001)}.items():
    EFFECTS[f"loss_terms.adaptive_entropy.{setting}"] = SettingEffect(
        *values,
        after_a_rollout("loss_terms", "adaptive_entropy", setting, weighted, entropy=0.2 + (setting == "target")),
    )
of_tensors("loss_terms", "ptx", "coef", 1.0, 2.0, path="texts.txt")


def read(setting: str, **others: Any) -> Show:
    """The texts of the first two steps. `{data}` is the folder."""

    def show(folder: Path, value: Any) -> Any:
        place = dataset_folder(folder)
        settings = {"path": "{data}/a.jsonl", "column": "prompt", "max_tokens": 64, **others, setting: value}
        settings = {k: x.replace("{data}", str(place)) if isinstance(x, str) else x for k, x in settings.items()}
        term = load_plugin("loss_terms", "ptx", **settings)
        policy, tokenizer = tiny_policy()
        here = {"device": torch.device("cpu"), "process_index": 0, "num_processes": 1, "seed": 0}
        term.setup(Context(tokenizer=tokenizer, policy=policy, **here))
        return [term.texts(step) for step in range(2)]

    return show


EFFECTS["loss_terms.ptx.path"] = SettingEffect("{data}/a.jsonl", "{data}/b.jsonl", read("path"))
EFFECTS["loss_terms.ptx.column"] = SettingEffect("prompt", "question", read("column"))
EFFECTS["loss_terms.ptx.split"] = SettingEffect("train", "test", read("split", path="{data}"))
EFFECTS["loss_terms.ptx.rows"] = SettingEffect(8, 3, read("rows"))
EFFECTS["loss_terms.ptx.max_tokens"] = SettingEffect(64, 3, read("max_tokens"))
