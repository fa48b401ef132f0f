"""`training.fsdp` on two processes: the parameters of one process, resumed on any number, half of the bytes on each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_rlhf import load_recipe
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.training.memory.estimate import estimate
from hf_rlhf.training.planner.layouts import placed
from tests.helpers import stepping
from tests.helpers.paths import environment
from tests.helpers.processes import run_ranks
from tests.helpers.waits import scaled
from tests.processes.test_invariance import DATA, FULL

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 0.1}
WITHOUT_CRITIC = {name: x for name, x in FULL.items() if name not in ("critic", "advantages")}
TEXTS = {"use": "ptx", "path": str(DATA / "texts.txt"), "rows": 3, "max_tokens": 64}
THREE = {**stepping.SCRIPTED, "prompts": 3}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a value head, Adam, clipping": {"algorithm": FULL, "training": ADAM},
    "a separate critic": {"algorithm": {**FULL, "critic": {"use": "separate", "coef": 0.3}}},
    "micro-batches of unequal number": {
        "algorithm": FULL,
        "prompts": 7,
        "training": {"per_device_train_batch_size": 3},
    },
    "a process without rows": {
        "algorithm": {**FULL, "rollout": THREE},
        "update": {"mini_batches": 3, "epochs": 1},
    },
    "an adapter": {"algorithm": {**WITHOUT_CRITIC, "reference": "adapter_off"}, "lora": True},
    "a moving reference": {"algorithm": {**FULL, "reference": {"use": "ema", "decay": 0.9}}},
    "whole distributions": {"algorithm": {"kl": [{"use": "in_loss", "estimator": "exact"}], "reference": "frozen"}},
    "texts beside a critic": {"algorithm": {**FULL, "loss_terms": [TEXTS]}},
    "layers that stay whole": {"training": {"fsdp_config": {"reshard_after_forward": False}}},
    "gradient checkpointing": {"training": {"fsdp_config": {"activation_checkpointing": True}}},
    "padded rows": {"update": {"mini_batches": 2, "epochs": 2, "attention": "padded"}},
    "a sampled rollout": {
        "algorithm": {
            "rollout": {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 6},
            "rewards": [{"use": "format", "pattern": ".*[a-f].*"}],
            "advantages": "reinforce",
        }
    },
}


def specification(folder: Path, name: str, sharded: bool = False, **more: Any) -> dict[str, Any]:
    chosen = {"algorithm": {}, "update": {"mini_batches": 2, "epochs": 2}, "training": {}, **RUNS[name]}
    own = {k: v for k, v in chosen["training"].items() if sharded or k != "fsdp_config"}
    training = {**own, **({"fsdp": True} if sharded else {}), **more}
    return {**chosen, "training": training, "output_dir": str(folder / name.replace(" ", "-"))}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Name -> the parameters after a run on two processes that shard it."""
    folder = tmp_path_factory.mktemp("sharded")
    specs = {name: specification(folder, name, sharded=True) for name in RUNS}
    return stepping.finish(stepping.start(specs, folder / "run", processes=2), folder / "run")


@pytest.mark.parametrize("name", [x for x in RUNS if x != "a sampled rollout"])
def test_two_processes_that_shard_give_the_parameters_of_one(name, sharded, tmp_path):
    trainer = stepping.make_trainer(specification(tmp_path, name))
    begin = stepping.parameters(trainer)
    trainer.train()
    end = stepping.parameters(trainer)
    trainer.close()
    assert (end - begin).norm() > 1e-3
    assert (end - sharded[name]).norm() <= 1e-12 * (end - begin).norm()


def test_a_sharded_policy_samples_as_two_whole_ones_do(sharded, tmp_path):
    spec = specification(tmp_path, "a sampled rollout")
    whole = stepping.finish(stepping.start({"whole": spec}, tmp_path / "run", processes=2), tmp_path / "run")["whole"]
    begin = stepping.parameters(stepping.make_trainer({**spec, "output_dir": str(tmp_path / "begin")}))
    assert (whole - begin).norm() > 1e-3
    assert (whole - sharded["a sampled rollout"]).norm() <= 1e-12 * (whole - begin).norm()


def on(processes: int, spec: dict[str, Any], folder: Path, **options: Any) -> torch.Tensor:
    return stepping.finish(stepping.start({"it": spec}, folder, processes, **options), folder)["it"]


@pytest.mark.parametrize("name", ["a value head, Adam, clipping", "an adapter", "a moving reference"])
def test_any_number_of_processes_resumes_a_checkpoint_of_any_other(name, tmp_path):
    """One process, two that shard, one again; and two that shard go on inside a rollout."""

    def spec(folder: str, sharded: bool = False) -> dict[str, Any]:
        made = specification(tmp_path / folder, name, sharded, **ADAM, max_steps=12)
        return {**made, "update": {"mini_batches": 2, "epochs": 2, "ema": 0.9}}

    begin = stepping.parameters(stepping.make_trainer(spec("begin")))
    straight = stepping.run(spec("straight"))
    stepping.run(spec("changing"), stop=4)
    on(2, spec("changing", sharded=True), tmp_path / "second", resume=True, stop=8)
    assert (stepping.run(spec("changing"), resume=True) - straight).norm() <= 1e-12 * (straight - begin).norm()
    on(2, spec("inside", sharded=True), tmp_path / "third", stop=6)
    found = on(2, spec("inside", sharded=True), tmp_path / "fourth", resume=True)
    assert (found - straight).norm() <= 1e-12 * (straight - begin).norm()


MEASURED = """
import json, os, sys, torch
from tests.helpers import stepping
from hf_rlhf.modeling.sharding import local, whole
spec = json.loads({spec!r})
torch.set_num_threads(1)
trainer = stepping.make_trainer(spec)
trainer.train()
held = {{"weights": sum(local(p).nbytes for p in trainer.actor_critic.parameters())}}
held["state"] = sum(local(x).nbytes for s in trainer.optimizer.state.values() for x in s.values() if x.dim())
held["all"] = sum(p.nbytes for p in trainer.actor_critic.parameters())
held["twin"] = sum(0 if p.is_meta else p.nbytes for p in trainer.whole.model.parameters())
trainer.save_model()
print("HELD" + json.dumps(held))
path = spec["output_dir"] + f"/whole-{{trainer.args.process_index}}.pt"
torch.save({{name: whole(p.detach()) for name, p in trainer.model.named_parameters()}}, path)
trainer.close()
sys.stdout.flush()
os._exit(0)
"""


def test_each_process_holds_half_and_what_is_saved_is_a_plain_model(tmp_path):
    spec = specification(tmp_path, "a value head, Adam, clipping", sharded=True)
    spec["update"] = {"mini_batches": 2, "epochs": 2, "ema": 0.9}
    printed = run_ranks(MEASURED.format(spec=json.dumps(spec)))
    bounded = {**FULL, "rollout": RUNS["a sampled rollout"]["algorithm"]["rollout"]}
    alone = stepping.make_trainer({"algorithm": bounded, "update": {}, "training": ADAM, "output_dir": str(tmp_path)})
    two = placed(alone.args, 2, "cpu", sharded=True)
    forecast = estimate(Model(), alone.algorithm, two, model=alone.model, prompt_tokens=5).phases["update"]
    for text in printed:
        held = json.loads(next(line for line in text.splitlines() if line.startswith("HELD"))[4:])
        assert held["weights"] <= 0.51 * held["all"]
        assert held["state"] <= 2 * 0.51 * held["all"]
        assert held["twin"] == 0
        assert held["weights"] == pytest.approx(forecast["weights"] * MIB, rel=0.15)
        assert held["state"] == pytest.approx(forecast["optimizer"] * MIB, rel=0.15)
    folder = Path(spec["output_dir"])
    weights = torch.load(folder / "whole-0.pt")
    for model, same in ((folder, True), (folder / "ema", False)):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        gap = max(float((p.detach() - weights[name]).abs().max()) for name, p in loaded.named_parameters())
        assert (gap == 0) is same


COUNTED = """
import json, os, sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from hf_rlhf import testing
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.modeling.sharding import local
from hf_rlhf.training.memory.estimate import estimate
from tests.helpers import stepping
from tests.helpers.live_tensors import LiveTensors
torch.set_num_threads(1)
def wide(seed, dtype):
    _, tokenizer = testing.tiny_policy(seed=seed, dtype=dtype)
    sizes = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, vocab_size=len(tokenizer))
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=4)), tokenizer
stepping.tiny_policy = wide
trainer = stepping.make_trainer(json.loads({spec!r}))
before = 2 * sum(local(p).nbytes for p in trainer.actor_critic.parameters())  # the reference is as large
with LiveTensors() as live:
    trainer.train()
forecast = estimate(Model(), trainer.algorithm, trainer.args, model=trainer.whole.model, prompt_tokens=5)
peak = max(sum(parts.values()) for parts in forecast.phases.values()) * 2**20
print("RATIO", peak / (before + live.peak))
trainer.close()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_the_forecast_is_near_the_bytes_of_tensors_that_each_of_two_processes_holds_at_the_peak(tmp_path):
    rollout = {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 24, "kernel": "model"}
    chosen = {**RUNS["a sampled rollout"]["algorithm"], "rollout": rollout, "reference": "frozen"}
    algorithm = {**chosen, "kl": [{"use": "in_loss", "estimator": "k3"}]}
    training = {"optim": "adamw_torch", "max_steps": 3, "fsdp": True}
    spec = {"algorithm": algorithm, "update": {}, "dtype": "float32", "training": training, "output_dir": str(tmp_path)}
    for text in run_ranks(COUNTED.format(spec=json.dumps(spec))):
        assert 0.85 < float(re.search(r"^RATIO (.*)$", text, re.M)[1]) < 1.15


def test_a_launcher_asks_for_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    spec = specification(tmp_path, "a value head, Adam, clipping")
    printed = run_ranks(MEASURED.format(spec=json.dumps(spec)))
    held = json.loads(next(line for line in printed[0].splitlines() if line.startswith("HELD"))[4:])
    assert held["weights"] <= 0.51 * held["all"]


def test_the_command_starts_processes_that_shard(tmp_path):
    words = ["train", "quickstart", "--nproc", "2", "--fsdp=true", "--max-steps", "1", "rollout.prompts=4"]
    words += ["evaluation.prompts=4", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "hf_rlhf", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=scaled(300),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "over 2 processes, each with a part of the weights" in done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one process": ({}, "this run has one. Start several"),
    "trpo": ({"algorithm": {"optimizer": "trpo", "policy_loss": "surrogate"}}, "optimizer=trpo reads whole gradients"),
    "adafactor": ({"training": {"optim": "adafactor"}}, "training.optim=adafactor reads whole weights"),
    "offload": ({"update": {"mini_batches": 2, "epochs": 2, "offload": True}}, "update.offload would move"),
    "cpu_offload": ({"training": {"fsdp_config": {"cpu_offload": True}}}, "fsdp_config.cpu_offload must be false, got"),
    "a key": ({"training": {"fsdp_config": {"forward_prefetch": True}}}, "fsdp_config may have reshard_after_forward"),
    "the first version": (
        {"training": {"fsdp_config": {"version": 2, "min_num_params": 5}}},
        "min_num_params must be 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sharded_is_refused_by_name(case, tmp_path):
    changes, words = REFUSED[case]
    spec = {"algorithm": {}, "update": {"mini_batches": 2, "epochs": 2}, "output_dir": str(tmp_path), **changes}
    spec["training"] = {"fsdp": True, **spec.get("training", {})}
    with pytest.raises(ValueError, match=re.escape(words)):
        stepping.make_trainer(spec)


def test_deepspeed_is_refused_with_what_to_write_instead_where_its_package_is_missing():
    with pytest.raises(UserError, match=r"ZeRO-3 empties weights .* set training\.fsdp=true"):
        load_recipe("quickstart", ["training.deepspeed=zero3.json"]).training_arguments("unused")
