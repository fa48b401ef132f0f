"""What a rollout engine is told: which weights the policy has, and when it may let go of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_rlhf import load_plugin
from hf_rlhf.axes import Filter, RolloutEngine
from hf_rlhf.runtime import checkpoint_manifest
from tests.helpers import runs

PROMPTS = [{"prompt": f"{i}+1="} for i in range(6)]


@dataclass(kw_only=True)
class Recorder(RolloutEngine):
    """The engine `generate`, which notes what is called with which weights; it fails at call number `fails_at`."""

    name = "recorder"
    provides = frozenset({"sampler_logps"})
    fails_at: int | None = None

    def __post_init__(self) -> None:
        self.calls: list[str] = []
        self.versions: list[str] = []
        self.inner = load_plugin("rollout", "generate", max_new_tokens=3)

    def __call__(self, policy: Any, prompts: Any, num_generations: int, *, temperature: Any = None) -> Any:
        self.calls.append("greedy" if temperature == 0 else "sample")
        self.versions.append(policy.version)
        if len(self.versions) == self.fails_at:
            raise RuntimeError("the engine fails")
        return self.inner(policy, prompts, num_generations, temperature=temperature)

    def wake(self, part: str) -> None:
        self.calls.append(f"wake {part}")

    def sleep(self) -> None:
        self.calls.append("sleep")


@dataclass(kw_only=True)
class KeepNone(Filter):
    """Drops every row, so that each round of prompts is followed by another."""

    name = "keep_none"

    def __call__(self, scored: Any) -> Any:
        return scored.mask.new_zeros(len(scored.mask)).bool()


WAKE = ["wake weights", "wake cache"]


def trainer(folder: Path, steps: int = 4, fails_at: int | None = None, **options: Any) -> tuple[Any, Recorder]:
    engine = Recorder(prompts=4, num_generations=4, fails_at=fails_at)
    training = {"max_steps": steps, **options.pop("training", {})}
    options = {"data": PROMPTS, "eval_data": PROMPTS[:2], **options}
    return runs.trainer(folder, rollout=engine, training=training, **options), engine


def steps_of(engine: Recorder, made: Any) -> list[str]:
    """The versions of an engine's calls without the run id, which must be the trainer's."""
    assert {version.split(":")[0] for version in engine.versions} == {made.run_id}
    return [version.partition(":")[2] for version in engine.versions]


def test_the_version_follows_the_optimizer_steps_and_the_average(tmp_path):
    made, engine = trainer(tmp_path, update={"mini_batches": 2, "ema": 0.9}, evaluation={"ema": True})
    made.evaluate()
    made.train()
    made.evaluate()
    made.close()
    assert steps_of(engine, made) == ["0", "0:ema", "0", "2", "4", "4:ema"]
    assert made.collector.policy.version == f"{made.run_id}:4"


def test_the_version_is_back_when_an_evaluation_of_the_average_fails(tmp_path):
    made, engine = trainer(tmp_path, fails_at=2, update={"mini_batches": 2, "ema": 0.9}, evaluation={"ema": True})
    with pytest.raises(RuntimeError, match="the engine fails"):
        made.evaluate()
    made.close()
    assert made.collector.policy.version == f"{made.run_id}:0"
    assert engine.calls == 2 * [*WAKE, "sample", "sleep"]


def test_a_resumed_run_keeps_its_id_and_another_run_has_another(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    first, _ = trainer(tmp_path, training=saving, steps=3)
    first.train()
    first.close()
    again, engine = trainer(tmp_path, training=saving, steps=6)
    assert again.run_id != first.run_id
    again.train(resume_from_checkpoint=True)
    again.close()
    assert again.run_id == first.run_id
    assert steps_of(engine, again) == ["4"]
    manifests = [checkpoint_manifest.read_manifest(tmp_path / f"checkpoint-{n}") for n in (3, 6)]
    assert [manifest["run_id"] for manifest in manifests] == 2 * [first.run_id]


def test_a_checkpoint_of_the_last_step_gives_its_version_and_so_does_the_best_model(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward/total/mean", "greater_is_better": True}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    made, _ = trainer(tmp_path, steps=3, training={**saving, **best}, callbacks=[Worse()])
    made.train()
    made.close()
    assert made.state.best_global_step == 1
    assert made.collector.policy.version == f"{made.run_id}:1"
    other, _ = trainer(tmp_path, steps=3)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    other.close()
    assert other.collector.policy.version == f"{made.run_id}:3"


class Worse(TrainerCallback):
    """Lets every evaluation look worse than the one before it."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_reward/total/mean"] = -state.global_step


def test_training_once_more_from_the_trained_weights_is_a_new_run(tmp_path):
    """Trainer counts steps from 0 again: the same step of the same run would name two policies."""
    made, engine = trainer(tmp_path, steps=2)
    made.train()
    first = made.run_id
    made.train()
    made.close()
    assert made.run_id != first
    assert engine.versions == [f"{first}:0", f"{made.run_id}:0"]


def test_the_engine_is_awake_for_all_rounds_and_greedy_baselines_of_a_rollout(tmp_path):
    greedy = {"use": "baseline", "baseline": "greedy"}
    made, engine = trainer(tmp_path, steps=2, advantages=greedy, filters=[KeepNone(resample=2)])
    made.train()
    made.close()
    assert engine.calls == [*WAKE, *3 * ["sample", "greedy"], "sleep"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_the_engine_sleeps_when_a_rollout_fails(fails_at, tmp_path):
    made, engine = trainer(tmp_path, fails_at=fails_at, filters=[KeepNone(resample=2)])
    with pytest.raises(RuntimeError, match="the engine fails"):
        made.train()
    made.close()
    assert engine.calls == [*WAKE, *fails_at * ["sample"], "sleep"]


def test_the_engine_sleeps_when_a_reward_fails_and_when_it_fails_to_wake(tmp_path):
    made, engine = trainer(tmp_path / "reward")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no answer")

    made.collector.scorer.ask = refuse
    with pytest.raises(ValueError, match="no answer"):
        made.evaluate()
    made.close()
    assert engine.calls == [*WAKE, "sample", "sleep"]
    made, engine = trainer(tmp_path / "wake")
    engine.wake = refuse  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no answer"):
        made.train()
    made.close()
    assert engine.calls == ["sleep"]
