"""What is offloaded: tensors that lie elsewhere while nothing reads them, and runs that train the same bits with them."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_rlhf import load_plugin
from hf_rlhf.cli.runs.run import check
from hf_rlhf.modeling import offload
from hf_rlhf.modeling.offload import Keeper, ToMainMemory, keeper, tensors_of
from hf_rlhf.modeling.policy import ActorCritic
from hf_rlhf.runtime.checkpoint_manifest import check_same_run, differences
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training import device_phases, offload_checks
from tests.helpers import runs

CPU = torch.device("cpu")
EXACT_KL = {"use": "in_loss", "estimator": "exact", "beta": 0.5}
KL = {"use": "in_loss", "estimator": "k3", "beta": 0.5}
SYNC = {"use": "sync", "every": 2, "mixing": 0.5}


def way(tensors: Callable[[], Any]) -> ToMainMemory:
    """As from a GPU: main memory beside main memory."""
    return ToMainMemory(tensors, CPU, changes=True)


def mixed() -> list[Tensor]:
    """Tensors of several formats, shapes and orders of dimensions."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 5, 7, generator=draw), torch.randn(4, 6, generator=draw).t(), torch.tensor(2.5)]
    made += [torch.randn(9, generator=draw).to(torch.bfloat16), torch.arange(11), torch.randn(2, 2).double()]
    return [*made, nn.Parameter(torch.randn(33, generator=draw)), torch.tensor([True, False])]


# Tensors


def test_a_tensor_stays_the_object_that_it_is_with_the_numbers_that_it_has():
    tensors = mixed()
    kept = [(x.detach().clone(), x.stride(), x.dtype, x.requires_grad) for x in tensors]
    held = way(lambda: tensors)
    for _ in range(2):
        for move in (held.offload, held.load):
            move()
            for x, (was, stride, dtype, learns) in zip(tensors, kept, strict=True):
                assert torch.equal(x, was)
                assert (x.stride(), x.dtype, x.requires_grad) == (stride, dtype, learns)
    assert held.offloaded_bytes() == sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("where", ["there", "away"])
def test_what_changes_in_either_place_stays_changed(where):
    x = torch.zeros(5)
    held = way(lambda: [x])
    held.offload()
    for turn in range(1, 4):
        if where == "there":
            with held.on_device():
                x.add_(1)
        else:
            x.add_(1)
            held.offload()
        assert x.tolist() == [turn] * 5
    held.load()
    assert x.tolist() == [3] * 5


def test_tensors_that_are_new_or_others_are_taken_along():
    tensors = [torch.ones(4)]
    held = way(lambda: tensors)
    held.offload()
    tensors.append(torch.full((2,), 7.0))
    held.offload()
    assert held.offloaded_bytes() == 4 * (4 + 2)
    tensors[0] = torch.full((3,), 5.0)
    held.load()
    held.offload()
    assert held.offloaded_bytes() == 4 * (3 + 2)
    assert [x.tolist() for x in tensors] == [[5, 5, 5], [7, 7]]


def test_main_memory_holds_what_the_device_holds_a_copy_of():
    layer = nn.Linear(3, 2)
    held = ToMainMemory(tensors_of(layer), CPU)
    first = layer.weight.data_ptr()
    held.offload()
    home = layer.weight.data_ptr()
    with held.on_device():
        there = layer.weight.data_ptr()
    assert len({first, home, there}) == 3
    assert layer.weight.data_ptr() == home


def test_what_does_not_change_is_not_copied_back():
    x = torch.zeros(3)
    held = ToMainMemory(lambda: [x], CPU)
    held.offload()
    with held.on_device():
        x.add_(1)
    assert x.tolist() == [0, 0, 0]


@pytest.mark.parametrize("then", ["nothing", "a block within", "brought before", "brought after"])
def test_a_block_that_only_reads_copies_nothing_back_unless_another_one_changes_it(then):
    x, written = torch.zeros(3), 0.0 if then == "nothing" else 1.0
    held = ToMainMemory(lambda: [x], CPU, changes=True)
    held.offload()
    if then == "brought before":
        held.load()
    with held.on_device(changed=False):
        if then == "a block within":
            with held.on_device():
                x.add_(1)
        elif then == "brought after":
            held.load()
        if then != "a block within":
            x.add_(1)
    assert x.tolist() == [written] * 3
    with held.on_device():
        x.fill_(5)
    assert x.tolist() == [5] * 3


def test_main_memory_is_taken_in_blocks_that_a_model_fills():
    """The tensors of a decoder of half a billion weights, tied, in float32: their shapes as of Qwen2.5-0.5B."""
    layer = [896 * 896, 896, 128 * 896, 128, 128 * 896, 128, 896 * 896, *[4864 * 896] * 3, 896, 896]
    sizes = [4 * -(-count // 16) * 16 for count in [151936 * 896, *layer * 24, 896]]
    made = offload.blocks(sizes)
    assert sorted(i for _, inside in made for i, _ in inside) == list(range(len(sizes)))
    for size, inside in made:
        assert size & (size - 1) == 0
        ends = [(place, place + sizes[i]) for i, place in sorted(inside, key=lambda pair: pair[1])]
        assert ends[-1][1] <= size
        assert all(end <= place for (_, end), (place, _) in pairwise(ends))
    assert sum(size for size, _ in made) < 1.01 * sum(sizes)
    assert len(made) == 5
    assert [size for size, _ in offload.blocks([5000])] == [8192], "one tensor alone takes the next power of two"


def test_tensors_in_a_block_have_storages_of_their_own_and_keep_it():
    tensors = mixed()
    homes = list(offload.in_blocks(tensors, pinned=False))
    for x, home in homes:
        home.copy_(x.detach())
    places = sorted(home.data_ptr() for _, home in homes)
    assert places[-1] - places[0] < offload.SMALLEST_BLOCK
    gc.collect()
    for x, home in homes:
        assert torch.equal(home, x)
        assert (home.stride(), home.dtype, home.data_ptr() % offload.ALIGNMENT) == (x.stride(), x.dtype, 0)
        assert home.untyped_storage().nbytes() == x.nbytes


def test_what_another_device_holds_stays_there():
    counter, own = torch.ones(2, device="meta"), torch.ones(2)
    held = ToMainMemory(lambda: [counter, own], CPU)
    held.offload()
    assert counter.is_meta
    assert held.offloaded_bytes() == own.nbytes


def test_only_the_outermost_block_sends_away_and_an_error_does_too():
    x = torch.ones(2)
    held = way(lambda: [x])
    moves: list[str] = []

    def note(name: str) -> None:
        move = getattr(held, name)
        setattr(held, name, lambda *changed: (moves.append(name), move(*changed)))

    note("load")
    note("offload")
    with held.on_device():
        with held.on_device(changed=False):
            pass
        assert moves == ["load"]
    assert moves == ["load", "offload"]
    with pytest.raises(ZeroDivisionError), held.on_device():
        raise ZeroDivisionError
    assert moves == ["load", "offload"] * 2


@pytest.mark.parametrize("offloaded", [False, True])
def test_resident_tensors_stay_and_on_a_cpu_all_are(offloaded):
    layer = nn.Linear(3, 2)
    where = layer.weight.data_ptr()
    held = keeper(tensors_of(layer), CPU, offloaded)
    with held.on_device():
        held.offload()
    assert layer.weight.data_ptr() == where
    assert held.offloaded_bytes() == 0


def test_a_tensor_that_is_more_than_its_numbers_is_refused():
    class Quantised(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"got a Quantised .*set offload: false"):
        way(lambda: [torch.ones(2).as_subclass(Quantised)]).offload()


def test_tied_weights_are_one_and_stay_tied():
    model = tiny_policy()[0]
    model.config.tie_word_embeddings = True
    model.tie_weights()
    whole = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    held = way(tensors_of(model))
    held.offload()
    assert held.offloaded_bytes() == whole
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# What is said before a run


def told(*training: str, **parts: Any) -> Any:
    """The plan of a small recipe."""
    return check(
        runs.resolve({**runs.BASE, "update": {}, **parts, "training": dict(x.split("=", 1) for x in training)})
    )


@pytest.mark.parametrize("optim", offload_checks.CODED)
def test_state_that_cannot_be_moved_is_refused_before_anything_is_loaded(optim, monkeypatch):
    monkeypatch.setattr("hf_rlhf.training.setup.optimizer_problems", lambda args: ())  # torchao may be missing
    both = {"update": {"offload": True}, "advantages": "gae", "critic": {"use": "separate", "offload": True}}
    text = f"the state of training.optim={optim} is torchao's codes: set update.offload=false and critic.offload=false, or "
    with pytest.raises(UserError, match=text + "training.optim=adamw_torch"):
        told(f"optim={optim}", **both)
    assert told(f"optim={optim}").models == ["policy: trained"]


def test_the_plan_says_what_of_the_policy_is_offloaded_and_where_there_is_nothing():
    away, nothing = {"update": {"offload": True}}, "update.offload has no effect"
    average = {"update": {"offload": True, "ema": 0.9}}
    trpo = {"optimizer": "trpo", "policy_loss": "surrogate"}
    cases = [
        (told("optim=adamw_torch", **away), "its optimizer state", 0),
        (told("optim=adamw_torch", **average), "its optimizer state and its average", 0),
        (told("optim=sgd", "optim_args=momentum=0.9", **away), "its optimizer state", 0),
        (told("optim=sgd", **average), "its average", 0),
        (told("optim=sgd", **away), "", 1),
        (told("max_grad_norm=0", **away, **trpo), "", 1),
        (told("max_grad_norm=0", **away, **trpo, advantages="gae", critic="separate"), "", 0),
    ]
    for plan, kept, remarks in cases:
        where = "; offloaded while completions are sampled and scored: "
        assert plan.models[0] == "policy: trained" + (where + kept if kept else "")
        assert sum(nothing in remark for remark in plan.remarks) == remarks


def test_on_a_cpu_the_plan_says_that_offload_has_no_effect():
    plan = told(advantages="gae", critic={"use": "separate", "offload": True}, update={"offload": True})
    (remark,) = (remark for remark in plan.remarks if "offload" in remark)
    assert remark == "update.offload, critic.offload: no effect on a CPU, where everything is in main memory"


def test_settings_of_a_reference_that_is_not_named_say_what_to_write():
    def refusal(**parts: Any) -> str:
        with pytest.raises(UserError) as error:
            told(**parts)
        return str(error.value)

    found = refusal(kl=[KL], reference={"offload": True})
    assert (
        "names no reference, so it is frozen: write reference.use=frozen too, or reference={use: frozen, offload: true}"
        in found
    )
    assert "so it is none: write critic.use=separate too" in refusal(critic={"offload": True})
    assert "names no reference" not in refusal(kl=[KL], reference={"offlode": True})


def test_only_the_settings_of_offload_may_differ_when_a_run_is_resumed():
    def differ(path: str) -> list[str]:
        def nested(value: bool) -> Any:
            made: Any = value
            for key in reversed(path.split(".")):
                made = [made] if key == "0" else {key: made}
            return made

        return differences(nested(False), nested(True))

    for free in ("update.offload", "critic.offload", "reference.offload", "rewards.0.offload"):
        assert differ(free) == []
    for other in ("offload", "model.offload", "rewards.0.options.offload", "update.offload_more"):
        assert differ(other) == [f"{other}: False in the checkpoint, True now"]


def test_a_resumed_average_that_may_round_otherwise_gives_a_warning(tmp_path, caplog):
    def record(offloaded: bool) -> dict[str, Any]:
        return {"algorithm": {"reference": {"use": "ema", "offload": offloaded}}, "run": {}, "resumable": True}

    check_same_run(tmp_path, record(True), record(False), None)
    check_same_run(tmp_path, record(True), record(True), None, blends_away=True)
    assert not caplog.records
    check_same_run(tmp_path, record(True), record(False), None, blends_away=True)
    assert re.match(r"reference.offload was true in .* and is false now", caplog.records[0].getMessage())


@pytest.mark.parametrize(
    ("reference", "kl", "device", "blends"),
    [
        ("ema", KL, "meta", True),
        (SYNC, KL, "meta", True),
        ("sync", KL, "meta", False),
        ("frozen", KL, "meta", False),
        ("ema", EXACT_KL, "meta", False),
        ("ema", KL, "cpu", False),
    ],
)
def test_where_an_average_lies_matters_off_the_cpu_alone(reference, kl, device, blends):
    algorithm = runs.recipe(kl=[kl], reference=reference).algorithm()
    policy = ActorCritic(nn.Linear(2, 2), None, 1.0)
    made = device_phases.Phases.of(
        *(algorithm, policy, {"reference": (algorithm.reference, None)}),
        *(lambda: None, None, SimpleNamespace(device=torch.device(device))),
    )
    assert made.blends_away is blends


# Runs


def parts(offloaded: bool, reference: dict[str, Any], **more: Any) -> dict[str, Any]:
    """PPO with a moving average, two optimizer steps a rollout; the reference, the critic and the optimizer are offloaded."""
    own = {
        "advantages": "gae",
        "kl": [KL],
        "critic": {"use": "separate", "offload": offloaded},
        "reference": {**reference, "offload": offloaded},
        "update": {"epochs": 2, "ema": 0.9, "offload": offloaded},
        "training": {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 0.01},
    }
    return {**own, **more}


def weights(made: Any) -> Tensor:
    """Of policy, critic, average and a reference that moves."""
    moving = [own for _, own in made.collector.forwards.references.moving().values()]
    found = [runs.parameters(made), *(x.flatten().double() for x in made.ema.tensors())]
    return torch.cat([*found, *map(runs.parameters, moving)])


@pytest.fixture
def main_memory(monkeypatch) -> None:
    """Offloads to main memory, as from a GPU, though the run is on the CPU."""

    def chosen(tensors: Any, device: torch.device, offloaded: bool, **options: bool) -> Keeper:
        return ToMainMemory(tensors, device, **options) if offloaded else Keeper(tensors)

    monkeypatch.setattr(device_phases, "keeper", chosen)


@pytest.fixture(scope="module")
def plainly(tmp_path_factory) -> Callable[..., Tensor]:
    """The weights after a run that offloads nothing, each run once."""
    known: dict[str, Tensor] = {}

    def run(reference: dict[str, Any], **more: Any) -> Tensor:
        key = repr((reference, more))
        if key not in known:
            known[key] = weights(runs.trained(tmp_path_factory.mktemp("plain"), **parts(False, reference, **more)))
        return known[key]

    return run


REFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frozen": ({"use": "frozen"}, {}),
    "sync": (SYNC, {}),
    "sync, whole distributions": (SYNC, {"kl": [EXACT_KL]}),
    "adapter": ({"use": "frozen"}, {"lora": True, "critic": {"use": "separate", "adapter": True, "offload": True}}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_run_trains_the_same_bits(name, tmp_path, plainly, main_memory):
    reference, more = REFERENCES[name]
    made = runs.trained(tmp_path, **parts(True, reference, **more))
    assert torch.equal(weights(made), plainly(reference, **more))
    assert max(entry.get("memory/offloaded", 0) for entry in runs.entries(made)) > 0


@pytest.mark.parametrize("resumed_by", ["offloaded", "resident"])
def test_a_checkpoint_within_a_rollout_resumes_to_the_bit(resumed_by, tmp_path, plainly, main_memory):
    """Written by a run that offloads."""

    def run(offloaded: bool, steps: int, resume: str | None = None) -> Any:
        chosen = parts(offloaded, SYNC)
        training = {**chosen.pop("training"), "max_steps": steps, "save_strategy": "steps", "save_steps": 3}
        made = runs.trainer(tmp_path, training=training, **chosen)
        made.train(resume_from_checkpoint=resume)
        made.close()
        return made

    run(True, 3)
    resumed = run(resumed_by == "offloaded", 5, str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(resumed), plainly(SYNC))


def test_an_evaluation_within_a_rollout_changes_nothing_and_sees_the_average(tmp_path, main_memory):
    found = []
    for offloaded in (False, True):
        chosen = parts(offloaded, {"use": "frozen"}, rollout=runs.SAMPLED, evaluation={"ema": True})
        chosen["training"] |= {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
        made = runs.trained(tmp_path, eval_data=runs.problems(2, seed=3), **chosen)
        told = [{k: x for k, x in e.items() if "reward" in k} for e in made.state.log_history if "eval_runtime" in e]
        assert len(told) == 4
        found.append((weights(made), told))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert any(name.startswith("eval_ema/") for name in found[0][1][0])


# Phases


@dataclass(kw_only=True)
class Looking(type(load_plugin("rollout", "scripted"))):  # type: ignore[misc]
    """Scripted completions; says when they are sampled."""

    name = "looking"
    look: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.look("sampling")
        return super().__call__(*args, **options)


def is_there(kept: Any) -> bool:
    """Whether tensors in main memory have a copy on the device, all of them or none."""
    (found,) = {x.data_ptr() != home.data_ptr() for x, home in kept._homes.values()}
    return found


@pytest.mark.parametrize("kl", [KL, EXACT_KL], ids=["sampled tokens", "whole distributions"])
def test_each_part_is_there_in_its_phases_and_away_in_the_others(kl, tmp_path, main_memory):
    seen: dict[str, set[tuple[Any, ...]]] = {}
    gradients: dict[str, set[bool]] = {}

    def look(phase: str) -> None:
        held = made.phases
        seen.setdefault(phase, set()).add(
            tuple(is_there(x) for x in (held.references["reference"], held.critic, held.update))
        )
        has = any(p.grad is not None for p in made.actor_critic.parameters())
        gradients.setdefault(phase, set()).add(has)

    def score(completions: list[str], **columns: Any) -> list[float]:
        look("scoring")
        return [float(len(text)) for text in completions]

    chosen = parts(True, {"use": "frozen"}, kl=[kl], rewards=[load_plugin("rewards", "function", function=score)])
    chosen["rewards"][0].runs_model = True  # after the forwards, not beside them
    rollout = Looking(prompts=4, num_generations=4)
    made = runs.trainer(tmp_path, **{**chosen, "rollout": rollout})
    rollout.look = look
    critic, reference = made.actor_critic.critic, made.collector.forwards.reference
    critic.register_forward_pre_hook(lambda *_: look("updating" if torch.is_grad_enabled() else "values"))
    reference.own.register_forward_pre_hook(lambda *_: look("reference"))
    reference.own.base_model.register_forward_pre_hook(lambda *_: look("reference"))
    made.create_optimizer()
    made.optimizer.register_step_pre_hook(lambda *_: look("stepping"))
    made.train()
    made.close()
    in_update = kl is EXACT_KL
    assert seen["sampling"] == seen["scoring"] == {(False, False, False)}
    assert seen["values"] == {(False, True, False)}
    assert {state[0] for state in seen["reference"]} == {True}
    assert seen["updating"] == {(in_update, True, False), (in_update, True, True)}
    assert seen["stepping"] == {(in_update, True, True)}
    assert gradients["sampling"] == gradients["scoring"] == {False}
    assert gradients["stepping"] == {True}


def test_a_critic_takes_its_own_optimizer_state_along(tmp_path, main_memory):
    made = runs.trained(tmp_path, **parts(False, {"use": "frozen"}, critic={"use": "separate", "offload": True}))
    made.phases.sampling()
    critic = list(made.actor_critic.critic.parameters())
    of_critic = sum(x.nbytes for p in critic for x in made.optimizer.state[p].values())
    assert made.phases.update.offloaded_bytes() == of_critic
    assert made.phases.critic.offloaded_bytes() == sum(x.nbytes for x in tensors_of(made.actor_critic.critic)())


def test_a_frozen_reference_of_an_adapter_holds_the_base_once(tmp_path, main_memory):
    made = runs.trainer(tmp_path, lora=True, kl=[KL], reference={"use": "frozen", "offload": True})
    own = {id(p) for p in made.model.parameters()}
    reference = made.collector.forwards.reference.own
    assert all((id(p) in own) == ("lora_" not in name) for name, p in reference.named_parameters())
    adapter = sum(p.nbytes for name, p in reference.named_parameters() if "lora_" in name)
    assert made.phases.references["reference"].offloaded_bytes() == adapter + sum(x.nbytes for x in reference.buffers())
