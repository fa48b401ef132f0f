"""The trust region: a natural gradient against its closed form, the limit on the KL, backtracking, checkpoints."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_rlhf import load_plugin
from hf_rlhf.contract.optimizer_step import Step
from hf_rlhf.modeling.policy import distributions
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs
from tests.helpers.paths import DATA
from tests.helpers.waits import scaled

STATES, ACTIONS = 4, 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Table(nn.Module):
    """A softmax policy: its logits by state are `matrix` @ `weight`."""

    def __init__(self, matrix: Tensor | None = None, scale: float = 1.0):
        super().__init__()
        start = scale * draw(STATES * ACTIONS, seed=0)
        self.matrix = torch.eye(STATES * ACTIONS, dtype=torch.float64) if matrix is None else matrix
        self.weight = nn.Parameter(torch.linalg.solve(self.matrix, start))

    def log_probs(self, states: Tensor) -> Tensor:
        return (self.matrix @ self.weight).view(STATES, ACTIONS).log_softmax(1)[states]


STATE = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1])
ACTION = torch.tensor([0, 1, 4, 2, 2, 0, 3, 1])
ADVANTAGE = draw(8, seed=1)


def rows(start: int = 0, stop: int = 8) -> dict[str, Tensor]:
    return {"state": STATE[start:stop], "action": ACTION[start:stop], "advantage": ADVANTAGE[start:stop]}


def step_of(policy: Table, micro_batches: list[dict[str, Tensor]], **replaced: Any) -> Step:
    """The mean over all eight rows of -rho A, against the policy as it is now."""
    old = policy.log_probs(torch.arange(STATES)).detach()

    def loss(micro: dict[str, Tensor]) -> Tensor:
        new = policy.log_probs(micro["state"]).gather(1, micro["action"][:, None]).squeeze(1)
        ratio = (new - old[micro["state"], micro["action"]]).exp()
        return -(ratio * micro["advantage"]).sum() / len(STATE)

    given = {
        "micro_batches": micro_batches,
        "loss": loss,
        "log_probs": lambda micro: policy.log_probs(micro["state"]),
        "total": lambda x: x.detach(),
    }
    return Step(**{**given, **replaced})


def walked(policy: Table, step: Step, gradient: Tensor | None = None, **settings: Any) -> dict[str, float]:
    """One step; what was measured of it."""
    plugin = load_plugin("optimizer", "trpo", **settings)
    optimizer = plugin.build(policy, [])
    policy.weight.grad = gradient
    if gradient is None:
        policy.weight.grad = None
        sum(step.loss(micro) for micro in step.micro_batches).backward()
        policy.weight.grad = step.total(policy.weight.grad)
    plugin.hold(step)
    optimizer.step()
    return plugin.take_logs()


def fisher(policy: Table) -> Tensor:
    """The mean over the sampled tokens of J^T (diag p - p p^T) J, written out."""
    p = policy.log_probs(torch.arange(STATES)).detach().exp()
    of_logits = torch.block_diag(
        *[(s == STATE).sum() / len(STATE) * (p[s].diag() - torch.outer(p[s], p[s])) for s in range(STATES)]
    )
    return policy.matrix.T @ of_logits @ policy.matrix


def kl_to(before: Tensor, policy: Table) -> float:
    """Mean KL(old || new) over the eight tokens, from the old table of log-probs."""
    after = policy.log_probs(torch.arange(STATES)).detach()
    return float(((before.exp() * (before - after)).sum(1))[STATE].mean())


@pytest.mark.proves("optimizer.trpo", how="closed form", tolerance="1e-10")
@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
def test_the_step_is_the_natural_gradient_scaled_to_the_limit(damping: float):
    policy = Table()
    before, step = policy.weight.detach().clone(), step_of(policy, [rows()])
    (gradient,) = torch.autograd.grad(step.loss(rows()), policy.weight)
    a = fisher(policy) + damping * torch.eye(STATES * ACTIONS, dtype=torch.float64)
    x = torch.linalg.solve(a, gradient)
    want = before - (2e-4 / (x @ a @ x)).sqrt() * x
    measured = walked(policy, step, max_kl=1e-4, cg_iters=40, damping=damping)
    assert measured["backtracks"] == 0
    torch.testing.assert_close(policy.weight.detach(), want, rtol=0, atol=1e-10)
    assert (want - before).abs().max() > 1e-3


def test_one_iteration_gives_the_gradients_direction_and_more_give_another():
    def moved(cg_iters: int) -> tuple[Tensor, Tensor]:
        policy = Table()
        step, before = step_of(policy, [rows()]), policy.weight.detach().clone()
        (gradient,) = torch.autograd.grad(step.loss(rows()), policy.weight)
        walked(policy, step, cg_iters=cg_iters)
        return before - policy.weight.detach(), gradient

    one, gradient = moved(1)
    assert torch.cosine_similarity(one, gradient, dim=0) > 1 - 1e-12
    ten, _ = moved(10)
    assert torch.cosine_similarity(ten, gradient, dim=0) < 0.999


def test_without_damping_the_step_does_not_depend_on_how_the_policy_is_parametrised():
    skewed = torch.eye(STATES * ACTIONS, dtype=torch.float64) + 0.2 * draw(STATES * ACTIONS, STATES * ACTIONS, seed=3)
    reached = []
    for matrix in (None, skewed):
        policy = Table(matrix)
        walked(policy, step_of(policy, [rows()]), cg_iters=60, damping=0, max_kl=1e-3)
        reached.append(policy.log_probs(torch.arange(STATES)).detach())
    torch.testing.assert_close(*reached, rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 0.5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_exact_kl_stays_within_its_limit_and_the_loss_falls(max_kl: float, scale: float, damping: float):
    policy = Table(scale=scale)
    before, step = policy.log_probs(torch.arange(STATES)).detach(), step_of(policy, [rows()])
    loss = step.loss(rows()).item()
    measured = walked(policy, step, max_kl=max_kl, damping=damping)
    assert measured["accepted"] == 1
    assert 0 < kl_to(before, policy) <= max_kl
    assert measured["kl"] == pytest.approx(kl_to(before, policy), rel=1e-9)
    assert measured["improvement"] == pytest.approx(loss - step.loss(rows()).item(), rel=1e-9)
    assert measured["improvement"] > 0


def test_a_step_that_breaks_the_limit_is_shortened():
    policy = Table(scale=6.0)
    before, step = policy.log_probs(torch.arange(STATES)).detach(), step_of(policy, [rows()])
    start = policy.weight.detach().clone()
    measured = walked(policy, step, max_kl=0.5, damping=0.0, shrink=0.5)
    assert measured["accepted"] == 1
    assert measured["backtracks"] >= 1
    length = policy.weight.detach() - start
    with torch.no_grad():
        policy.weight.copy_(start + length / 0.5)  # the length before the one that was taken
    assert kl_to(before, policy) > 0.5


@pytest.mark.parametrize("worse", [lambda micro: torch.ones(()), lambda micro: torch.tensor(float("nan"))])
def test_without_improvement_the_policy_is_put_back_to_the_bit(worse: Callable[[Any], Tensor]):
    policy = Table()
    start, gradient = policy.weight.detach().clone(), draw(STATES * ACTIONS, seed=5)
    measured = walked(policy, step_of(policy, [rows()], loss=worse), gradient=gradient, backtracks=3)
    assert measured == {"kl": 0.0, "improvement": 0.0, "backtracks": 3.0, "accepted": 0.0}
    assert torch.equal(policy.weight.detach(), start)


def test_no_backtracks_means_one_try():
    policy, tries = Table(scale=6.0), []
    step = step_of(policy, [rows()])
    own = step.loss
    step.loss = lambda micro: (tries.append(1), own(micro))[1]
    (gradient,) = torch.autograd.grad(own(rows()), policy.weight)
    measured = walked(policy, step, gradient=gradient, max_kl=0.5, damping=0.0, backtracks=0)
    assert len(tries) == 2, "before the step and after it"
    assert measured["accepted"] == 0


def test_a_gradient_of_0_moves_nothing():
    policy = Table()
    start = policy.weight.detach().clone()
    measured = walked(policy, step_of(policy, [rows()]), gradient=torch.zeros(STATES * ACTIONS, dtype=torch.float64))
    assert measured["accepted"] == 0
    assert torch.equal(policy.weight.detach(), start)


def test_micro_batches_may_split_anywhere_and_may_be_empty():
    reached = []
    for cuts in ([0, 8], [0, 1, 8], [0, 3, 3, 5, 8]):
        policy = Table()
        walked(policy, step_of(policy, [rows(a, b) for a, b in itertools.pairwise(cuts)]))
        reached.append(policy.weight.detach())
    torch.testing.assert_close(reached[1], reached[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(reached[2], reached[0], rtol=0, atol=1e-12)


def test_two_processes_take_the_step_of_one_with_all_rows():
    barrier, shelf = threading.Barrier(2), {}
    torch.set_num_threads(1)

    def total(rank: int) -> Callable[[Tensor], Tensor]:
        def add(x: Tensor) -> Tensor:
            shelf[rank] = x.detach()
            barrier.wait(timeout=scaled(20))
            found = shelf[0] + shelf[1]
            barrier.wait(timeout=scaled(20))
            return found

        return add

    alone = Table()
    walked(alone, step_of(alone, [rows()]))
    both = [Table(), Table()]

    def work(rank: int) -> None:
        parts = [[rows(0, 3)], [rows(3, 6), rows(6, 8)]][rank]
        walked(both[rank], step_of(both[rank], parts, total=total(rank)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=scaled(30))
    assert torch.equal(both[0].weight, both[1].weight)
    torch.testing.assert_close(both[0].weight, alone.weight, rtol=0, atol=1e-12)


# The optimizer as Trainer sees it


class Pair(nn.Module):
    """A policy, a frozen part, and a critic beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.frozen, self.critic = Table(), nn.Linear(2, 2).requires_grad_(False), nn.Linear(3, 1).double()


def paired(pair: Pair, **group: Any) -> Any:
    return load_plugin("optimizer", "trpo").build(pair, [{"params": list(pair.critic.parameters()), **group}])


def with_gradients(pair: Pair, optimizer: Any, seed: int) -> None:
    step = step_of(pair.policy, [rows()])
    pair.policy.weight.grad = torch.autograd.grad(step.loss(rows()), pair.policy.weight)[0]
    for i, p in enumerate(pair.critic.parameters()):
        p.grad = draw(*p.shape, seed=seed + i)
    optimizer.held = step


def test_the_critic_learns_by_adamw_at_its_own_rate():
    torch.manual_seed(0)
    pair = Pair()
    other = nn.Linear(3, 1).double()
    other.load_state_dict(pair.critic.state_dict())
    plain = torch.optim.AdamW(other.parameters(), lr=0.02, weight_decay=0.1)
    optimizer = paired(pair, lr=0.02, weight_decay=0.1)
    for seed in (10, 20, 30):
        with_gradients(pair, optimizer, seed)
        for mine, its in zip(other.parameters(), pair.critic.parameters(), strict=True):
            mine.grad = its.grad.clone()  # type: ignore[union-attr]
        start = pair.policy.weight.detach().clone()
        optimizer.step()
        plain.step()
        assert not torch.equal(pair.policy.weight, start)
    assert set(optimizer.state) == set(pair.critic.parameters()), "no moments are kept of the policy"
    for mine, its in zip(other.parameters(), pair.critic.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_it_holds_what_learns_and_nothing_else():
    pair = Pair()
    held = [id(p) for group in paired(pair, lr=0.02).param_groups for p in group["params"]]
    assert held == [id(p) for p in (pair.policy.weight, *pair.critic.parameters())]


def test_without_a_gradient_of_the_policy_only_the_critic_moves():
    pair = Pair()
    optimizer = paired(pair, lr=0.02)
    with_gradients(pair, optimizer, 10)
    pair.policy.weight.grad = None
    start, critic = pair.policy.weight.detach().clone(), pair.critic.weight.detach().clone()
    optimizer.step()
    assert torch.equal(pair.policy.weight, start)
    assert not torch.equal(pair.critic.weight, critic)
    assert optimizer.measured == {}


def test_a_gradient_that_nothing_was_held_for_is_an_error():
    pair = Pair()
    optimizer = paired(pair, lr=0.02)
    with_gradients(pair, optimizer, 10)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"Call hold\(step\)"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_schedules_reach_the_critic_and_its_state_survives_a_checkpoint(tmp_path: Path):
    def steps(pair: Pair, optimizer: Any, schedule: Any, seeds: list[int]) -> None:
        for seed in seeds:
            with_gradients(pair, optimizer, seed)
            optimizer.step()
            schedule.step()

    def made() -> tuple[Pair, Any, Any]:
        torch.manual_seed(0)
        pair = Pair()
        optimizer = paired(pair, lr=0.02)
        return pair, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))

    straight = made()
    steps(*straight, [10, 20, 30, 40])
    assert straight[1].param_groups[1]["lr"] == pytest.approx(0.02 / 5)
    first, second = made(), made()
    steps(*first, [10, 20])
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    steps(*second, [30, 40])
    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


# On a language model


def eager(dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_policy(dtype=dtype)[0]
    model.set_attn_implementation("eager")
    return model


def language_step(model: Any) -> Step:
    """Two micro-batches of completions, one with a tool token, and their surrogate."""
    masks = [torch.tensor([[1.0, 1, 1], [1, 0, 1]]), torch.ones(1, 4)]
    batches = [
        TokenBatch([[5, 6], [7]], [[8, 9, 1], [10, 11, 1]], masks[0], 0, "padded"),
        TokenBatch([[12, 13]], [[14, 15, 16, 1]], masks[1], 0, "padded"),
    ]

    def log_probs(batch: TokenBatch) -> Tensor:
        return distributions(model, batch, 1.0)

    def of_tokens(batch: TokenBatch) -> Tensor:
        return log_probs(batch).gather(1, batch.targets[:, None]).squeeze(1)

    old = [of_tokens(batch).detach() for batch in batches]
    advantages = [draw(len(x), seed=7 + i).to(x.dtype) for i, x in enumerate(old)]

    def loss(batch: TokenBatch) -> Tensor:
        i = next(i for i, b in enumerate(batches) if b is batch)
        return -((of_tokens(batch) - old[i]).exp() * advantages[i]).sum() / 9

    return Step(micro_batches=batches, loss=loss, log_probs=log_probs, total=lambda x: x.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_language_model_the_kl_is_within_its_limit_and_close_to_it(dtype: torch.dtype):
    model = eager(dtype)
    step = language_step(model)
    before = torch.cat([step.log_probs(b) for b in step.micro_batches]).detach()
    sum(step.loss(b) for b in step.micro_batches).backward()
    plugin = load_plugin("optimizer", "trpo", max_kl=0.01, damping=1e-3)
    optimizer = plugin.build(model, [])
    plugin.hold(step)
    optimizer.step()
    after = torch.cat([step.log_probs(b) for b in step.micro_batches]).detach()
    kl = float((before.exp() * (before - after)).sum(1).mean())
    measured = plugin.take_logs()
    assert measured["accepted"] == 1
    assert measured["kl"] == pytest.approx(kl, rel=1e-3)
    assert 0.002 < kl <= 0.01


def test_of_an_adapter_only_the_factors_move():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(eager(), peft.LoraConfig(r=2, target_modules="all-linear"))
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    step = language_step(model)
    sum(step.loss(b) for b in step.micro_batches).backward()
    plugin = load_plugin("optimizer", "trpo")
    optimizer = plugin.build(model, [])
    plugin.hold(step)
    optimizer.step()
    assert plugin.take_logs()["accepted"] == 1
    assert base
    for name, p in model.named_parameters():
        assert p.requires_grad or torch.equal(p, base[name])


TRPO = {
    "optimizer": "trpo",
    "policy_loss": "surrogate",
    "advantages": "gae",
    "critic": "separate",
    "update": {"mini_batches": 2},
    "training": {"max_steps": 4, "max_grad_norm": 0.0},
}


@pytest.mark.proves("optimizer.trpo", how="end to end", tolerance="0")
def test_a_run_stays_within_its_limit_and_resumes_to_the_bit(tmp_path: Path):
    def options(**more: Any) -> dict[str, Any]:
        return {**TRPO, "policy": eager(), "dtype": torch.float64, "training": {**TRPO["training"], **more}}

    straight = runs.trained(tmp_path / "a", **options(save_strategy="steps", save_steps=2))
    logged = runs.entries(straight)
    assert all(entry["optimizer/kl"] <= 0.01 for entry in logged)
    assert any(entry["optimizer/accepted"] == 1 for entry in logged)
    resumed = runs.trainer(tmp_path / "a", **options(save_strategy="steps", save_steps=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    resumed.close()
    assert torch.equal(runs.parameters(resumed), runs.parameters(straight))


# Refusals and remarks


def problems(**parts: Any) -> list[str]:
    return list(runs.recipe(**{**TRPO, **parts}).algorithm().problems())


def test_the_combination_is_accepted_and_old_log_probs_are_computed_for_it():
    assert problems() == []
    chosen = runs.recipe(**{**TRPO, "update": {"mini_batches": 1}}).algorithm()
    assert "optimizer" in chosen.readers_of_old_logps


def test_a_critic_on_the_trunk_is_refused():
    (problem,) = problems(critic="value_head")
    assert "critic=value_head trains the policy's trunk" in problem
    assert "critic.use=separate" in problem


def test_what_stops_gradients_is_refused_as_its_value_is_compared():
    loss: Any = load_plugin("policy_loss", "surrogate")
    algorithm: Any = SimpleNamespace(
        critic=load_plugin("critic", "none"),
        loss_terms=[],
        policy_loss=SimpleNamespace(name="stopped", stops_gradient=True),
        kl_in=lambda place: [("in_loss", SimpleNamespace(estimator=load_plugin("kl_estimator", "k3_plus")))],
    )
    first, second = load_plugin("optimizer", "trpo").check(algorithm)
    assert first.startswith("policy_loss=stopped stops gradients")
    assert second.startswith("kl=k3_plus stops gradients")
    algorithm.policy_loss, algorithm.kl_in = loss, lambda place: []
    assert not list(load_plugin("optimizer", "trpo").check(algorithm))


def test_a_loss_term_with_texts_of_its_own_is_refused():
    (problem,) = problems(loss_terms=[{"use": "ptx", "path": str(DATA / "texts.txt")}])
    assert "loss_terms=ptx trains on separate texts" in problem
    assert "optimizer.use=trainer" in problem


def arguments(folder: Path, **settings: Any) -> list[str]:
    from transformers import TrainingArguments

    return list(
        load_plugin("optimizer", "trpo").check_arguments(TrainingArguments(str(folder), use_cpu=True, **settings))
    )


def test_gradient_clipping_is_refused(tmp_path: Path):
    (problem,) = arguments(tmp_path)
    assert "training.max_grad_norm must be 0" in problem
    assert "Set training.max_grad_norm=0" in problem
    assert not arguments(tmp_path, max_grad_norm=0)


def test_checkpointing_that_cannot_be_differentiated_twice_is_refused(tmp_path: Path):
    def problems(**kwargs: Any) -> list[str]:
        return arguments(tmp_path, max_grad_norm=0, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)

    (problem,) = problems(use_reentrant=True)
    assert "Set training.gradient_checkpointing_kwargs={use_reentrant: false}" in problem
    assert not problems(use_reentrant=False)
    model = eager().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = language_step(model)
    sum(step.loss(b) for b in step.micro_batches).backward()
    plugin = load_plugin("optimizer", "trpo")
    optimizer = plugin.build(model, [])
    plugin.hold(step)
    optimizer.step()
    assert plugin.take_logs()["accepted"] == 1


def test_what_does_not_scale_the_step_is_remarked_on():
    def said(loss: str) -> list[str]:
        return list(load_plugin("optimizer", "trpo").remarks(runs.recipe(policy_loss=loss).algorithm()))

    assert "learning_rate" in said("surrogate")[0]
    assert len(said("surrogate")) == 1
    assert "policy_loss=reinforce, which does not estimate" in said("reinforce")[1]
