"""Turn a config of TRL's GRPO, RLOO or DPO trainer into a recipe; the formulas are those of docs/parity.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_rlhf.config.from_trl.reading import LOSSES, Reader, trainer_of
from hf_rlhf.config.training_arguments import (
    DEFAULTS,
    FORCED,
    NOT_IN_RECIPE,
    OFFLINE_REFUSED,
    REFUSED,
    WITHOUT_EFFECT,
    argument_names,
)
from hf_rlhf.runtime.errors import UserError

Parts = dict[str, Any]
SOFT_OVERLONG = {"use": "length", "target": 1280 - 256, "maximum": 1280}
"""TRL's `get_soft_overlong_punishment` as its command line calls it."""
IN_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
UNSET = {"use": "math_answer", "column": "answer"}


@dataclass(kw_only=True)
class Converted:
    """A recipe, and what of the config it does not hold."""

    trainer: str
    recipe: Parts
    notes: list[tuple[str, str]]
    """(field, reason) of what has no counterpart."""


def convert(given: Mapping[str, Any], trainer: str | None = None, processes: int = 1) -> Converted:
    """Return the recipe for a config, given as field -> value. `processes`: how many TRL would train with.

    Raises `UserError` for an unknown field, a config of no or several trainers, and what TRL itself refuses.
    """
    read = Reader(given, trainer or trainer_of(given))
    recipe: Parts = {"model": _model(read)}
    if read.trainer == "dpo":
        recipe = {"trainer": _dpo(read), **recipe}
    else:
        recipe |= _rollouts(read, processes)
        recipe |= _grpo(read) if read.trainer == "grpo" else _rloo(read)
    recipe["dataset"] = _dataset(read)
    if read.trainer != "dpo" and recipe["dataset"].get("eval_split"):
        recipe["evaluation"] = {"num_generations": read("num_generations_eval") or read("num_generations")}
    recipe["training"] = _training(read)
    recipe = {name: part for name, part in recipe.items() if part or name == "rewards"}
    return Converted(trainer=read.trainer, recipe=recipe, notes=[*read.notes, *read.left()])


def _set(read: Reader, **names: str) -> Parts:
    """Return {our name: value} of fields that differ from TRL's defaults."""
    return {ours: read(theirs) for ours, theirs in names.items() if read(theirs) != read.defaults[theirs]}


# Model and dataset


def _model(read: Reader) -> Parts:
    made: Parts = _set(read, path="model_name_or_path", revision="model_revision", dtype="dtype")
    made |= _set(read, attn_implementation="attn_implementation", load_in_4bit="load_in_4bit")
    made |= _set(read, load_in_8bit="load_in_8bit", bnb_4bit_quant_type="bnb_4bit_quant_type")
    made |= _set(read, use_bnb_nested_quant="use_bnb_nested_quant")
    for name, value in (read("model_init_kwargs") or {}).items():
        if name in ("dtype", "torch_dtype", "attn_implementation", "revision"):
            made[name.removeprefix("torch_")] = value
        elif name == "trust_remote_code":
            read.note("model_init_kwargs", "trust_remote_code: pass --trust-remote-code")
        elif value is not None:
            read.note("model_init_kwargs", f"{name}: {read.reason('model_init_kwargs').partition('; ')[2]}")
    if "chat_template_kwargs" in read.defaults and read("chat_template_kwargs"):
        made["chat_template_kwargs"] = read("chat_template_kwargs")
    if not read("disable_dropout") and read.defaults["disable_dropout"]:
        made["dropout"] = True
    if read("trust_remote_code"):
        read.note("trust_remote_code", "pass --trust-remote-code: a recipe cannot ask for it")
    lora = _lora(read)
    return {**made, "lora": lora} if lora else made


def _lora(read: Reader) -> Parts:
    names = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    more = _set(read, target_parameters="lora_target_parameters", modules_to_save="lora_modules_to_save")
    more |= _set(read, use_rslora="use_rslora", use_dora="use_dora")
    made = {ours: read(theirs) for ours, theirs in names.items()} | more
    target = read("lora_target_modules")
    if not read("use_peft"):
        return {}
    if target is None:
        read.note("lora_target_modules", "peft would choose by the architecture; here it is all-linear, which is more")
        return made
    return {**made, "target_modules": target[0] if target == ["all-linear"] else target}


def _dataset(read: Reader) -> Parts:
    made: Parts = _set(read, path="dataset_name", name="dataset_config", split="dataset_train_split")
    if read.trainer == "dpo":
        if read("dataset_streaming"):
            read.note("dataset_streaming", "recipes without rollouts read whole datasets")
    else:
        made |= _set(read, streaming="dataset_streaming")
        if read("shuffle_dataset") is False:
            made["shuffle"] = False
    split = read("dataset_test_split")
    if str(read("eval_strategy")) not in ("no", "IntervalStrategy.NO", "False"):
        return {**made, "eval_split": split}
    return {**made, "held_out": 0}  # TRL trains on every row


# Rollouts


def _rollouts(read: Reader, processes: int) -> Parts:
    """Return rollout, rewards and update."""
    prompts, mini_batches, epochs = _batches(read, processes)
    rollout: Parts = {"use": "generate", "prompts": prompts, "num_generations": read("num_generations")}
    if (longest := read("max_completion_length")) is None:
        longest = 512
        read.note("max_completion_length", "completions need a limit; here it is 512")
    rollout |= {"max_new_tokens": longest, "temperature": read("temperature")}
    rollout |= _set(read, top_p="top_p", top_k="top_k", min_p="min_p", repetition_penalty="repetition_penalty")
    kwargs = dict(read("generation_kwargs") or {})
    kwargs |= _set(read, cache_implementation="cache_implementation")
    rollout |= {"generation_kwargs": kwargs} if kwargs else {}
    made = {"rollout": rollout, "rewards": _rewards(read)}
    if read("mask_truncated_completions"):
        made["filters"] = [{"use": "overlong"}]
    if read("log_completions"):
        count = read("num_completions_to_print")
        made["logging"] = {"completions": count} if count else {}
    else:
        read.asked.add("num_completions_to_print")
    return {**made, "update": {"mini_batches": mini_batches, "epochs": epochs}}


def _batches(read: Reader, processes: int) -> tuple[int, int, int]:
    """Return prompts per rollout, optimizer steps per pass over it, and passes.

    TRL's `steps_per_generation` counts micro-batches of `per_device_train_batch_size` rows on each process, of which
    `gradient_accumulation_steps` make an optimizer step.
    """
    group, accumulated, epochs = read("num_generations"), read("gradient_accumulation_steps"), read("num_iterations")
    rows, steps, own = read("generation_batch_size"), read("steps_per_generation"), read("per_device_train_batch_size")
    micro = own * processes
    if rows is not None and steps is not None:  # a config that TRL has written has both, for its number of processes
        if rows % (steps * own) or processes not in (1, rows // (steps * own)):
            raise UserError(
                "generation_batch_size and steps_per_generation exclude each other, as in TRL. Leave one out"
            )
        micro = rows // steps
    if rows is not None and rows % micro:
        raise UserError(
            f"generation_batch_size must be a multiple of {micro}, the rows of a micro-batch on all processes, as in TRL, got "
            f"{rows}. Pass --processes N if TRL runs on several"
        )
    steps = rows // micro if rows is not None else accumulated if steps is None else steps
    rows = steps * micro
    if steps < accumulated:  # several generations make an optimizer step
        rows = accumulated * micro
        read.notes.append(
            (
                "steps_per_generation",
                f"a rollout is one optimizer step here: one of {rows} rows, not several of {steps * micro}",
            )
        )
        if epochs > 1:
            read.notes.append(("num_iterations", "TRL repeats rows within an optimizer step, which changes nothing: 1"))
            epochs = 1
        steps = accumulated
    if rows % group:
        raise UserError(
            f"num_generations must divide the {rows} rows of a generation, as in TRL, got {group}. Pass --processes N if TRL "
            "runs on several"
        )
    prompts, wanted = rows // group, max(1, steps // accumulated)
    if steps % accumulated:
        read.notes.append(
            (
                "steps_per_generation",
                f"{steps} micro-batches do not split into optimizer steps of {accumulated}: {wanted} here",
            )
        )
    mini_batches = math.gcd(prompts, wanted)
    if mini_batches != wanted:
        read.notes.append(
            (
                "steps_per_generation",
                f"groups stay whole: {mini_batches} optimizer steps on {prompts} prompts, not {wanted}",
            )
        )
    return prompts, mini_batches, epochs


def _rewards(read: Reader) -> list[Parts]:
    made: list[Parts] = []
    if (model := read("reward_model_name_or_path")) is not None:
        made.append({"use": "reward_model", "model": model})
    named = read("reward_funcs") or []
    for name in [named] if isinstance(named, str) else named:
        if name == "get_soft_overlong_punishment":
            made.append(dict(SOFT_OVERLONG))
        elif name in IN_TRL:
            made.append({"use": "function", "function": f"trl.rewards:{name}"})
        elif "." in name:
            module, _, function = name.rpartition(".")
            made.append({"use": "function", "function": f"{module}:{function}"})
        else:
            raise UserError(
                f"reward_funcs must be one of {', '.join(IN_TRL)}, get_soft_overlong_punishment or package.module.function, as "
                f"in TRL, got {name!r}"
            )
    weights = read("reward_weights")
    if not made:
        read.notes.append(
            (
                "reward_funcs",
                "the config names no rewards, which are arguments of TRL's trainers: math_answer on the column `answer` is in "
                'their place. Set rewards=[{use: function, function: "rewards.py:score"}]',
            )
        )
        return [_weighted(UNSET, x) for x in (weights or [1])[:1]]
    if weights is not None and len(weights) != len(made):
        raise UserError(
            f"reward_weights must have a weight for each of the {len(made)} rewards, as in TRL, got {weights}"
        )
    clip = read("reward_clip_range") if "reward_clip_range" in read.defaults else None
    if clip is not None:
        made = [{**source, "clip": [float(x) for x in clip]} for source in made]
        if len(made) > 1:
            read.note("reward_clip_range", "each source is clipped, not their sum")
    return [_weighted(source, x) for source, x in zip(made, weights or [1] * len(made), strict=True)]


def _weighted(source: Parts, weight: float) -> Parts:
    return {**source, "weight": float(weight)} if weight != 1 else dict(source)


def _reference(read: Reader, beta: float) -> Parts:
    """Return the reference where it moves."""
    mixing, every = read("ref_model_mixup_alpha"), read("ref_model_sync_steps")
    return {"reference": {"use": "sync", "mixing": mixing, "every": every}} if read("sync_ref_model") and beta else {}


# The algorithms


def _grpo(read: Reader) -> Parts:
    beta, sequence = read("beta"), read("importance_sampling_level") == "sequence"
    made = {"advantages": _advantages(read), **_loss(read, sequence), **_reference(read, beta)}
    corrected = read("use_bias_correction_kl")
    if beta:
        made["kl"] = [{"use": "in_loss", "beta": beta, "estimator": {"use": "k3_is" if corrected else "k3"}}]
        if corrected and sequence:
            read.notes.append(("use_bias_correction_kl", "the KL has its token's ratio here, not the completion's"))
    terms: list[Parts] = []
    names = ("entropy_target", "entropy_coef_delta", "entropy_coef_max", "entropy_coef")
    target, delta, maximum, coef = (read(name) for name in names)
    if read("use_adaptive_entropy"):
        terms = [{"use": "adaptive_entropy", "target": target, "delta": delta, "maximum": maximum, "coef": coef}]
        read.notes.append(("use_adaptive_entropy", "the coefficient changes once per rollout, not in every step"))
        if read("entropy_coef_min"):
            read.note("entropy_coef_min", "the smallest coefficient is 0")
    elif coef:
        terms = [{"use": "entropy", "coef": coef}]
    read.asked.add("entropy_coef_min")
    if read("top_entropy_quantile") != 1:
        read.note("top_entropy_quantile", read.reason("top_entropy_quantile"))
    return {**made, "loss_terms": terms}


def _advantages(read: Reader) -> Parts:
    scaled = {True: "group", False: "none"}.get(read("scale_rewards"), read("scale_rewards"))
    known = {"group": "group_norm", "batch": "group_mean_batch_std", "none": "group_mean"}
    if scaled not in known:
        raise UserError(f"scale_rewards must be group, batch or none, as in TRL, got {scaled!r}")
    if read("multi_objective_aggregation") == "normalize_then_sum":
        return {"use": "gdpo"}
    return {"use": known[scaled], **({} if scaled == "none" else {"eps": 1e-4, "ddof": 1})}


def _loss(read: Reader, sequence: bool) -> Parts:
    """Return policy loss and aggregation."""
    kind, low, delta = str(read("loss_type")), read("epsilon"), read("delta")
    high = low if read("epsilon_high") is None else read("epsilon_high")
    aggregation: dict[str, Parts] = {
        "grpo": {"use": "seq_mean_token_mean"},
        "sapo": {"use": "seq_mean_token_mean"},
        "dr_grpo": {"use": "seq_mean_token_sum_norm", "length": read("max_completion_length") or 512},
        "luspo": {"use": "seq_mean_token_sum"},
        **{name: {"use": "token_mean"} for name in ("bnpo", "dapo", "cispo", "vespo")},
    }
    if kind not in LOSSES:
        raise UserError(f"loss_type must be one of {', '.join(LOSSES)}, as in TRL, got {kind!r}")
    temperatures = {"tau_positive": read("sapo_temperature_pos"), "tau_negative": read("sapo_temperature_neg")}
    weights = {"k_positive": "vespo_k_pos", "lambda_positive": "vespo_lambda_pos"}
    weights |= {"k_negative": "vespo_k_neg", "lambda_negative": "vespo_lambda_neg"}
    own = {
        "cispo": {"use": "cispo", "epsilon_low": 1.0, "epsilon_high": high, "bound": "absolute"},
        "sapo": {"use": "sapo", **temperatures},
        "vespo": {"use": "vespo", **{ours: read(theirs) for ours, theirs in weights.items()}},
    }
    if kind in own:
        loss = own[kind]
        if sequence and kind != "vespo":
            read.note("importance_sampling_level", f"{kind} has one ratio for each token here")
    elif sequence:
        loss = {"use": "gspo", "epsilon_low": low, "epsilon_high": high}
    else:
        loss = {"use": "ppo_clip", "epsilon_low": low, "epsilon_high": high}
    if delta is not None and (sequence or kind in own or delta <= 1):
        read.note("delta", "only the clipped loss of tokens has a second bound, and it must be above 1")
    elif delta is not None:
        loss = {**loss, "use": "dual_clip", "c": delta}
    if kind == "bnpo" and read("gradient_accumulation_steps") > 1:
        read.note("loss_type", "bnpo averages the means of micro-batches in TRL, and all tokens of a step here")
    return {"policy_loss": loss, "aggregation": aggregation[kind]}


def _rloo(read: Reader) -> Parts:
    beta, low = read("beta"), read("epsilon")
    high = low if read("epsilon_high") is None else read("epsilon_high")
    if read("normalize_advantages"):
        read.note("normalize_advantages", read.reason("normalize_advantages"))
    return {
        "kl": [{"use": "in_reward", "beta": beta, "estimator": {"use": "k1"}}] if beta else [],
        "advantages": {"use": "leave_one_out"},
        "policy_loss": {"use": "gspo", "ratio": "product", "epsilon_low": low, "epsilon_high": high},
        "aggregation": {"use": "seq_mean_token_mean"},
        **_reference(read, beta),
    }


def _dpo(read: Reader) -> Parts:
    losses = read("loss_type")
    first = losses if isinstance(losses, str) else losses[0]
    if not isinstance(losses, str) and len(losses) > 1:
        read.note("loss_type", f"one loss, not a list: {first} here, without {', '.join(losses[1:])}")
    made = {"use": "dpo", "beta": read("beta"), "loss_type": first, "max_length": read("max_length")}
    made |= _set(read, label_smoothing="label_smoothing", f_divergence_type="f_divergence_type")
    if read("f_divergence_type") == "alpha_divergence":
        made["f_alpha_divergence_coef"] = read("f_alpha_divergence_coef")
    if first == "discopop":
        made["discopop_tau"] = read("discopop_tau")
    if read("precompute_ref_log_probs"):
        made["reference"] = "precomputed"
    for name in ("f_alpha_divergence_coef", "discopop_tau"):
        read.asked.add(name)
    return made


# Trainer's arguments


def _training(read: Reader) -> Parts:
    """Return the arguments of Trainer, with TRL's defaults where a recipe has others."""
    rollouts = read.trainer != "dpo"
    refused = {**REFUSED, **WITHOUT_EFFECT} if rollouts else OFFLINE_REFUSED
    made: Parts = {}
    for name in argument_names():
        if name in read.asked and name not in ("per_device_train_batch_size", "eval_strategy"):
            continue
        if name in refused or name in NOT_IN_RECIPE or name not in read.defaults:
            continue
        value = read(name)
        if rollouts and name in FORCED:
            if value not in (FORCED[name][0], read.defaults[name]):
                read.note(name, FORCED[name][1])
        elif name in read.given or (name in OF_TRL and value is not None):
            made[name] = value
    if read.given.get("bf16") is None:
        made["bf16"] = not read.given.get("fp16", False)
    return made


OF_TRL = ("learning_rate", "gradient_checkpointing", "logging_steps", "save_strategy", "save_steps", *DEFAULTS)
"""Arguments whose defaults in TRL, which are written into the recipe, differ from those of a recipe."""
