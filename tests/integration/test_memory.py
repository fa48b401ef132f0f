"""Memory of a run: measured peaks of its phases, and their forecast."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.metrics.aggregator import MetricAggregator
from hf_rlhf.runtime import peak_memory
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.memory import estimate
from hf_rlhf.training.memory.estimate import Estimate
from tests.helpers import runs
from tests.helpers.waits import until

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not peak_memory.ResidentMark.works(), reason="the kernel's mark cannot be set back here")


class Level:
    """The high-water mark of a number."""

    def __init__(self) -> None:
        self.now = self.most = 100
        self.watched = False

    def to(self, level: int) -> None:
        self.now, self.most = level, max(level, self.most)

    def take(self) -> tuple[int, int]:
        most, self.most = self.most, self.now
        return most, self.now

    def watch(self, on: bool) -> None:
        self.watched = on


# Measured


def test_a_phase_sees_its_own_peak_and_not_that_of_its_neighbours():
    level = Level()
    recorder = peak_memory.Recorder(level)
    level.to(900)
    level.to(100)
    with recorder.phase() as first:
        level.to(300)
        level.to(150)
    with recorder.phase() as second:
        level.to(200)
    assert (first.held, first.peak, first.above) == (100, 300, 200)
    assert (second.held, second.peak, second.above) == (150, 200, 50)
    assert recorder.largest() == 900


def test_phases_may_nest_and_overlap():
    level = Level()
    recorder = peak_memory.Recorder(level)
    outer, inner, beside = recorder.phase(), recorder.phase(), recorder.phase()
    a = outer.__enter__()
    level.to(400)
    level.to(100)
    b = inner.__enter__()
    level.to(250)
    c = beside.__enter__()
    level.to(300)
    outer.__exit__(None, None, None)  # ends before those that began in it
    level.to(500)
    inner.__exit__(None, None, None)
    assert level.watched
    beside.__exit__(None, None, None)
    assert [a.peak, b.peak, c.peak] == [400, 500, 500]
    assert [a.held, b.held, c.held] == [100, 100, 250]
    assert not level.watched


def test_an_error_in_a_phase_stays_and_the_phase_is_over():
    level = Level()
    recorder = peak_memory.Recorder(level)
    phases: list[peak_memory.Phase] = []

    def fails() -> None:
        with recorder.phase() as phase:
            phases.append(phase)
            level.to(200)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    level.to(700)
    recorder.largest()
    assert phases[0].peak == 200
    assert not level.watched


@linux
def test_the_kernel_tells_of_memory_that_was_freed_again():
    recorder = peak_memory.Recorder(peak_memory.ResidentMark())
    with recorder.phase() as phase:
        block = torch.ones(64 * peak_memory.MIB // 4)
        del block
    with recorder.phase() as after:
        pass
    assert 60 * peak_memory.MIB < phase.above < 70 * peak_memory.MIB
    assert after.above < 4 * peak_memory.MIB


def test_samples_see_what_lasts_longer_than_their_interval():
    recorder = peak_memory.Recorder(peak_memory.SampledMark(peak_memory.resident))
    with recorder.phase() as phase:
        block = torch.ones(64 * peak_memory.MIB // 4)
        time.sleep(20 * peak_memory.INTERVAL_S)
        del block
    assert 60 * peak_memory.MIB < phase.above < 70 * peak_memory.MIB
    until(lambda: "hf_rlhf-memory" not in {thread.name for thread in threading.enumerate()}, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_child_measures_itself():
    ours = peak_memory.recorder(CPU)
    child = os.fork()
    if child == 0:
        os._exit(0 if peak_memory.recorder(CPU) is not ours else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert peak_memory.recorder(CPU) is ours


def test_the_largest_of_an_entry_is_logged_and_the_next_starts_anew():
    meters, accelerator = MetricAggregator(), Accelerator(cpu=True)
    for x in (3.0, 7.0, 5.0):
        meters.peak("memory/update/peak", x)
    kept = meters.state_dict()
    assert meters.read(accelerator) == {"memory/update/peak": 7.0}
    assert meters.read(accelerator) == {}
    again = MetricAggregator()
    again.load_state_dict(kept)
    assert again.read(accelerator) == {"memory/update/peak": 7.0}


def test_plugins_are_not_told_of_memory():
    meters = MetricAggregator()
    mark = meters.mark()
    with meters.time("update"):
        pass
    assert not any(name.startswith("memory/") for name in meters.since(mark))


def test_every_phase_of_a_run_is_logged(tmp_path):
    made = runs.trained(tmp_path, kl=["in_loss"], reference="frozen", update={})
    for entry in runs.entries(made):
        for phase in ("rollout", "forward", "reward", "update"):
            peak, above = entry[f"memory/{phase}/peak"], entry[f"memory/{phase}/above"]
            assert 0 <= above < peak < made.meters.peak_memory(made.accelerator) + 1


# Forecast


def llama(**sizes: Any) -> Any:
    """Two layers, two heads of 16 numbers for keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    own |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**own, **sizes}))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=256, **ids))


def experts() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    more = {"num_key_value_heads": 2, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **more))


def adapted() -> Any:
    from peft import get_peft_model

    return get_peft_model(llama(), runs.adapter())


@pytest.mark.parametrize(
    ("make", "half"),
    [(llama, False), (llama, True), (gpt2, False), (gpt2, True), (adapted, False), (adapted, True), (experts, False)],
    ids=lambda x: x.__name__ if callable(x) else "autocast" if x else "float32",
)
def test_activations_are_near_what_a_real_forward_keeps(make, half):
    model, ids = make().train(), torch.zeros((8, 64), dtype=torch.long)
    kept: dict[int, torch.Tensor] = {}
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        estimate.trunk_of(model)(input_ids=ids, use_cache=False)
    forecast = ids.numel() * estimate.kept_per_token(model, half)
    forecast += half * sum(2 * p.numel() for p in estimate.trunk_of(model).parameters() if p.dim() > 1)
    assert forecast == pytest.approx(sum(x.untyped_storage().nbytes() for x in kept.values()), rel=0.35)


def test_a_tokens_keys_and_values_by_hand_and_as_transformers_caches_them():
    from transformers import DynamicCache

    model = llama()
    found = estimate.cache_per_token(model, False)
    assert (
        found == 2 * estimate.cache_per_token(model, True) == 2 * 2 * 2 * 16 * 4
    )  # keys and values, layers, heads, width
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros((1, 30), dtype=torch.long), past_key_values=cache, use_cache=True)
    assert sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) == 30 * found


@pytest.mark.parametrize("tokens", [16, 100])
def test_logits_are_held_a_chunk_at_a_time(tokens, monkeypatch):
    monkeypatch.setattr(estimate, "tokens_at_a_time", lambda vocabulary, device: tokens)
    assert estimate.logits_tile(llama(), 64, torch.device("cpu")) == 4 * 96 * min(tokens, 64)


def setting(processes: int = 1, device: str = "cpu", **parts: Any) -> dict[str, Any]:
    """Arguments of the estimate, as of one of several processes and on another device."""
    from transformers import TrainingArguments

    args = TrainingArguments("nowhere", use_cpu=True, report_to="none", **parts.pop("training", {}))
    placed = {"device": torch.device(device), "world_size": processes}
    args.__class__ = type("Placed", (TrainingArguments,), placed)
    algorithm = runs.recipe(**{"rollout": runs.SAMPLED, "update": {}, **parts}).algorithm()
    return {"a": algorithm, "args": args, "prompt_tokens": 20}


def on_gpu(**parts: Any) -> dict[str, Any]:
    return setting(device="cuda", **parts)


def of_model(model: Any, made: dict[str, Any], peft_config: Any = None) -> Estimate:
    return estimate.estimate(Model(), **made, model=model, peft_config=peft_config)


def of_llama(made: dict[str, Any], peft_config: Any = None, **sizes: Any) -> Estimate:
    return of_model(llama(**sizes), made, peft_config)


def test_weights_optimizer_reference_and_critic_by_hand():
    weights = estimate.tensor_bytes(llama()) / peak_memory.MIB
    trunk = sum(p.nbytes for p in llama().base_model.parameters()) / peak_memory.MIB
    plain = of_llama(setting()).phases["update"]
    full = of_llama(setting(kl=["in_reward"], reference="frozen", critic="separate", advantages="gae")).phases["update"]
    parameters = 4 * sum(p.numel() for p in llama().parameters()) / peak_memory.MIB
    assert plain["weights"] == full["weights"] == weights
    assert full["reference"] == pytest.approx(weights, rel=1e-3)
    assert plain["optimizer"] == pytest.approx(2 * parameters)
    assert plain["gradients"] <= parameters
    assert full["critic"] == pytest.approx(trunk)
    assert full["optimizer"] == pytest.approx(plain["optimizer"] + 2 * trunk)
    assert not {"reference", "critic"} & plain.keys()


def test_tied_weights_count_once():
    tied, untied = (estimate.tensor_bytes(llama(tie_word_embeddings=tie)) for tie in (True, False))
    assert untied - tied == 4 * 96 * 64


def test_the_parts_of_an_update_by_hand():
    """24 completion tokens of each of 4 rows of each of 4 prompts in one micro-batch, a prompt once."""
    found = {part: size * peak_memory.MIB for part, size in of_llama(setting()).phases["update"].items()}
    rollout = setting()["a"].rollout
    per_row = rollout.max_new_tokens
    tokens = rollout.prompts * (20 + rollout.num_generations * per_row)
    sampled = rollout.prompts * rollout.num_generations * per_row
    rows = setting()["args"].per_device_train_batch_size
    batch = min(rows, rollout.prompts * rollout.num_generations) / (rollout.prompts * rollout.num_generations)
    kept = estimate.kept_per_token(llama(), False)
    assert found["activations"] == pytest.approx(batch * tokens * kept)
    assert found["backward"] == pytest.approx(batch * tokens * kept / 2 + 2 * 4 * 96 * batch * sampled)
    assert found["gradients"] == sum(p.nbytes for p in llama().parameters())


@pytest.mark.parametrize(
    ("optim", "factor"),
    [("adamw_torch", 2), ("adamw_torch_fused", 2), ("sgd", 0), ("adamw_bnb_8bit", 0.5), ("rmsprop", 1)],
)
def test_the_state_of_an_optimizer_by_hand(optim, factor):
    notes: list[str] = []
    assert estimate.optimizer_bytes(optim, 400, notes) == factor * 400
    assert not notes


def test_an_optimizer_that_is_not_known_is_named():
    notes: list[str] = []
    assert estimate.optimizer_bytes("lomo", 400, notes) == 0
    assert notes == ["without the state of training.optim=lomo"]


def test_an_adapter_has_the_only_gradients():
    made, adapter = setting(), runs.adapter()
    found = of_llama(made, adapter).phases["update"]
    from peft import get_peft_model

    model = get_peft_model(llama(), adapter)
    trained = estimate.tensor_bytes(model, trainable=True) / peak_memory.MIB
    assert found["weights"] == estimate.tensor_bytes(model) / peak_memory.MIB
    assert found["optimizer"] == pytest.approx(2 * trained)
    assert found.get("gradients", 0) <= trained


def test_checkpointing_and_smaller_micro_batches_hold_less():
    plain = of_llama(setting()).phases["update"]["activations"]
    checkpointed = of_llama(setting(training={"gradient_checkpointing": True})).phases["update"]["activations"]
    bounded = of_llama(setting(update={"max_tokens_per_micro_batch": 60})).phases["update"]["activations"]
    assert checkpointed < plain / 2
    assert bounded < plain


def test_a_micro_batch_holds_whole_groups_or_a_part_of_one():
    rollout = setting()["a"].rollout
    group, length = rollout.num_generations, rollout.max_new_tokens
    made = setting(
        update={"max_tokens_per_micro_batch": 2 * 20 + (group + 1) * length},  # of one row of the next group, too
        training={"per_device_train_batch_size": 2 * group},
    )
    found = of_llama(made).phases["update"]["activations"] * peak_memory.MIB
    assert found == pytest.approx((20 + group * length) * estimate.kept_per_token(llama(), False))


def test_several_processes_share_the_prompts_and_hold_buckets():
    one, two = of_llama(setting()).phases, of_llama(setting(processes=2)).phases
    assert two["rollout"]["cache"] == one["rollout"]["cache"] / 2
    assert two["update"]["gradient buckets"] == pytest.approx(one["update"]["optimizer"] / 2)


def test_the_cache_has_room_for_completions_as_the_rollout_engine_gives_it():
    from hf_rlhf_plugins.rollout import _decoding, _layouts

    assert (estimate.GROWTH, estimate.PREFILL) == (_layouts.GROWTH, _decoding.PREFILL)
    for length, room in ((65, 64), (66, 128), (129, 128), (501, 512)):  # the last token is not cached
        made = setting(rollout={**runs.SAMPLED, "max_new_tokens": length})
        engine, cached = made["a"].rollout, estimate.cache_per_token(llama(), False)
        tokens = engine.prompts * (20 + engine.num_generations * room)
        assert of_llama(made).phases["rollout"]["cache"] * peak_memory.MIB == tokens * cached


def test_an_episode_is_as_long_as_its_environment_allows_and_as_many_tokens_are_sampled_as_its_turns():
    """24 tokens of a turn at most; 100 of an episode, of which 2 turns sample 48."""
    rollout = {**runs.SAMPLED, "max_new_tokens": 24}
    play = [{"use": "second_chance", "max_tokens": 100, "max_turns": 2}]
    whole = setting(rollout={**rollout, "max_new_tokens": 100})
    for name, made in (("100", whole), ("24", setting(rollout=rollout))):
        assert made["a"].completion_bounds == {"rollout.max_new_tokens": int(name)}
        assert made["a"].longest_turn(20) == 20
    made = setting(rollout=rollout, environment=play, rewards=["episode"])
    assert made["a"].completion_bounds == {"environment.0.max_tokens": 100}
    assert (made["a"].longest_turn(20), made["a"].longest_turn(None)) == (96, None)
    found, longer, shorter = (of_llama(x).phases for x in (made, whole, setting(rollout=rollout)))
    assert found["rollout"]["cache"] == longer["rollout"]["cache"] > shorter["rollout"]["cache"]
    assert found["update"]["activations"] == longer["update"]["activations"] > shorter["update"]["activations"]
    assert shorter["update"]["backward"] < found["update"]["backward"] <= longer["update"]["backward"]
    some = setting(rollout=rollout, environment=[{**play[0], "when": {"answer": "5"}, "max_tokens": 8}])
    assert some["a"].completion_bounds == {"rollout.max_new_tokens": 24, "environment.0.max_tokens": 8}
    assert of_llama(some).phases == shorter


def test_short_completions_leave_the_prefill_as_the_peak_of_a_rollout():
    made = setting(rollout={**runs.SAMPLED, "max_new_tokens": 2})
    found, tokens = of_llama(made).phases["rollout"], 20 * made["a"].rollout.prompts
    assert found["cache"] * peak_memory.MIB == 2 * tokens * estimate.cache_per_token(llama(), False)
    assert found["layers"] * peak_memory.MIB == pytest.approx(estimate.layer_bytes(llama(), False, tokens))
    assert "logits" not in found


def test_the_model_that_is_given_stays_as_it_is():
    model = llama().eval()
    before = runs.parameters(model)
    of_model(model, setting(training={"gradient_checkpointing": True}))
    assert torch.equal(runs.parameters(model), before)
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())


def test_a_name_a_folder_and_a_model_give_the_same(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    made = setting()
    named = estimate.estimate(Model(path=str(tmp_path)), **made)
    given = of_model(model, made)
    assert named.phases == given.phases
    assert list(named.phases) == ["rollout", "update"]


def test_without_a_configuration_the_plan_says_why():
    found = estimate.estimate(Model(path="nobody/nothing-of-the-kind"), **setting())
    assert not found.phases
    assert re.match("not estimated: .*(nobody/nothing-of-the-kind|cache)", found.notes[0])
    (note,) = of_llama(setting(rollout=runs.SCRIPTED)).notes
    assert note == "not estimated: rollout=scripted does not bound its completions"


def test_what_is_assumed_of_prompts_is_said_and_fits_the_context():
    made = setting() | {"prompt_tokens": None}
    found = of_llama(made, max_position_embeddings=64)
    assert found.notes == ["prompts of 59 tokens are assumed: dataset.max_prompt_tokens sets a bound"]


def test_the_plan_prints_sums_of_parts():
    from hf_rlhf.config.plan import Plan, memory_rows

    plan = Plan(plugins=[], memory={"update": {"weights": 1000.2, "tiny": 0.2, "gradients": 500.4}}, memory_notes=["n"])
    assert memory_rows(plan) == ["update: 1,501 = weights 1,000, gradients 500", "n"]


def test_tiny_policies_can_be_estimated(tmp_path):
    model, _ = tiny_policy()
    found = of_model(model, setting())
    assert peak(found, "update") > peak(found, "rollout") > 0


# Offloaded


def peak(found: Estimate, phase: str) -> float:
    return sum(found.phases[phase].values())


def of_phases(found: Estimate, part: str) -> set[str]:
    """The phases in which a part is there."""
    return {phase for phase, sizes in found.phases.items() if part in sizes}


PPO: dict[str, Any] = {"kl": ["in_reward"], "advantages": "gae"}


def test_on_a_cpu_nothing_is_offloaded():
    here, away = (
        setting(**PPO, critic={"use": "separate", "offload": x}, update={"offload": x}) for x in (False, True)
    )
    assert of_llama(here).phases == of_llama(away).phases


def test_what_is_offloaded_counts_in_the_phases_that_read_it():
    here = of_llama(on_gpu(**PPO, reference="frozen", critic="separate"))
    own = {"reference": {"use": "frozen", "offload": True}, "critic": {"use": "separate", "offload": True}}
    away = of_llama(on_gpu(**PPO, **own, update={"offload": True}))
    for part in ("reference", "critic", "optimizer"):
        assert of_phases(here, part) == {"rollout", "forward", "update"}
    assert of_phases(away, "reference") | of_phases(away, "critic") == {"forward", "update"}
    assert "reference" not in away.phases["update"]
    assert of_phases(away, "optimizer") <= {"update"}
    less = sum(here.phases["rollout"][part] for part in ("reference", "critic", "optimizer"))
    assert peak(away, "rollout") == pytest.approx(peak(here, "rollout") - less)
    assert len({"critic", "reference"} & away.phases["forward"].keys()) == 1, "one after the other"


def test_the_update_is_the_larger_of_its_backward_and_the_optimizers_step():
    one = of_llama(on_gpu(update={"offload": True})).phases["update"]
    two = of_llama(on_gpu(update={"offload": True, "epochs": 2})).phases["update"]
    plain = of_llama(on_gpu()).phases["update"]
    assert "optimizer" not in one, "activations are more than the state"
    assert two == plain, "from the second step on the state is there"
    small = {"max_tokens_per_micro_batch": 30, "offload": True}
    step = of_llama(on_gpu(update=small, rollout={**runs.SAMPLED, "max_new_tokens": 2}), hidden_size=128).phases[
        "update"
    ]
    assert {"optimizer", "gradients"} <= step.keys()
    assert "activations" not in step


def test_a_critic_that_is_offloaded_takes_its_own_state_along():
    critic = {"use": "separate", "offload": True}
    away = of_llama(on_gpu(**PPO, reference="frozen", critic=critic)).phases
    weights = 4 * sum(p.numel() for p in llama().parameters()) / peak_memory.MIB
    trunk = 4 * sum(p.numel() for p in llama().base_model.parameters()) / peak_memory.MIB
    assert away["rollout"]["optimizer"] == pytest.approx(2 * weights)
    assert away["update"].get("optimizer") in (pytest.approx(2 * weights), pytest.approx(2 * (weights + trunk)))
    assert "critic" not in away["rollout"]
    assert away["update"]["critic"] == pytest.approx(trunk, rel=1e-3)


def test_a_reference_over_whole_distributions_is_there_in_the_update():
    def found(estimator: str) -> set[str]:
        kl = {"use": "in_loss", "estimator": estimator}
        return of_phases(of_llama(on_gpu(kl=[kl], reference={"use": "frozen", "offload": True})), "reference")

    assert found("k3") == {"forward"}
    assert found("exact") == {"forward", "update"}


def test_the_reference_of_an_adapter_shares_the_base():
    found = of_llama(on_gpu(kl=["in_loss"], reference="frozen"), runs.adapter()).phases["update"]
    from peft import get_peft_model

    trained = estimate.tensor_bytes(get_peft_model(llama(), runs.adapter()), trainable=True) / peak_memory.MIB
    assert found["reference"] == pytest.approx(trained, abs=0.01)


def test_offloaded_reward_models_are_there_to_score(tmp_path):
    path = runs.save_classifier(tmp_path)

    def found(**settings: Any) -> Estimate:
        return of_llama(on_gpu(rewards=[{"use": "reward_model", "model": path, **settings}]))

    assert of_phases(found(), "reward models") == {"rollout", "reward", "update"}
    away = found(offload=True)
    assert of_phases(away, "reward models") == {"reward"}
    assert "the phase reward is without what the forwards of reward models take" in away.notes
