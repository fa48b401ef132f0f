"""One rollout through TRL's trainer and through ours: the same completions, scores and weights, plain SGD.

`CASES` pairs settings of TRL with choices of ours, `RECIPES` with our recipes as they are. Each takes two optimizer steps
on one rollout, so that the second sees a policy that has moved and ratios are not 1 (`reinforce` has no ratio: one step);
the reference is another model than the policy. The policy is in float64; TRL keeps rewards and log-probs in float32 all
the same.
`python -m tests.helpers.parity [CASE ...]` prints the measured differences.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PrinterCallback, TrainerCallback

from hf_rlhf import load_recipe
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

GROUPS, GROUP, LONGEST = 4, 4, 9
TRAINING = {
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": GROUPS * GROUP,
}
SCRIPTED = {"use": "scripted", "prompts": GROUPS, "num_generations": GROUP}
Parts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings of TRL's trainer, our recipe for them, and one change of the recipe that must show."""

    theirs: Parts
    ours: Parts
    wrong: Parts
    trainer: str = "GRPO"
    steps: int = 2
    rate: float = 0.3
    """Learning rate: large enough that some ratios leave their bounds."""
    rewards: tuple[str, ...] = ("score",)
    tools: bool = False
    """Whether some completion tokens were written by a tool."""
    same_loss: bool = True
    """Whether the losses are one number too, not only their gradients."""
    clips: tuple[str, ...] = ()
    """Metrics of ours that are above 0 in the second step: bounds that must bind there."""


def clip(low: float = 0.2, high: float = 0.2, use: str = "ppo_clip", **more: Any) -> Parts:
    return {"use": use, "epsilon_low": low, "epsilon_high": high, **more}


NORM = {"advantages": "group_norm", "policy_loss": clip(), "aggregation": "seq_mean_token_mean"}
BOTH = ("clip_frac/low", "clip_frac/high")


def in_loss(estimator: str) -> Parts:
    return {"kl": [{"use": "in_loss", "beta": 0.3, "estimator": estimator}], "reference": "frozen"}


CASES: dict[str, Case] = {
    "grpo": Case(
        theirs={"loss_type": "grpo"},
        ours=NORM,
        wrong={"advantages": {"use": "group_norm", "eps": 1e-2}},
        clips=BOTH,
    ),
    "bnpo": Case(
        theirs={"loss_type": "bnpo"},
        ours={**NORM, "aggregation": "token_mean"},
        wrong={"aggregation": "seq_mean_token_mean"},
        clips=BOTH,
    ),
    "dr_grpo": Case(
        theirs={"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": LONGEST},
        ours={
            **NORM,
            "advantages": "group_mean",
            "aggregation": {"use": "seq_mean_token_sum_norm", "length": LONGEST},
        },
        wrong={"advantages": "leave_one_out"},
        rate=1.0,
        clips=BOTH,
    ),
    "dapo": Case(
        theirs={"loss_type": "dapo", "epsilon_high": 0.28},
        ours={**NORM, "policy_loss": clip(0.2, 0.28), "aggregation": "token_mean"},
        wrong={"policy_loss": clip(0.2, 0.2)},
        clips=BOTH,
    ),
    "grpo, delta": Case(
        theirs={"loss_type": "grpo", "delta": 1.3},
        ours={**NORM, "policy_loss": clip(use="dual_clip", c=1.3)},
        wrong={"policy_loss": clip()},
        clips=(*BOTH, "clip_frac/dual"),
    ),
    "cispo": Case(
        theirs={"loss_type": "cispo", "epsilon_high": 1.2},
        ours={**NORM, "policy_loss": clip(1.0, 1.2, use="cispo", bound="absolute"), "aggregation": "token_mean"},
        wrong={"policy_loss": clip(0.2, 0.2, use="cispo")},
        clips=("clip_frac/high",),
    ),
    "gspo": Case(
        theirs={"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.3},
        ours={**NORM, "policy_loss": clip(0.1, 0.3, use="gspo")},
        wrong={"policy_loss": clip(0.1, 0.2, use="gspo")},
        clips=BOTH,
    ),
    "luspo": Case(
        theirs={"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.3},
        ours={**NORM, "policy_loss": clip(0.1, 0.3, use="gspo"), "aggregation": "seq_mean_token_sum"},
        wrong={"aggregation": "seq_mean_token_mean"},
    ),
    "sapo": Case(
        theirs={"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.5},
        ours={**NORM, "policy_loss": {"use": "sapo", "tau_positive": 1.0, "tau_negative": 1.5}},
        wrong={"policy_loss": {"use": "sapo", "tau_positive": 1.0, "tau_negative": 1.4}},
    ),
    "vespo": Case(
        theirs={"loss_type": "vespo"},
        ours={**NORM, "policy_loss": "vespo", "aggregation": "token_mean"},
        wrong={"policy_loss": "reinforce"},
    ),
    "grpo, scale_rewards batch": Case(
        theirs={"loss_type": "grpo", "scale_rewards": "batch"},
        ours={**NORM, "advantages": "group_mean_batch_std"},
        wrong={"advantages": "group_norm"},
        clips=BOTH,
    ),
    "grpo, scale_rewards none": Case(
        theirs={"loss_type": "grpo", "scale_rewards": "none"},
        ours={**NORM, "advantages": "group_mean"},
        wrong={"advantages": "leave_one_out"},
    ),
    "gdpo": Case(
        theirs={"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
        ours={**NORM, "advantages": "gdpo"},
        wrong={"advantages": "group_norm"},
        rewards=("score", "length"),
    ),
    "grpo, KL": Case(
        theirs={"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        ours={**NORM, **in_loss("k3")},
        wrong=in_loss("k2"),
    ),
    "grpo, corrected KL": Case(
        theirs={"loss_type": "grpo", "beta": 0.3},
        ours={**NORM, **in_loss("k3_is")},
        wrong=in_loss("k3"),
    ),
    "grpo, entropy": Case(
        theirs={"loss_type": "grpo", "entropy_coef": 0.1},
        ours={**NORM, "loss_terms": [{"use": "entropy", "coef": 0.1}]},
        wrong={"loss_terms": []},
    ),
    "grpo, tool tokens": Case(
        theirs={"loss_type": "grpo"},
        ours={**NORM, "rollout": {**SCRIPTED, "mask_column": "masks"}},
        wrong={"rollout": SCRIPTED},
        tools=True,
        clips=BOTH,
    ),
    "grpo, temperature": Case(
        theirs={"loss_type": "grpo", "temperature": 0.7},
        ours={**NORM, "rollout": {**SCRIPTED, "temperature": 0.7}},
        wrong={"rollout": SCRIPTED},
        clips=BOTH,
    ),
    "rloo": Case(
        theirs={"beta": 0.05},
        ours={
            "advantages": "leave_one_out",
            "policy_loss": "reinforce",
            "aggregation": "seq_mean_token_sum",
            "kl": [{"use": "in_reward", "beta": 0.05, "estimator": "k1"}],
            "reference": "frozen",
        },
        wrong={"advantages": "group_mean"},
        trainer="RLOO",
        steps=1,
        same_loss=False,
    ),
    "rloo, clip": Case(
        theirs={"beta": 0.05, "epsilon": 0.1, "epsilon_high": 0.3},
        ours={
            "advantages": "leave_one_out",
            "policy_loss": clip(0.1, 0.3, use="gspo", ratio="product"),
            "aggregation": "seq_mean_token_mean",
            "kl": [{"use": "in_reward", "beta": 0.05, "estimator": "k1"}],
            "reference": "frozen",
        },
        wrong={"policy_loss": clip(0.1, 0.3, use="gspo", ratio="mean"), "aggregation": "seq_mean_token_sum"},
        trainer="RLOO",
        rate=0.03,
        clips=BOTH,
    ),
}


AXES = ("advantages", "kl", "policy_loss", "aggregation", "loss_terms", "reference")


def recipe(name: str) -> Parts:
    """What a recipe of ours says of the numbers; its rollout, rewards and filters have no counterpart in TRL."""
    raw = load_recipe(name).raw
    return {axis: raw[axis] for axis in AXES}


RECIPES: dict[str, Parts] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": 512},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "luspo": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "rloo": {"beta": 0.05},
    "grpo@trl": {},
    "cispo@trl": {"loss_type": "cispo", "epsilon_high": 5.0},
    "rloo@trl": {},
}
"""Recipe -> what TRL's trainer is told; nothing more than TRL's own defaults where it is empty."""


RATES = {"gspo": 1e-3, "luspo": 1e-3, "rloo@trl": 0.03}


def of_recipe(name: str) -> Case:
    """The case of a recipe as it is, at a learning rate at which the smallest clip cuts some rows and not all."""
    ours = recipe(name)
    ratio = ours["policy_loss"]["use"] != "reinforce"
    return Case(
        theirs=RECIPES[name],
        ours=ours,
        wrong={},
        trainer="RLOO" if name.startswith("rloo") else "GRPO",
        steps=2 if ratio else 1,
        rate=RATES.get(name, 0.3),
        same_loss=ratio,
    )


# What both systems are given


def rows() -> list[dict[str, Any]]:
    """Prompts of unequal length, each with completions of unequal length in which a tool may have written some tokens."""
    draw = random.Random(0)
    made = []
    for i in range(GROUPS):
        texts = [[draw.randrange(40, 70) for _ in range(draw.randint(2, LONGEST))] for _ in range(GROUP)]
        masks = [[int(draw.random() > 0.3) for _ in text[1:]] + [1] for text in texts]
        made.append({"prompt": "abcdef"[i : 2 * i + 1], "completions": texts, "masks": masks})
    return made


def score(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(ids) % 7) / 4 for ids in completion_ids]


def length(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def unscored(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    return [None if sum(ids) % 7 == 3 else float(sum(ids) % 7) for ids in completion_ids]


REWARDS = {function.__name__: function for function in (score, length, unscored)}


def policy(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The model of `tiny_policy` with weights of twice the size, whose distributions are far from uniform, and its
    tokenizer."""
    model, tokenizer = tiny_policy(seed=seed, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model, tokenizer


def set_reference(model: Any) -> None:
    """Gives the reference other weights than the policy has, so that the KL to it is there from the first step on."""
    if model is not None:
        model.load_state_dict(policy(seed=1)[0].state_dict())


@dataclass(kw_only=True)
class Outcome:
    """What each optimizer step added to the parameters, the losses, and what else was logged."""

    updates: list[torch.Tensor]
    losses: list[float]
    logs: list[dict[str, float]]


@dataclass
class Watch(TrainerCallback):
    """Notes what every step adds to the parameters."""

    before: torch.Tensor
    updates: list[torch.Tensor] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = runs.parameters(getattr(model, "policy", model))
        self.updates.append(now - self.before)
        self.before = now


def of_trl(case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    """What TRL's trainer does with the rollout."""
    from datasets import Dataset

    # TRL asks for these where it is imported and built: no news of the run is sent, nothing is said of `rollout_func`.
    with patch.dict(os.environ, {"CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}), tempfile.TemporaryDirectory() as folder:
        import trl

        data = rows()
        model, tokenizer = policy(dtype=dtype)
        watch = Watch(runs.parameters(model))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {"num_generations": GROUP, "max_completion_length": 16, "num_iterations": case.steps, **case.theirs}
        args = getattr(trl, f"{case.trainer}Config")(
            folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            shuffle_dataset=False,
            max_steps=case.steps,
            learning_rate=case.rate,
            model_init_kwargs={"dtype": dtype},
            **{**TRAINING, **settings},
        )
        script = Script(data, tokenizer, case.tools)
        engine = {"rollout_func": script.rollout} if case.trainer == "GRPO" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = getattr(trl, f"{case.trainer}Trainer")(
                folder,
                [REWARDS[name] for name in case.rewards],
                args,
                train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in data]),
                processing_class=tokenizer,
                callbacks=[watch],
                **engine,
            )
            trainer.remove_callback(PrinterCallback)
            set_reference(trainer.ref_model)
            if case.trainer == "RLOO":
                trainer._generate_single_turn = script.single_turn
            trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(updates=watch.updates, losses=[entry["loss"] for entry in logs], logs=logs)


@dataclass
class Script:
    """Gives each prompt the completions of its row, one after the other."""

    data: list[dict[str, Any]]
    tokenizer: Any
    tools: bool

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """What TRL's `rollout_func` answers."""
        rows = {row["prompt"]: row for row in self.data}
        given: Counter[str] = Counter()
        completions, masks = [], []
        for prompt in prompts:
            completions.append(rows[prompt]["completions"][given[prompt]])
            masks.append(rows[prompt]["masks"][given[prompt]])
            given[prompt] += 1
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        answer = {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}
        return {**answer, "env_mask": masks} if self.tools else answer

    def single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> list[list[int]]:
        """What the generation step of TRL's RLOO trainer answers."""
        return self.rollout([self.tokenizer.decode(ids) for ids in prompt_ids], None)["completion_ids"]


def of_ours(case: Case, dtype: torch.dtype = torch.float64, **changes: Any) -> Outcome:
    """What our trainer does with it, with some parts of the recipe changed."""
    model, _ = policy(dtype=dtype)
    watch = Watch(runs.parameters(model))
    weights = case.theirs.get("reward_weights", [1.0] * len(case.rewards))
    rewards = [
        {"use": "function", "function": REWARDS[name], "weight": weight}
        for name, weight in zip(case.rewards, weights, strict=True)
    ]
    parts = {
        "rollout": SCRIPTED,
        "rewards": rewards,
        "update": {"mini_batches": 1, "epochs": case.steps},
        **case.ours,
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = runs.trainer(
            Path(folder),
            data=rows(),
            policy=model,
            dtype=dtype,
            training={**TRAINING, "learning_rate": case.rate, "max_steps": case.steps},
            callbacks=[watch],
            dataset={"shuffle": False},
            **parts,
        )
        reference = trainer.collector.forwards.reference
        set_reference(reference and reference.own)
        trainer.train()
        trainer.close()
    logs = runs.entries(trainer)
    return Outcome(updates=watch.updates, losses=[entry["loss"] for entry in logs], logs=logs)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far one update is from the other, relative to it."""
    return float((ours - theirs).norm() / theirs.norm())


def main() -> None:
    """Prints a table: of each case its updates' relative differences, its losses' absolute ones, and the last update's
    relative difference when one thing of ours is changed."""
    cases = {**CASES, **{f"recipe {name}": of_recipe(name) for name in RECIPES}}
    print(f"{'case':28} {'update 1':>9} {'update 2':>9} {'loss 1':>9} {'loss 2':>9} {'changed':>9}")
    for name in sys.argv[1:] or cases:
        case, nan = cases[name], [float("nan")]
        theirs, ours = of_trl(case), of_ours(case)
        numbers = [apart(a, b) for a, b in zip(ours.updates, theirs.updates, strict=True)] + nan * (2 - case.steps)
        numbers += [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)] + nan * (2 - case.steps)
        wrong = of_ours(case, **case.wrong) if case.wrong else None
        numbers += [apart(wrong.updates[-1], theirs.updates[-1])] if wrong else nan
        print(f"{name:28}", *(f"{number:9.1e}" for number in numbers), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
