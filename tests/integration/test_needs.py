"""What a plugin needs reaches it: whole distributions, greedy baselines, squared probabilities, the sampler's log-probs,
tokens, texts of a loss term, a reference that moves, a step that an update rule looks at again."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rlhf import load_plugin
from hf_rlhf.axes import AdvantageEstimator, Filter, PolicyLoss, TextTerm
from hf_rlhf.batch import Prompt, Scored
from hf_rlhf.modeling import lm_head
from hf_rlhf.modeling.policy import ActorCritic, Policy, sampled_states
from hf_rlhf.modeling.reference import ReferencePolicy
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.runtime.seeding import seeded
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs, stepping


@dataclass(kw_only=True)
class Looks(AdvantageEstimator):
    """Keeps what it was given."""

    name: ClassVar[str] = "looks"
    needs: ClassVar[frozenset[str]] = frozenset({"greedy", "sum_sq_probs", "old_logps", "completion_ids"})
    seen: list[Any] = field(default_factory=list)

    def __call__(self, scored: Scored) -> Tensor:
        self.seen.append(scored)
        return scored.mask


SAMPLED = {"use": "generate", "prompts": 4, "num_generations": 2, "max_new_tokens": 5}


def batch_of(rows: int = 3, width: int = 4) -> TokenBatch:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (rows, 2 + width), generator=draw).tolist()
    mask = torch.ones(rows, width, dtype=torch.float64)
    mask[0, 1] = mask[1, -1] = 0
    return TokenBatch([row[:2] for row in ids], [row[2:] for row in ids], mask, 0)


def test_squared_probabilities_and_tokens_are_those_of_the_sampled_states(tmp_path):
    looks = Looks()
    made = runs.trainer(tmp_path, rollout=SAMPLED, advantages=looks, dtype=torch.float64)
    buffer = made.collector.collect(0)
    (scored,) = looks.seen
    assert scored.completion_ids is not None
    for row, ids in enumerate(buffer.completion_ids):
        assert scored.completion_ids[row, : len(ids)].tolist() == ids
        with torch.no_grad():
            whole = torch.tensor([[*buffer.prompt_ids[row], *ids]])
            p = made.model(input_ids=whole).logits[0, len(buffer.prompt_ids[row]) - 1 : -1].softmax(-1)
        torch.testing.assert_close(scored.sum_sq_probs[row, : len(ids)], (p**2).sum(1), rtol=1e-6, atol=0)


def test_the_greedy_score_is_that_of_the_greedy_completion_of_the_prompt(tmp_path):
    looks = Looks()
    reward = {"use": "length", "target": 1, "maximum": 5}
    made = runs.trainer(tmp_path, rollout=SAMPLED, advantages=looks, rewards=[reward], dtype=torch.float64)
    buffer = made.collector.collect(0)
    engine, scorer = made.algorithm.rollout, load_plugin("rewards", "length", target=1, maximum=5)
    for row, ids in enumerate(buffer.prompt_ids):
        prompt = Prompt(prompt="", ids=ids, columns={})
        _, rollouts = made.collector.roll_out([prompt], [0], 1, temperature=0.0)
        assert looks.seen[0].greedy[row].item() == pytest.approx(scorer(rollouts)[0])
    assert engine.temperature == 1.0


def test_greedy_rollouts_leave_the_sampled_ones_as_they_are(tmp_path):
    @dataclass(kw_only=True)
    class Plain(Looks):
        needs: ClassVar[frozenset[str]] = frozenset()

    with_greedy, without = (
        runs.trainer(tmp_path, rollout=SAMPLED, advantages=looks).collector.collect(0) for looks in (Looks(), Plain())
    )
    assert with_greedy.completion_ids == without.completion_ids


def test_generate_reports_the_log_probs_with_which_it_drew():
    model, tokenizer = tiny_policy(dtype=torch.float64)
    engine = load_plugin("rollout", "generate", max_new_tokens=6, temperature=0.7, max_rows=4)
    device = torch.device("cpu")
    prompts = [Prompt(prompt=text, ids=tokenizer(text)["input_ids"], columns={}) for text in ("2+3=", "7", "12-4=")]
    with seeded(0, "rollout"):
        found = engine(Policy(model=model, tokenizer=tokenizer, device=device, wants_logps=True), prompts, 3)
    with seeded(0, "rollout"):
        silent = engine(Policy(model=model, tokenizer=tokenizer, device=device), prompts, 3)
    assert silent.ids == found.ids
    assert silent.logps is None
    assert found.logps is not None
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids)) for ids in found.ids], batch_first=True)
    batch = TokenBatch([prompt.ids for prompt in prompts for _ in range(3)], found.ids, mask, 0)
    with torch.no_grad():
        own = ActorCritic(model, None, 0.7)(batch)["logps"]
    for row, logps in enumerate(found.logps):
        assert logps == pytest.approx(own[row, : len(logps)].tolist(), abs=1e-5)


# Whole distributions


def exact(own: Tensor, reference: Tensor) -> Tensor:
    return (own.exp() * (own - reference)).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_a_kl_over_distributions_is_the_closed_form_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(lm_head, "LOGITS", 16)
    monkeypatch.setattr(lm_head, "tokens_at_a_time", lambda *_: chunk)
    trained, _ = tiny_policy(seed=0, dtype=torch.float64)
    frozen, _ = tiny_policy(seed=1, dtype=torch.float64)
    batch = batch_of()
    reference = ReferencePolicy(frozen, trained, None, 0.8)
    measures = reference.measures(batch, {"kl": (load_plugin("kl_estimator", "exact"), True)})
    found = ActorCritic(trained, None, 0.8)(batch, measures=measures)["kl"]

    def whole(model: Any) -> Tensor:
        input_ids, before = batch.padded
        return (model(input_ids=input_ids).logits.flatten(0, 1)[before] / 0.8).log_softmax(-1)

    want = exact(whole(trained), whole(frozen).detach())
    torch.testing.assert_close(found[batch.rows, batch.columns], want)
    parameters = list(trained.parameters())
    weights = torch.linspace(1, 2, len(want), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found[batch.rows, batch.columns] * weights).sum(), parameters),
        torch.autograd.grad((want * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor) and func.overloadpacket is not torch.ops.aten.slice_backward:
                self.numbers = max(self.numbers, x.numel())
        return out


def test_comparing_distributions_makes_nothing_larger_than_a_chunk():
    tokens, vocabulary = 300, 50
    module, other = torch.nn.Linear(4, vocabulary), torch.nn.Linear(4, vocabulary)
    states, targets = torch.randn(tokens, 4, requires_grad=True), torch.zeros(tokens, dtype=torch.long)

    def measure(log_probs: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            reference = other(states[part]).log_softmax(-1)
        return exact(log_probs, reference)

    with Largest() as seen:
        found = lm_head.score(lm_head.Head(module), states, targets, 1.0, lm_head.TokenStatistics(), {"kl": measure})
        found["kl"].sum().backward()
    assert seen.numbers == 256 * vocabulary


def test_a_model_that_scales_its_logits_gives_its_own_distributions():
    model, _ = tiny_policy(dtype=torch.float64)
    batch = batch_of()
    states, read = sampled_states(copy.deepcopy(model), batch)
    assert states.shape[1] == model.config.hidden_size
    plain = read(states)
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 3 * out.logits
        return out

    model.forward = scaled
    states, read = sampled_states(model, batch)
    torch.testing.assert_close(read(states), 3 * plain)


@pytest.mark.parametrize("lora", [False, True])
def test_the_exact_kl_in_reward_and_in_loss_are_of_the_same_distributions(lora, tmp_path):
    kls = [
        {"use": "in_reward", "beta": 0.1, "estimator": "exact"},
        {"use": "in_loss", "beta": 0.1, "estimator": "exact"},
        {"use": "monitor", "estimator": "exact"},
    ]
    reference = "adapter_off" if lora else "frozen"
    options: dict[str, Any] = {"lora": lora, "dtype": torch.float64, "training": {"learning_rate": 5.0}}
    made = runs.trained(tmp_path, kl=kls, reference=reference, rollout=SAMPLED, update={"mini_batches": 1}, **options)
    first, second = runs.entries(made)
    assert first["kl/in_reward/exact"] == pytest.approx(0, abs=1e-9)
    assert second["kl/in_reward/exact"] > 1e-6
    for name in ("kl/in_loss/exact", "kl/monitor/exact"):
        assert second[name] == pytest.approx(second["kl/in_reward/exact"], rel=1e-6)


def test_an_exact_kl_in_the_loss_trains_alike_for_any_split(tmp_path):
    spec = {
        "output_dir": str(tmp_path),
        "algorithm": {"kl": [{"use": "in_loss", "beta": 0.5, "estimator": "exact"}], "reference": "frozen"},
    }
    begin = stepping.parameters(stepping.make_trainer(spec))
    whole = stepping.run(spec) - begin
    split = stepping.run({**spec, "training": {"per_device_train_batch_size": 1}}) - begin
    assert (whole - split).norm() < 1e-6 * whole.norm()


def test_a_clamped_kl_says_how_often_it_was_cut(tmp_path):
    kl = {"use": "in_loss", "estimator": "k2", "clamp": 1e-9}
    made = runs.trained(tmp_path, kl=[kl], reference="frozen", update={"mini_batches": 1})
    first, second = runs.entries(made)
    assert first["kl/in_loss/clamp_frac"] == 0
    assert 0.5 < second["kl/in_loss/clamp_frac"] <= 1
    assert second["kl/in_loss/k2"] < 1e-6


# Selection, filters after the estimator, texts


@dataclass(kw_only=True)
class Picks(PolicyLoss):
    """Trains on the half of the rollout's tokens with the larger advantage."""

    name: ClassVar[str] = "picks"
    needs: ClassVar[frozenset[str]] = frozenset({"old_logps", "selected"})
    calls: list[Any] = field(default_factory=list)

    def select(self, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        self.calls.append(tuple(mask.shape))
        return (advantages > advantages[mask > 0].median()).to(mask.dtype)

    def __call__(  # type: ignore[override]
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, selected: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -logps * advantages * selected * mask, {"picked": selected}


def test_a_loss_selects_once_per_rollout_over_all_rows(tmp_path):
    for rows in (64, 1):
        picks = Picks()
        training = {"per_device_train_batch_size": rows, "max_steps": 4}
        update = {"mini_batches": 2, "epochs": 2}
        made = runs.trained(tmp_path, policy_loss=picks, rollout=SAMPLED, update=update, training=training)
        assert len(picks.calls) == 1
        assert picks.calls[0][0] == 8
        assert 0 < runs.entries(made)[0]["policy/picked"] < 1


@dataclass(kw_only=True)
class Gains(Filter):
    """Keeps rows with a positive advantage."""

    name: ClassVar[str] = "gains"
    needs: ClassVar[frozenset[str]] = frozenset({"advantages"})

    def __call__(self, scored: Scored) -> Tensor:
        assert scored.advantages is not None
        return (scored.advantages * scored.mask).sum(1) > 0


def test_a_filter_that_needs_advantages_drops_rows_after_they_were_computed(tmp_path):
    options: dict[str, Any] = {"rollout": {**SAMPLED, "num_generations": 6}, "advantages": "group_mean"}
    whole = runs.trainer(tmp_path, **options).collector.collect(0)
    kept = runs.trainer(tmp_path, filters=[Gains()], **options).collector.collect(0)
    gains = (whole.rows["advantages"] * whole.rows["mask"]).sum(1) > 0
    assert 0 < gains.sum() < len(gains)
    assert len(kept.mask) == int(gains.sum())
    assert torch.equal(kept.rows["advantages"], whole.rows["advantages"][gains])


@dataclass(kw_only=True)
class Recites(TextTerm):
    """The next-token loss on three fixed texts."""

    name: ClassVar[str] = "recites"
    coef: float = 1.0

    def texts(self, step: int) -> list[list[int]]:
        return [[10, 11, 12, 13], [20, 21 + step], [30, 31, 32]]

    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        return -self.coef * logps * mask


def test_a_term_with_texts_adds_their_next_token_loss(tmp_path):
    options: dict[str, Any] = {"dtype": torch.float64, "rollout": SAMPLED, "advantages": "group_mean"}
    one_step = {"max_steps": 1, "learning_rate": 1.0}
    without = runs.parameters(runs.trained(tmp_path, training=one_step, **options))
    for rows in (64, 1):
        training = {**one_step, "per_device_train_batch_size": rows}
        made = runs.trained(tmp_path, loss_terms=[Recites(coef=0.3)], training=training, **options)
        model, _ = tiny_policy(dtype=torch.float64)
        losses = []
        for ids in Recites().texts(0):
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            losses.append(-logits.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1))
        mean = torch.cat(losses).mean()
        mean.backward()
        moved = torch.cat([p.grad.flatten() for p in model.parameters()])
        found = without - runs.parameters(made)
        assert (found - 0.3 * moved).norm() < 1e-5 * moved.norm()
        assert runs.entries(made)[0]["plugin/recites/loss"] == pytest.approx(0.3 * mean.item(), rel=1e-5)


# A reference that moves, a step that is looked at again


def test_a_moving_reference_is_saved_with_the_checkpoint(tmp_path):
    kl = [{"use": "in_loss", "estimator": "k2"}]
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    reference = {"use": "sync", "every": 2, "mixing": 0.5}
    made = runs.trained(tmp_path, kl=kl, reference=reference, training=training)
    assert (Path(tmp_path) / "checkpoint-4" / "reference" / "model.safetensors").is_file()
    own = made.collector.forwards.reference.own
    start, _ = tiny_policy()
    for moved, first, now in zip(own.parameters(), start.parameters(), made.model.parameters(), strict=True):
        if not torch.equal(first, now):
            assert not torch.equal(moved, first)
            assert not torch.equal(moved, now)


def test_the_next_token_loss_of_texts_knows_no_temperature(tmp_path):
    losses = []
    for temperature in (1.0, 0.25):
        rollout = {**SAMPLED, "temperature": temperature}
        made = runs.trained(tmp_path, rollout=rollout, loss_terms=[Recites()], training={"max_steps": 1})
        losses.append(runs.entries(made)[0]["plugin/recites/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_algorithms_of_one_recipe_share_no_memory_and_keep_what_was_given():
    looks = Looks()
    kl = [{"use": "in_reward", "controller": "adaptive"}]
    recipe = runs.recipe(rollout=SAMPLED, advantages=looks, kl=kl, reference="frozen")
    first, second = recipe.algorithm(), recipe.algorithm()
    assert first.kl[0].controller is not second.kl[0].controller
    assert first.advantages is second.advantages is looks


@dataclass(kw_only=True)
class ByValue(Filter):
    """Keeps rows that the critic likes."""

    name: ClassVar[str] = "by_value"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    def __call__(self, scored: Scored) -> Tensor:
        assert scored.values is not None
        return (scored.values * scored.mask).sum(1) >= 0


def test_a_critic_without_returns_to_learn_is_refused():
    recipe = runs.recipe(critic="separate", filters=[ByValue()], update={"mini_batches": 1})
    (problem,) = recipe.algorithm().problems()
    assert "gives the critic no returns to learn: choose an estimator with a critic" in problem


def test_an_optimizer_given_beside_a_recipe_that_makes_its_own_is_refused(tmp_path):
    made = runs.trainer(tmp_path, optimizer="trpo", policy_loss="surrogate")
    made.optimizer, made._optimizer_given = torch.optim.SGD(made.model.parameters(), lr=0.1), True
    with pytest.raises(ValueError, match="optimizer=trpo creates its own"):
        made.create_optimizer()


def test_a_reference_behind_another_prompt_leaves_the_policys_own_rows_alone(tmp_path):
    """The recipe's reference has no key of its own, and the first step's ratio is 1."""
    chosen: dict[str, Any] = {"kl": [{"use": "in_reward"}], "update": {"mini_batches": 2}, "rollout": SAMPLED}
    context = {"use": "with_context", "context": "answer"}
    made = runs.trained(tmp_path, **chosen, reference=context, dtype=torch.float64)
    first, second = runs.entries(made)
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-9)
    assert abs(second["policy/ratio"] - 1) > 1e-8
