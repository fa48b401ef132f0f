"""The trainer as a user meets it: how long it runs, what it does when nothing can be learned, what it leaves behind."""

from __future__ import annotations

import gc
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_rlhf import RLHFTrainer, load_plugin
from hf_rlhf.axes import Filter, PolicyLoss, RewardSource, RolloutCorrection, RolloutEngine
from hf_rlhf.batch import Completions
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs

# How long


@pytest.mark.parametrize(
    ("rows", "prompts", "update", "epochs", "steps"),
    [
        (8, 4, {}, 1, 2),
        (8, 4, {"mini_batches": 2}, 3, 12),
        (8, 4, {"mini_batches": 2, "epochs": 3}, 2, 24),
        (6, 4, {"mini_batches": 4}, 2, 8),
        (4, 4, {"epochs": 2}, 1, 2),
    ],
)
def test_an_epoch_is_the_rollouts_that_fit_times_mini_batches_times_epochs(
    rows, prompts, update, epochs, steps, tmp_path
):
    made = runs.trained(
        tmp_path,
        data=runs.problems(rows),
        rollout={**runs.SCRIPTED, "prompts": prompts},
        update=update,
        training={"max_steps": -1, "num_train_epochs": epochs},
    )
    assert made.state.global_step == made.state.max_steps == steps
    assert made.state.epoch == epochs


def test_prompts_go_round_so_that_none_is_dropped_at_the_end_of_an_epoch(tmp_path):
    """Six rows, four per rollout: three rollouts see each row twice."""
    made = runs.trainer(tmp_path, data=runs.problems(6), update={}, training={"max_steps": 3})
    drawn = []
    collect = made.collector.collect

    def watched(index):
        buffer = collect(index)
        drawn.extend(map(tuple, buffer.prompt_ids[::4]))
        return buffer

    made.collector.collect = watched
    made.train(overwrite=True)
    assert len(drawn) == 12
    assert all(drawn.count(prompt) == 2 for prompt in drawn)


def test_a_dataset_smaller_than_a_rollout_says_what_to_lower(tmp_path):
    made = runs.trainer(tmp_path, data=runs.problems(3))
    with pytest.raises(ValueError, match=r"rollout\.prompts must be at most the 3 rows of the dataset, got 4"):
        made.train(overwrite=True)


def test_max_steps_may_stop_in_the_middle_of_a_rollout(tmp_path):
    made = runs.trained(tmp_path, update={"mini_batches": 4}, training={"max_steps": 3})
    assert made.state.global_step == 3


def test_each_step_takes_whole_groups_and_each_epoch_every_row_once(tmp_path):
    made = runs.trainer(tmp_path, update={"mini_batches": 2, "epochs": 3})
    buffer = made.collector.collect(0)
    orders = []
    for epoch in range(3):
        steps = [buffer.step_rows(2 * epoch + i, made.algorithm, seed=0).tolist() for i in range(2)]
        assert sorted(steps[0] + steps[1]) == list(range(16))
        for step in steps:
            groups = buffer.group_ids[step].tolist()
            assert all(groups.count(group) == 4 for group in groups)
        orders.append(steps)
    assert orders[0] == [list(range(8)), list(range(8, 16))]
    seeds = [[buffer.step_rows(2, made.algorithm, seed).tolist() for seed in range(8)]]
    assert len({str(order) for order in seeds[0]}) > 1, "a later epoch is shuffled"


def test_evaluating_before_training_works(tmp_path):
    made = runs.trainer(tmp_path, eval_data=runs.problems(3), rewards=[{"use": "exact_match"}])
    assert 0 < made.evaluate()["eval_accuracy"] <= 1
    made.train(overwrite=True)
    assert made.state.global_step == 2


def test_training_twice_starts_counting_anew_and_goes_on_learning(tmp_path):
    made = runs.trainer(tmp_path)
    made.train(overwrite=True)
    first = runs.parameters(made)
    made.train(overwrite=True)
    assert made.state.global_step == 2
    assert not torch.equal(runs.parameters(made), first)
    assert torch.isfinite(runs.parameters(made)).all()


# Steps that are not finite


@dataclass(kw_only=True)
class Spoiled(PolicyLoss):
    """The plain loss, which turns into NaN in some of its calls."""

    name: ClassVar[str] = "spoiled"
    needs: ClassVar[frozenset[str]] = frozenset()

    calls: list[int]
    """Which calls, counted from 0."""

    def __post_init__(self) -> None:
        self._count = -1

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        self._count += 1
        factor = float("nan") if self._count in self.calls else 1.0
        return -factor * advantages * logps * mask, {}


ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 4, "max_grad_norm": 1.0}


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path):
    made = runs.trainer(tmp_path, policy_loss=Spoiled(calls=[1]), training={**ADAMW, "weight_decay": 0.1})
    after: list[Tensor] = [runs.parameters(made)]
    step = made.training_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        if made.state.global_step:
            after.append(runs.parameters(made))
        return step(*args, **kwargs)

    made.training_step = watched
    made.train(overwrite=True)
    after.append(runs.parameters(made))
    assert [entry["health/nonfinite_step"] for entry in runs.entries(made)] == [0, 1, 0, 0]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(after)]
    assert moved == [True, False, True, True]
    assert torch.isfinite(after[-1]).all()


def test_one_spoiled_micro_batch_spoils_its_step_alone(tmp_path):
    made = runs.trained(tmp_path, policy_loss=Spoiled(calls=[4]), training={**ADAMW, "per_device_train_batch_size": 3})
    assert [entry["health/nonfinite_step"] for entry in runs.entries(made)] == [0, 1, 0, 0]
    assert torch.isfinite(runs.parameters(made)).all()


def test_three_such_steps_in_a_row_stop_the_run(tmp_path):
    made = runs.trainer(tmp_path, policy_loss=Spoiled(calls=[1, 2, 3]), training=ADAMW)
    with pytest.raises(FloatingPointError, match="the gradient was not finite in 3 consecutive optimizer steps"):
        made.train(overwrite=True)
    assert torch.isfinite(runs.parameters(made)).all()


def test_such_steps_apart_from_each_other_do_not(tmp_path):
    made = runs.trained(tmp_path, policy_loss=Spoiled(calls=[0, 1, 3]), training={**ADAMW, "max_steps": 5})
    assert sum(entry["health/nonfinite_step"] for entry in runs.entries(made)) == 3


# Rollouts that teach nothing


@dataclass(kw_only=True)
class Keep(Filter):
    """Keeps some rows."""

    name: ClassVar[str] = "keep"

    rows: list[int]
    """Which rows of the rollout are kept."""

    def __call__(self, scored: Any) -> Tensor:
        return torch.isin(torch.arange(len(scored.mask)), torch.tensor(self.rows, dtype=torch.long))


SILENT = "def silent(completions):\n    return [None] * len(completions)\n"
EMPTY: dict[str, dict[str, Any]] = {
    "every row filtered": {"filters": [Keep(rows=[])]},
    "every group flat": {"filters": [{"use": "zero_variance"}], "rewards": [{"use": "format", "pattern": ".*"}]},
    "no reward applies": {"rewards": [{"use": "function", "function": "SILENT:silent"}]},
}
FULL: dict[str, Any] = {
    "kl": [{"use": "in_reward"}, {"use": "in_loss"}],
    "reference": "frozen",
    "advantages": {"use": "gae", "whiten": True},
    "critic": "value_head",
    "loss_terms": ["entropy"],
}


@pytest.mark.parametrize("also", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("case", EMPTY)
def test_without_rows_the_parameters_stay_and_the_run_goes_on(case, also, tmp_path):
    (tmp_path / "silent.py").write_text(SILENT)
    parts = {**also, **EMPTY[case]}
    for source in parts.get("rewards", []):
        if "function" in source:
            source["function"] = f"{tmp_path}/silent.py:silent"
    made = runs.trainer(tmp_path, training={**ADAMW, "weight_decay": 0.1}, **parts)
    before = runs.parameters(made)
    made.train(overwrite=True)
    assert made.state.global_step == 4
    assert torch.equal(runs.parameters(made), before)
    assert sum(entry.get("health/empty_rollout", 0) for entry in runs.entries(made)) == 2


def test_a_group_with_one_row_left_has_advantage_zero(tmp_path):
    made = runs.trainer(tmp_path, filters=[Keep(rows=[0, 4, 5, 6])])
    buffer = made.collector.collect(0)
    advantages = buffer.rows["advantages"].sum(1)
    assert buffer.group_ids.tolist() == [0, 1, 1, 1]
    assert advantages[0] == 0
    assert torch.isfinite(advantages).all()
    made.train(overwrite=True)
    assert torch.isfinite(runs.parameters(made)).all()


def test_steps_without_rows_stand_between_steps_with_rows(tmp_path):
    """One group of four is left for four mini-batches."""
    made = runs.trained(
        tmp_path, filters=[Keep(rows=[4, 5, 6, 7])], update={"mini_batches": 4}, training={"max_steps": 4}
    )
    norms = [entry["grad_norm"] for entry in runs.entries(made)]
    assert sum(norm > 0 for norm in norms) == 1


def test_resampling_fills_the_places_of_what_was_dropped(tmp_path):
    flat = [{**row, "completions": ["zz"] * 8} for row in runs.problems(6)]
    mixed = [*flat[:3], *runs.problems(3, seed=4)]
    counts = []
    for resample in (0, 9):
        made = runs.trainer(
            tmp_path,
            data=mixed,
            filters=[{"use": "zero_variance", "resample": resample}],
            rewards=[{"use": "length", "unit": "characters", "target": 1, "maximum": 99}],
        )
        counts.append(len(made.collector.collect(0).group_ids.unique()))
    assert counts[0] < counts[1] == 4


# Engines and corrections of one's own


@dataclass(kw_only=True)
class Remote(RolloutEngine):
    """Scripted completions from a sampler that reports log-probs of its own, or not."""

    name: ClassVar[str] = "remote"
    provides: ClassVar[frozenset[str]] = frozenset({"sampler_logps"})

    reports: bool = True
    """Whether it gives the log-probs that it declares."""
    empty: bool = False
    """Whether a completion is empty."""
    short: bool = False
    """Whether a completion is missing."""

    def __call__(self, policy: Any, prompts: Any, num_generations: int, *, temperature: float | None = None) -> Any:
        ids = [[40 + i] * (1 + i) for _ in prompts for i in range(num_generations)]
        if self.empty:
            ids[1] = []
        if self.short:
            ids.pop()
        logps = [[-1.0] * len(row) for row in ids] if self.reports else None
        return Completions(ids=ids, finish_reasons=["stop"] * len(ids), logps=logps)


@dataclass(kw_only=True)
class Half(RolloutCorrection):
    """A constant factor."""

    name: ClassVar[str] = "half"

    factor: float = 0.5
    """The factor."""

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        assert torch.equal(sampler_logps, -mask)
        assert torch.equal(old_logps != 0, mask > 0)
        return self.factor * mask


SHORT = {"use": "length", "target": 1, "maximum": 9}


def remote(folder: Path, **settings: Any) -> RLHFTrainer:
    engine = Remote(prompts=4, num_generations=4, **settings)
    return runs.trainer(folder, rollout=engine, rewards=[SHORT], rollout_correction=Half(), dtype=torch.float64)


def test_a_correction_multiplies_the_policy_loss_and_gets_the_samplers_log_probs(tmp_path):
    options: dict[str, Any] = {"rewards": [SHORT], "dtype": torch.float64, "training": {"max_steps": 1}}

    def movement(**more: Any) -> Tensor:
        made = runs.trainer(tmp_path, rollout=Remote(prompts=4, num_generations=4), **options, **more)
        before = runs.parameters(made)
        made.train(overwrite=True)
        return runs.parameters(made) - before

    whole, half = movement(), movement(rollout_correction=Half())
    assert whole.norm() > 1e-3
    torch.testing.assert_close(half, 0.5 * whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"empty": True}, r"rollout=remote returned empty completions in rows \[1\]"),
        ({"short": True}, "rollout=remote must return 16 completions, got 15"),
        ({"reports": False}, "rollout=remote declares sampler_logps but returned no log-probs"),
    ],
    ids=str,
)
def test_what_an_engine_must_give_is_checked(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        remote(tmp_path, **wrong).train(overwrite=True)


@dataclass(kw_only=True)
class Counting(RewardSource):
    """Scores by length and remembers what the trainer tells it."""

    name: ClassVar[str] = "counting"

    def __post_init__(self) -> None:
        self.events: list[str] = []
        self.statistics: list[dict[str, float]] = []

    def setup(self, context: Any) -> None:
        self.events.append(f"setup {context.process_index} of {context.num_processes}")
        assert context.policy.num_parameters() > 0

    def close(self) -> None:
        self.events.append("close")

    def observe(self, statistics: Any) -> None:
        self.statistics.append(dict(statistics))

    def __call__(self, rollouts: Any) -> list[float]:
        return [float(len(text)) for text in rollouts.completions]


def test_a_plugin_is_set_up_once_and_closed_once(tmp_path):
    source = Counting()
    made = runs.trainer(tmp_path, rewards=[source])
    assert source.events == ["setup 0 of 1"]
    made.train(overwrite=True)
    made.close()
    made.close()
    assert source.events == ["setup 0 of 1", "close"]


def test_a_plugin_is_closed_after_an_error_too(tmp_path):
    source = Counting()
    made = runs.trainer(tmp_path, rewards=[source], policy_loss=Spoiled(calls=[0, 1, 2]), training=ADAMW)
    with pytest.raises(FloatingPointError):
        made.train(overwrite=True)
    del made
    gc.collect()
    assert source.events[-1] == "close"


def test_a_plugin_observes_each_rollout_once(tmp_path):
    source = Counting()
    runs.trained(tmp_path, rewards=[source], update={"mini_batches": 2, "epochs": 2}, training={"max_steps": 8})
    assert len(source.statistics) == 2
    for statistics in source.statistics:
        assert statistics["reward/counting/mean"] > 0
        assert statistics["rollout/tokens"] > 0


# What it leaves behind


def test_the_saved_policy_loads_in_plain_transformers(tmp_path):
    made = runs.trained(tmp_path, advantages="gae", critic="separate")
    made.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(runs.parameters(loaded), runs.parameters(made.model))
    assert loaded.config.use_cache == made.model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("1+2=", return_tensors="pt", return_token_type_ids=False)
    assert loaded.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 4
    assert (tmp_path / "critic" / "model.safetensors").is_file()


def test_a_saved_adapter_loads_in_plain_peft(tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    base, _ = tiny_policy()
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = runs.trained(tmp_path / "out", policy=model, lora=True, training={"learning_rate": 5.0})
    made.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, PeftModel)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made.model.eval()(ids).logits)
        assert not torch.allclose(loaded(ids).logits, base(ids).logits)


def test_metrics_and_completions_are_files(tmp_path):
    import pyarrow.parquet as pq

    made = runs.trained(tmp_path, rewards=[runs.FORMAT, SHORT], training={"max_steps": 4})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert lines[0]["reward/early/mean"] == runs.entries(made)[0]["reward/early/mean"]
    table = pq.read_table(tmp_path / "completions" / "step_000001.parquet").to_pylist()
    assert len(table) == 16
    columns = {"step", "prompt", "completion", "finish_reason", "reward/early", "reward/length", "reward/total"}
    assert columns | {"advantage", "tokens"} == set(table[0])
    assert sum(row["reward/early"] for row in table) / 16 == pytest.approx(lines[0]["reward/early/mean"])


def test_the_loss_that_is_logged_is_the_sum_of_its_terms(tmp_path):
    made = runs.trained(tmp_path, training={"per_device_train_batch_size": 3}, **FULL)
    for entry in runs.entries(made):
        terms = [x for name, x in entry.items() if name.endswith("/loss")]
        assert len(terms) == 4
        assert entry["loss"] == pytest.approx(sum(terms), abs=1e-5)


# From Python


def test_a_recipe_is_ten_lines_of_python(tmp_path):
    model, tokenizer = tiny_policy()
    problems = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
    recipe = load_recipe("rloo", ["rollout.prompts=4", "rollout.num_generations=2", "rollout.max_new_tokens=4"])
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = RLHFTrainer(model, recipe, args, train_dataset=problems, processing_class=tokenizer)
    trainer.train(overwrite=True)
    trainer.close()
    assert trainer.state.global_step == 2


def test_a_recipes_name_is_enough(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "rollout: {use: generate, prompts: 2, num_generations: 2, max_new_tokens: 3}\n"
        "rewards: [{use: exact_match}]\nadvantages: leave_one_out\n"
    )
    model, tokenizer = tiny_policy()
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    data = [{"prompt": "1+1=", "answer": "2"}] * 3
    trainer = RLHFTrainer(model, str(tmp_path / "r.yaml"), args, train_dataset=data, processing_class=tokenizer)
    trainer.train(overwrite=True)
    assert trainer.algorithm.advantages == load_plugin("advantages", "leave_one_out")
    assert trainer.model is model
