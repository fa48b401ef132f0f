"""`update.ema` in whole runs: what it saves, that it changes no training, and that it resumes with equal bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_rlhf.config.recipe import RecipeError
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs, stepping

DECAY = 0.8


class Watch(TrainerCallback):
    """The policy after each optimizer step."""

    def __init__(self) -> None:
        self.policies: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policies.append(runs.parameters(self.trainer.model))  # type: ignore[attr-defined]


def averaged(policies: list[Tensor]) -> Tensor:
    found = policies[0]
    for policy in policies[1:]:
        found = DECAY * found + (1 - DECAY) * policy
    return found


def saved(folder: Path) -> Tensor:
    """The parameters of a folder with a model, as they lie on disk."""
    return runs.parameters(AutoModelForCausalLM.from_pretrained(folder))


def run(folder: Path, ema: float | None = DECAY, **options: Any) -> Any:
    update = {"mini_batches": 2, **({} if ema is None else {"ema": ema})}
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, **options.pop("training", {})}
    return runs.trainer(folder, update=update, training=training, **options)


def test_the_average_is_saved_as_a_model_of_its_own_and_training_is_the_same_without_it(tmp_path: Path):
    watch = Watch()
    made = run(tmp_path / "with", callbacks=[watch])
    watch.trainer = made
    start = runs.parameters(made.model)
    made.train()
    made.save_model(str(tmp_path / "with"))
    made.close()
    policies = [start, *watch.policies]
    torch.testing.assert_close(saved(tmp_path / "with" / "ema"), averaged(policies), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        saved(tmp_path / "with" / "checkpoint-3" / "ema"), averaged(policies[:4]), rtol=1e-6, atol=1e-7
    )
    assert torch.equal(saved(tmp_path / "with"), policies[-1])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "with" / "ema")) == len(tiny_policy()[1])
    plain = run(tmp_path / "without", ema=None)
    plain.train()
    plain.close()
    assert torch.equal(runs.parameters(plain.model), policies[-1])
    assert not (tmp_path / "without" / "checkpoint-3" / "ema").exists()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "adapter"])
def test_a_resumed_run_has_the_average_of_one_that_was_not_stopped_to_the_bit(kind: str, tmp_path: Path):
    """Within a rollout, of two mini-batches."""
    options: dict[str, Any] = {"lora": kind == "adapter"}
    options |= {"dtype": torch.bfloat16} if kind == "bfloat16" else {}

    def trained(folder: Path, steps: int, resume: Any = None) -> tuple[Tensor, Tensor]:
        made = run(folder, training={"max_steps": steps}, **options)
        made.train(resume_from_checkpoint=resume)
        made.close()
        names = [name for name, p in made.model.named_parameters()]
        assert not any("ema" in name for name in names), "Trainer's loading adds no adapter"
        return runs.parameters(made.model), torch.cat([x.flatten() for x in made.ema.tensors()])

    straight = trained(tmp_path / "a", 6)
    trained(tmp_path / "b", 3)
    resumed = trained(tmp_path / "b", 6, resume=str(tmp_path / "b" / "checkpoint-3"))
    for one, other in zip(resumed, straight, strict=True):
        assert torch.equal(one, other)


def test_the_average_of_a_bfloat16_policy_lies_on_disk_in_float32(tmp_path: Path):
    made = run(tmp_path, dtype=torch.bfloat16)
    made.train()
    made.close()
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3" / "ema")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert {p.dtype for p in average.parameters()} == {torch.float32}
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert str(made.model.config.dtype).endswith("bfloat16")
    rounded = runs.parameters(average).bfloat16().double()
    assert not torch.equal(rounded, runs.parameters(average)), "float32 holds what bfloat16 would not"


def test_the_average_of_an_adapter_is_an_adapter_on_the_same_base(tmp_path: Path):
    from peft import PeftModel

    made = run(tmp_path, lora=True)
    made.train()
    made.save_model(str(tmp_path / "out"))
    loaded: Any = PeftModel.from_pretrained(tiny_policy()[0], tmp_path / "out" / "ema")
    with torch.no_grad(), made.ema.as_policy(made.model):
        ids = torch.tensor([[5, 6, 7, 8]])
        assert torch.equal(loaded(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)
    made.close()


def test_evaluation_rolls_out_the_average_as_well(tmp_path: Path):
    sampled = {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 4}
    parts: dict[str, Any] = {"rollout": sampled}
    made = run(
        tmp_path,
        ema=0.99,
        eval_data=runs.problems(6, seed=3),
        evaluation={"ema": True, "num_generations": 4},
        training={"learning_rate": 0.02, "optim": "adamw_torch", "max_steps": 20},
        **parts,
    )
    before = made.evaluate()
    own = {name for name in before if name.startswith(("eval_reward", "eval_rollout"))}
    assert own
    assert all(before[name] == before[name.replace("eval_", "eval_ema/", 1)] for name in own)
    made.train()
    weights = runs.parameters(made.model)
    after = made.evaluate()
    assert torch.equal(runs.parameters(made.model), weights)
    made.save_model(str(tmp_path / "out"))
    made.close()
    path = str(tmp_path / "out" / "ema")
    other = runs.trainer(
        tmp_path / "other",
        model={"path": path},
        eval_data=runs.problems(6, seed=3),
        **parts,
        evaluation={"num_generations": 4},
    )
    alone = other.evaluate()
    other.close()
    found = {name: after[name.replace("eval_", "eval_ema/", 1)] for name in own}
    assert found == pytest.approx({name: alone[name] for name in own})
    assert after["eval_reward/early/mean"] > found["eval_reward/early/mean"] + 0.2, "the average lags behind"


def test_evaluating_an_average_that_is_not_kept_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"evaluation\.ema .* set update\.ema=0\.992"):
        run(tmp_path, ema=None, evaluation={"ema": True})


def test_the_plan_refuses_it_too_and_counts_the_memory_of_an_average():
    from transformers import TrainingArguments

    from hf_rlhf.cli.runs.run import check
    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.runtime.errors import UserError
    from hf_rlhf.training.memory.estimate import estimate

    with pytest.raises(UserError, match=r"evaluation\.ema rolls out"):
        check(runs.recipe(evaluation={"ema": True}, rollout=runs.SAMPLED))
    args = TrainingArguments("nowhere", use_cpu=True, report_to="none")
    both = [runs.recipe(rollout=runs.SAMPLED, update=update).algorithm() for update in ({}, {"ema": 0.9})]
    model, _ = tiny_policy()
    plain, more = (estimate(Model(), a, args, model=model, prompt_tokens=20).phases["update"] for a in both)
    assert more.pop("average") == pytest.approx(plain["weights"], rel=1e-3)
    assert more["weights"] == plain["weights"]


@pytest.mark.parametrize("decay", [0, 1])
def test_a_decay_that_averages_nothing_is_refused(decay: int, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"update\.ema"):
        run(tmp_path, ema=decay)


def test_another_decay_on_resume_is_refused(tmp_path: Path):
    from hf_rlhf.runtime.checkpoint_manifest import CheckpointError

    made = run(tmp_path)
    made.train()
    made.close()
    with pytest.raises(CheckpointError, match=r"update\.ema: 0\.8 in the checkpoint, 0\.5 now"):
        run(tmp_path, ema=0.5).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_two_processes_keep_the_average_of_one_and_resume_it_to_the_bit(tmp_path: Path):
    def specification(folder: Path) -> dict[str, Any]:
        return {
            "output_dir": str(folder),
            "algorithm": {},
            "update": {"mini_batches": 2, "epochs": 2, "ema": DECAY},
            "training": {"save_strategy": "steps", "save_steps": 3},
        }

    stepping.run(specification(tmp_path / "one"))
    for name, how in (("two", {}), ("resumed", {"resume": True})):
        if how:
            shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / name / "checkpoint-3")
        folder = tmp_path / f"program {name}"
        stepping.finish(stepping.start({name: specification(tmp_path / name)}, folder, processes=2, **how), folder)
    one, two, resumed = (saved(tmp_path / name / "checkpoint-6" / "ema") for name in ("one", "two", "resumed"))
    assert torch.equal(two, resumed)
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)
    assert not torch.equal(two, saved(tmp_path / "two" / "checkpoint-6"))
