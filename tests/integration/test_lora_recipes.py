"""Every packaged recipe trains on an adapter when `model.lora` is set: the base stays as it was, and is not held twice.

Recipes that together name every plugin that any of them names are run with the other tests; the rest are marked `slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.axes import TrainedCritic
from hf_rlhf.cli.runs.run import check
from hf_rlhf.config.overrides import apply_overrides
from hf_rlhf.config.pipeline import is_pipeline
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe, read_recipe, resolve
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.offline.setup import make_trainer
from tests.helpers import offline_runs as off
from tests.helpers import runs
from tests.helpers import sft_runs as sft
from tests.helpers.paths import ROOT
from tests.helpers.tiers import tiers
from tests.integration.test_matrix import save_token_classifier

pytest.importorskip("peft")

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
WITHOUT_ROLLOUTS = [name for name in NAMES if not is_pipeline(name) and "trainer" in read_recipe(name)]
WITH_ROLLOUTS = [name for name in NAMES if not is_pipeline(name) and "trainer" not in read_recipe(name)]
SEPARATE = [name for name in WITH_ROLLOUTS if (read_recipe(name).get("critic") or {}).get("use") == "separate"]


def read(names: list[str]) -> dict[str, Any]:
    """Recipes as they are written, by name."""
    return {name: read_recipe(name) for name in names}


LORA = "model.lora={r: 2}"
STEP = ("training.learning_rate=0.01", "training.warmup_steps=0", "training.max_steps=1", "training.use_cpu=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy and reward models with its tokenizer, on disk."""
    made = tmp_path_factory.mktemp("lora")
    off.save_model(made / "model", dtype=torch.float32)
    for part in runs.tiny_policy(seed=1):
        part.save_pretrained(made / "teacher")
    runs.save_classifier(made / "reward_model")
    save_token_classifier(made / "token_reward_model")
    save_token_classifier(made / "process_reward_model")
    return made


def small(name: str, folder: Path, *words: str) -> Any:
    """The recipe with a small rollout over the tiny policy, and a reward beside its own that differs between completions."""
    raw = read_recipe(name)
    for reward in raw["rewards"]:
        if reward["use"] in ("reward_model", "token_reward_model", "process_reward_model"):
            reward["model"] = str(folder / reward["use"])
        elif reward["use"] == "math_answer":
            reward["workers"] = "inline"
    raw["rollout"] |= {"prompts": 2, "num_generations": 4, "max_new_tokens": 6}
    if raw["rollout"]["use"] == "mixed":  # which no reward may train
        raw["rollout"]["column"] = "answer"
    else:
        raw["rewards"].append(runs.FORMAT)
    if "context" in (raw.get("reference") or {}):
        raw["reference"] |= {"context": "answer", "of": {"use": "sync", "mixing": 1.0}}  # factors are not mixed
    elif (raw.get("reference") or {}).get("use") == "model":
        raw["reference"]["path"] = str(folder / "teacher")
    raw["update"] = {"max_tokens_per_micro_batch": 512, "mini_batches": 1, "epochs": 1} | (
        {"ema": raw["update"]["ema"]} if "ema" in raw["update"] else {}
    )
    critic = ["critic.warmup_steps=0"] if "warmup_steps" in (raw.get("critic") or {}) else []
    changed, _ = apply_overrides(raw, [f"model.path={folder / 'model'}", LORA, *critic, *STEP, *words])
    return resolve(changed, name=name)


def stepped(recipe: Any, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A trainer after one optimizer step of the recipe, and all parameters before it."""
    from transformers import PrinterCallback, TrainingArguments

    from hf_rlhf import RLHFTrainer

    settings = {**recipe.training_keywords(str(folder)), "save_strategy": "no", "report_to": "none"}
    args = TrainingArguments(**{**settings, "disable_tqdm": True, "lr_scheduler_type": "constant"})
    made = RLHFTrainer(None, recipe, args, train_dataset=runs.problems(played=True), processing_class=tiny_policy()[1])
    made.remove_callback(PrinterCallback)
    before = copied(made.actor_critic)
    made.train()
    made.close()
    return made, before


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, x in after.items() if not torch.equal(x, before[name])}


@pytest.mark.parametrize("name", tiers(read(WITH_ROLLOUTS)))
def test_a_recipe_trains_the_adapter_and_the_critic_alone(name: str, folder: Path, tmp_path: Path):
    made, before = stepped(small(name, folder), tmp_path)
    moved = changed(before, copied(made.actor_critic))
    assert any(".lora_" in name for name in moved if name.startswith("policy."))
    assert all(".lora_" in name for name in moved if name.startswith("policy."))
    assert isinstance(made.algorithm.critic, TrainedCritic) == any(name.startswith("critic.") for name in moved)
    reference = made.collector.forwards.reference
    if reference is not None:
        has_own = made.algorithm.reference.moves or made.algorithm.reference.name == "model"
        assert (reference.own is not None) == has_own


@pytest.mark.parametrize("name", tiers(read(SEPARATE)))
def test_the_critic_of_a_recipe_may_be_a_second_adapter_or_a_head(name: str, folder: Path, tmp_path: Path):
    weights = {}
    for kind, critic in {
        "adapter": "critic={use: separate, adapter: true}",
        "head": "critic={use: value_head}",
    }.items():
        made, before = stepped(small(name, folder, critic), tmp_path / kind)
        moved = changed(before, copied(made.actor_critic))
        assert all(".lora_" in name for name in moved if name.startswith("policy."))
        assert any(name.startswith("critic.") for name in moved)
        weights[kind] = sum(p.numel() for p in made.actor_critic.critic.parameters())
    base = sum(p.numel() for p in made.model.get_base_model().parameters())
    assert weights["head"] < weights["adapter"] < base / 4


@pytest.mark.parametrize("name", tiers(read(WITHOUT_ROLLOUTS)))
def test_a_recipe_without_rollouts_trains_the_adapter_and_a_classifiers_head_alone(
    name: str, folder: Path, tmp_path: Path
):
    kind = read_recipe(name)["trainer"]["use"]
    given = sft.rows() if kind == "sft" else off.rows("reward_model" if kind == "dpo" else kind)
    data = off.write(tmp_path / "rows.jsonl", given)
    words = [f"model.path={folder / 'model'}", f"dataset.path={data}", "dataset.held_out=0", LORA, *STEP]
    recipe = load_recipe(name, [*words, "training.per_device_train_batch_size=4"])
    assert isinstance(recipe, OfflineRecipe)
    made = make_trainer(recipe, str(tmp_path / "out"))
    before = copied(made.model)
    made.train()
    moved = changed(before, copied(made.model))
    assert any(".lora_" in name for name in moved)
    assert all(".lora_" in name or "modules_to_save" in name for name in moved)
    assert getattr(made, "ref_model", None) is None


# What the plan says


def remarks(*words: str, **parts: Any) -> str:
    raw = {**runs.BASE, "rollout": runs.SAMPLED, "model": {"lora": {"r": 2}}, **parts}
    raw.pop("reference")
    return "\n".join(check(resolve(apply_overrides(raw, words)[0])).remarks)


def test_a_critic_that_is_a_second_model_is_named():
    gae = {"advantages": "gae", "critic": {"use": "separate"}}
    assert "critic=separate: trains a whole second model; critic.adapter=true" in remarks(**gae)
    assert "second model" not in remarks("critic.adapter=true", **gae)
    assert "second model" not in remarks(advantages="gae", critic="value_head")


def test_the_reference_is_the_base_unless_the_recipe_names_another():
    kl: dict[str, Any] = {"kl": [{"use": "in_loss"}]}
    raw = {**runs.BASE, "rollout": runs.SAMPLED, "model": {"lora": {"r": 2}}, **kl}
    named = resolve(raw | {"reference": "frozen"})
    raw.pop("reference")
    assert [resolve(raw).algorithm().reference.name, named.algorithm().reference.name] == ["adapter_off", "frozen"]
    for name in WITH_ROLLOUTS:
        reads = "ref_logps" in load_recipe(name).algorithm().needs
        given = "reference" in read_recipe(name)
        assert given or load_recipe(name, [LORA]).algorithm().reference.name == ("adapter_off" if reads else "none")


@pytest.mark.parametrize("use", ["frozen", "sync"])
def test_a_copy_of_an_adapted_policy_holds_the_adapter_alone(use: str, tmp_path: Path):
    made = runs.trainer(tmp_path, lora=True, kl=[{"use": "in_loss"}], reference=use)
    own = made.collector.forwards.reference.own
    base = {p.data_ptr() for p in made.model.parameters() if not p.requires_grad}
    apart = {name for name, p in own.named_parameters() if p.data_ptr() not in base}
    assert apart
    assert all(".lora_" in name for name in apart)
    made.close()
