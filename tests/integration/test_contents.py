"""A resumed run reads the same rows, files and models as before, whatever they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf import RLHFTrainer, load_recipe
from hf_rlhf.registry.host import get_host
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.runtime.errors import CheckpointError
from hf_rlhf.testing import tiny_policy
from tests.helpers import offline_runs as off
from tests.helpers.runs import SAMPLED, parameters, problems, save_classifier, trainer

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
REWARD = "def score(completions):\n    return [float(len(text)) for text in completions]\n"


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    return str(off.write(folder / "rows.jsonl", rows))


def refused(made: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"comes from another run:\n  {name}:.*\n.*--allow-changed {name} "):
        made.train(resume_from_checkpoint=True)


def accepted(made: Any, name: str, caplog: Any) -> None:
    assert made.train(resume_from_checkpoint=True, allow_changed=[name]).global_step == 5
    assert f"with a change that was allowed: {name}" in caplog.text


def changed(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    if what == "order":
        return [*rows[1:], rows[0]]
    if what == "answer":
        return [{**rows[0], "answer": "?"}, *rows[1:]]
    return [*rows[:-1], {**rows[-1], "prompt": "1+1="}]


@pytest.mark.parametrize("what", ["order", "answer", "prompt"])
def test_other_rows_under_the_same_name_are_refused_and_allowed_by_name(what, tmp_path, caplog):
    def run(rows: list[dict[str, Any]], steps: int) -> Any:
        path = written(tmp_path, rows)
        return trainer(tmp_path / "out", data=load(path), training={**STEPS, "max_steps": steps})

    def load(path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]

    run(problems(), 4).train()
    run(problems(), 4).train(resume_from_checkpoint=True)
    refused(run(changed(problems(), what), 5), "dataset")
    accepted(run(changed(problems(), what), 5), "dataset", caplog)
    assert run(changed(problems(), what), 5).train(resume_from_checkpoint=True).global_step == 5


def test_a_dataset_file_with_other_rows_is_refused(tmp_path):
    model = tmp_path / "model"
    for part in tiny_policy():
        part.save_pretrained(model)

    def run(rows: list[dict[str, Any]]) -> RLHFTrainer:
        small = ["rollout.prompts=4", "rollout.num_generations=2", "rollout.max_new_tokens=3", "dataset.held_out=0"]
        saving = [
            "training.max_steps=2",
            "training.use_cpu=true",
            "training.save_strategy=steps",
            "training.save_steps=2",
        ]
        reward = "rewards=[{use: length, target: 1, maximum: 9}]"
        words = [f"model.path={model}", f"dataset.path={written(tmp_path, rows)}", reward, *small, *saving]
        recipe = load_recipe(
            "grpo", [*words, "dataset.prompt=prompt", "dataset.prompt_template=null", "dataset.system=null"]
        )
        return RLHFTrainer(None, recipe, recipe.training_arguments(str(tmp_path / "out")))

    plain = [{"prompt": row["prompt"], "answer": row["answer"]} for row in problems()]
    run(plain).train()
    refused(run(changed(plain, "order")), "dataset")
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    refused(run(plain), r"model\.path")


@pytest.mark.parametrize("streamed", ["same", "other"])
def test_a_stream_that_gives_other_rows_is_refused(streamed, tmp_path):
    import datasets

    def run(rows: list[dict[str, Any]], steps: int = 5) -> Any:
        data = datasets.IterableDataset.from_generator(lambda: iter(rows))
        return trainer(tmp_path / "out", data=data, training={**STEPS, "max_steps": steps})

    run(problems(40), 4).train()
    if streamed == "same":
        assert run(problems(40)).train(resume_from_checkpoint=True).global_step == 5
        return
    rows = [{**row, "answer": "?"} for row in problems(40)]
    with pytest.raises(CheckpointError, match=r"dataset: the first \d+ prompts of the stream are not those"):
        run(rows).train(resume_from_checkpoint=True)
    assert run(rows).train(resume_from_checkpoint=True, allow_changed=["dataset"]).global_step == 5


def test_another_reward_file_is_refused_and_the_same_one_elsewhere_is_its_content(tmp_path, caplog):
    file = tmp_path / "mine.py"

    def run(text: str, steps: int = 5) -> Any:
        file.write_text(text)
        reward = {"use": "function", "function": f"{file}:score"}
        return trainer(tmp_path / "out", rewards=[reward], training={**STEPS, "max_steps": steps})

    run(REWARD, 4).train()
    refused(run(REWARD.replace("len(text)", "-len(text)")), r"rewards\.0\.function")
    accepted(run(REWARD + "# more\n"), "rewards.0", caplog)


def test_another_function_from_python_is_refused(tmp_path):
    def score(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    trainer(tmp_path, rewards=[{"use": "function", "function": score}], training=STEPS).train()

    def score(completions: list[str]) -> list[float]:  # type: ignore[no-redef]
        return [float(-len(text)) for text in completions]

    refused(
        trainer(tmp_path, rewards=[{"use": "function", "function": score}], training=STEPS), r"rewards\.0\.function"
    )


PLUGIN = """
from dataclasses import dataclass
from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
hf_rlhf_api = "1.0"

@dataclass(kw_only=True)
class Short(RewardSource):
    "Minus the length."
    name = "short_{number}"

    def __call__(self, rollouts):
        return [-float(len(text)) for text in rollouts.completions]

@hookimpl
def rewards():
    return [Short]
"""


def test_another_plugin_file_is_refused(tmp_path):
    file = tmp_path / f"short_{tmp_path.name}.py"
    text = PLUGIN.replace("{number}", str(abs(hash(str(file)))))
    file.write_text(text)
    (offer,) = get_host().add_file(file)

    def run() -> Any:
        return trainer(tmp_path / "out", rewards=[offer.name], training=STEPS)

    run().train()
    run().train(resume_from_checkpoint=True)
    file.write_text(text + "# changed\n")
    refused(run(), r"rewards\.0")


def test_another_reward_model_in_the_same_folder_is_refused(tmp_path):
    def run(seed: int) -> Any:
        reward = {"use": "reward_model", "model": save_classifier(tmp_path / "rm", seed)}
        return trainer(tmp_path / "out", rewards=[reward], training=STEPS)

    run(0).train()
    run(0).train(resume_from_checkpoint=True)
    refused(run(1), r"rewards\.0\.model")


def test_offline_trainers_refuse_other_rows_and_other_weights(tmp_path):
    from hf_rlhf.training.offline.setup import make_trainer

    saving = [f"training.{name}={x}" for name, x in STEPS.items()]

    def run(rows: list[dict[str, Any]]) -> Any:
        return make_trainer(off.recipe(tmp_path, "reward_model", *saving, given=rows), str(tmp_path / "out"))

    rows = off.rows("reward_model")
    run(rows).train()
    assert checkpoint_manifest.read_manifest(tmp_path / "out" / "checkpoint-2")["run_id"]
    run(rows).train(resume_from_checkpoint=True)
    refused(run([{**rows[0], "chosen": "b"}, *rows[1:]]), "dataset")


def test_rows_per_micro_batch_are_of_the_run_where_they_split_a_rollout(tmp_path):
    def run(rows: int, steps: int = 5) -> Any:
        return trainer(tmp_path, training={**STEPS, "max_steps": steps, "per_device_train_batch_size": rows})

    run(16, 4).train()
    again = run(64)
    again.train(resume_from_checkpoint=True)
    refused(run(3, 6), r"training\.per_device_train_batch_size")
    run(3, 6).train(resume_from_checkpoint=True, allow_changed=["training.per_device_train_batch_size"])
    assert torch.isfinite(parameters(again)).all()


def test_the_kernel_that_decoded_stands_in_the_checkpoint_and_resumes(tmp_path):
    def run(steps: int, **rollout: Any) -> RLHFTrainer:
        return trainer(tmp_path, rollout={**SAMPLED, **rollout}, training={**STEPS, "max_steps": steps})

    run(4).train()
    saved = checkpoint_manifest.read_manifest(tmp_path / "checkpoint-4")["algorithm"]
    assert saved["rollout"]["kernel"] == "lean"
    refused(run(5, kernel="model"), "rollout.kernel")
    older = {**saved, "rollout": {name: x for name, x in saved["rollout"].items() if name != "kernel"}}
    assert checkpoint_manifest.differences(older, saved) == ["rollout.kernel: 'model' in the checkpoint, 'lean' now"]
    assert run(5, kernel="lean").train(resume_from_checkpoint=True).global_step == 5
