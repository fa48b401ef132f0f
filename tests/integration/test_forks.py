"""Forks and agents in whole runs: cutting an episode changes no gradient, log-probs are exact, and everything reads them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.axes import AdvantageEstimator, Environment, Model, Outcome, Task, Turn
from hf_rlhf.batch import Scored
from hf_rlhf.modeling.token_batch import TokenBatch, pieces_of
from hf_rlhf.runtime.errors import UserError
from tests.helpers import runs
from tests.helpers.environments import AtOnce, Duel, Forking, Hashed, Played1
from tests.helpers.episodes import user
from tests.integration.test_memory import of_llama, setting


def talk(cut: bool) -> Played1:
    """Three turns with words between them; with `cut` the policy speaks elsewhere before each further turn, untrained."""

    async def play(task: Task, model: Model) -> Outcome:
        messages, turns = list(task.messages), []
        for number in range(3):
            if cut and number:
                await model([user(f"z{number}")], train=False)
                turns.append(Turn())
            answer = await model(messages)
            worth = (zlib.crc32(str(answer["content"]).encode()) >> 8) % 7 / 3
            turns.append(Turn(reward=worth))
            if number == 1 and worth > 1.5:
                break
            messages += [answer, user("no, " + str(task.messages[0]["content"]))]
        return Outcome(turns=turns)

    return Played1(function=play, max_tokens=96)


WHOLE: dict[str, dict[str, Any]] = {
    "grpo": {"kl": [{"use": "in_loss", "beta": 0.1}], "reference": "frozen", "aggregation": "seq_mean_token_mean"},
    "sequence ratio": {"policy_loss": "gspo", "update": {"mini_batches": 2, "epochs": 2}},
    "critic": {"advantages": "gae", "critic": "value_head", "aggregation": "token_mean"},
    "separate critic": {"advantages": "gae", "critic": "separate", "policy_loss": "cispo"},
    "reward to go": {"advantages": {"use": "reward_to_go", "gamma": 0.9}, "aggregation": "seq_mean_token_sum_norm"},
    "leave one out": {
        "advantages": "leave_one_out",
        "kl": [{"use": "in_reward", "beta": 0.1}],
        "reference": "frozen",
        "policy_loss": "gmpo",
        "aggregation": "prompt_mean",
    },
    "optimal baseline": {
        "advantages": {"use": "optimal_token_baseline", "align": "sampled"},
        "policy_loss": "reinforce",
    },
    "turns": {"advantages": "turn_group_norm"},
    "turns of a critic": {"advantages": "turn_gae", "critic": "value_head"},
    "states": {"advantages": "gigpo"},
    "padded": {
        "advantages": "group_norm",
        "filters": [{"use": "zero_variance", "resample": 1}],
        "update": {"attention": "padded"},
    },
}


@pytest.mark.parametrize("parts", WHOLE.values(), ids=WHOLE.keys())
def test_cutting_an_episode_into_forks_changes_no_gradient(parts: dict[str, Any], tmp_path: Path) -> None:
    """The environment's words are in the completion with mask 0, or in the contexts of forks."""
    rollout, made = Hashed(prompts=4, num_generations=4), []
    for cut in (False, True):
        options: dict[str, Any] = {"update": {"mini_batches": 2, "epochs": 2}, **parts, "rewards": ["episode"]}
        folder, environment = tmp_path / str(cut), [talk(cut)]
        made.append(runs.trained(folder, rollout=rollout, environment=environment, dtype=torch.float64, **options))
    one, other = map(runs.parameters, made)
    options = {name: x for name, x in parts.items() if name in ("critic", "advantages")} | {"rewards": ["episode"]}
    new = runs.trainer(tmp_path / "start", rollout=rollout, environment=[talk(True)], dtype=torch.float64, **options)
    start = runs.parameters(new)
    assert (one - start).norm() > 1e-3
    assert (one - other).norm() / (one - start).norm() < 1e-6  # norms round each token's gradient to float32
    first, second = (runs.entries(x)[0] for x in made)
    assert (first["environment/forks/mean"], second["environment/forks/mean"] > 2) == (0, True)
    for name in ("loss", "reward/total/mean", "rollout/length/mean", "advantage/std"):
        assert first.get(name) == pytest.approx(second.get(name), rel=1e-9)


def forked(folder: Path, **parts: Any) -> Any:
    rollout = {**runs.SAMPLED, "max_new_tokens": 3}
    environment = parts.pop("environment", [Forking()])
    return runs.trained(folder, rollout=rollout, environment=environment, rewards=["episode", runs.FORMAT], **parts)


@pytest.mark.parametrize(("environment", "forks"), [(Forking(), 3), (AtOnce(), 0)], ids=["forks", "agents at once"])
def test_log_probs_of_sampler_and_trainer_agree(environment: Environment, forks: int, tmp_path: Path) -> None:
    made = forked(tmp_path, environment=[environment], rollout_correction="truncated")
    found = [entry for entry in runs.entries(made) if "rollout/rows" in entry]
    assert found
    for entry in found:
        assert entry["environment/forks/mean"] == forks
        assert entry["rollout/sampler_gap/max"] <= 2e-5


PARTS: dict[str, dict[str, Any]] = {
    "critic": {"advantages": "gae", "critic": "value_head"},
    "separate critic": {"advantages": "gae", "critic": "separate"},
    "kl": {"kl": [{"use": "in_reward", "beta": 0.1}], "reference": "frozen"},
    "distributions": {"kl": [{"use": "in_loss", "beta": 0.1, "estimator": "jsd"}], "reference": "frozen"},
    "resampled": {"filters": [{"use": "zero_variance", "resample": 2}]},
    "padded": {"update": {"attention": "padded"}},
    "gspo": {"policy_loss": "gspo"},
    "greedy": {"advantages": {"use": "baseline", "baseline": "greedy"}},
    "lora": {"lora": True},
    "few tokens": {"update": {"max_tokens_per_micro_batch": 40}},
}


@pytest.mark.parametrize(
    "environment",
    [Forking(), Duel()],
    ids=["forks", "agents"],
)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_forks_and_agents_train_with_everything(
    parts: dict[str, Any], environment: Environment, tmp_path: Path
) -> None:
    made = forked(tmp_path, environment=[environment], **parts)
    assert len(runs.entries(made)) == 2


@pytest.mark.parametrize(
    "environment",
    [Forking(), Duel(), AtOnce()],
    ids=["forks", "agents", "agents at once"],
)
def test_the_split_into_micro_batches_and_their_layout_change_no_parameters(
    environment: Environment, tmp_path: Path
) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"update": {"mini_batches": 2, "attention": "padded"}},
        {"update": {"mini_batches": 2, "max_tokens_per_micro_batch": 30}},
        {"training": {"per_device_train_batch_size": 1}},
    ]
    made = [
        forked(tmp_path / str(i), environment=[environment], dtype=torch.float64, **way) for i, way in enumerate(ways)
    ]
    for other in made[1:]:
        torch.testing.assert_close(runs.parameters(other), runs.parameters(made[0]), rtol=0, atol=1e-7)


@dataclass(kw_only=True)
class Seen(AdvantageEstimator):
    """Keeps what it was given."""

    name = "seen"

    def __post_init__(self) -> None:
        self.seen: list[Scored] = []

    def __call__(self, scored: Scored) -> torch.Tensor:
        self.seen.append(scored)
        return scored.mask


def test_groups_are_of_one_prompt_and_agent_and_episodes_tie_agents_together(tmp_path: Path) -> None:
    seen = Seen()
    made = forked(tmp_path, environment=[Duel()], advantages=seen, update={"mini_batches": 1})
    scored = seen.seen[0]
    assert scored.agents is not None
    assert scored.episode_ids is not None
    assert len(scored.mask) == 2 * 4 * 4
    assert scored.group_size().tolist() == [4] * 32
    for group in scored.group_ids.unique():
        own = scored.group_ids == group
        assert len(scored.agents[own].unique()) == 1
        assert len(scored.episode_ids[own].unique()) == 4
    for episode in scored.episode_ids.unique():
        own = scored.episode_ids == episode
        assert sorted(scored.agents[own].tolist()) == [0, 1]
        assert scored.returns()[own].sum().item() == pytest.approx(1.0, abs=2.0)
    entry = runs.entries(made)[0]
    assert (entry["rollout/rows"], entry["rollout/prompts_drawn"]) == (32, 4)
    assert 2 <= entry["environment/turns/mean"] <= 3


def test_an_evaluation_counts_an_episode_once_by_the_agent_asked_first(tmp_path: Path) -> None:
    rollout = {**runs.SAMPLED, "max_new_tokens": 3}
    options: dict[str, Any] = {"evaluation": {"num_generations": 4}, "eval_data": runs.problems(3)}
    made = runs.trainer(tmp_path, rollout=rollout, environment=[Duel()], rewards=["episode"], **options)
    found = made.evaluate()
    assert {"eval_pass@2", "eval_pass@4", "eval_accuracy"} <= found.keys()
    assert 0 <= found["eval_accuracy"] <= found["eval_pass@2"] <= found["eval_pass@4"] <= 1


@pytest.mark.parametrize(
    "environment",
    [Forking(), Duel()],
    ids=["forks", "agents"],
)
def test_a_run_resumes_bit_identically_between_the_steps_of_a_rollout(environment: Environment, tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "environment": [environment],
        "kl": [{"use": "in_loss", "beta": 0.1}],
        "reference": "frozen",
    }
    rollout = {**runs.SAMPLED, "max_new_tokens": 3}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    options: dict[str, Any] = {"rollout": rollout, "rewards": ["episode"], "training": settings, **parts}
    whole = runs.trained(tmp_path, **options)
    again = runs.trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again.close()
    assert torch.equal(runs.parameters(whole), runs.parameters(again))


async def asks_again(task: Task, model: Model) -> float:
    """A fork that begins with the prompt: the same question once more, after a second turn."""
    first = await model(task.messages)
    await model([*task.messages, first, user("cd")])
    await model(task.messages)
    return float(len(str(first["content"])))


HINTED: dict[str, Any] = {
    "kl": [{"use": "in_loss", "beta": 0.1}],
    "reference": {"use": "with_context", "of": "frozen", "context": "answer"},
}


def test_a_reference_with_context_reads_forks_behind_the_context(tmp_path: Path) -> None:
    environment = Played1(function=asks_again, max_tokens=64)
    rollout = {**runs.SAMPLED, "max_new_tokens": 3}
    made = runs.trainer(tmp_path, rollout=rollout, environment=[environment], rewards=["episode"], **HINTED)
    buffer = made.collector.collect(0)
    (prompts,) = buffer.prompts.values()
    found, mask = buffer.rows["ref_logps"], buffer.rows["mask"]
    for i, (own, hinted) in enumerate(zip(buffer.prompt_ids, prompts, strict=True)):
        assert own != hinted
        assert len(buffer.forks[i]) == 1
        completion = buffer.completion_ids[i]
        for start, stop, before in pieces_of(own, len(completion), buffer.forks[i]):
            context = [*hinted, *before[len(own) :]]
            alone = TokenBatch([context], [completion[start:stop]], mask[i : i + 1, start:stop], 0)
            with torch.no_grad():
                due = made.actor_critic(alone)["logps"][0]
            torch.testing.assert_close(found[i, start:stop], due, rtol=0, atol=2e-5)
    made.close()


def test_a_reference_with_context_refuses_a_fork_that_has_not_the_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reference=with_context puts a context into the prompt of a row"):
        forked(tmp_path, **HINTED)


def test_the_forecast_of_memory_counts_agents_and_the_forks_of_as_rendered() -> None:
    """Of 4 x 4 episodes of at most 64 tokens after 20: two agents are two rows; three turns, each read whole, are 2 rows."""
    many = {"training": {"per_device_train_batch_size": 96}}
    plain, agents, rendered, padded = (
        of_llama(setting(rollout=runs.SAMPLED, environment=[environment], **parts)).phases["update"]["activations"]
        for environment, parts in (
            (Forking(), many),
            (Duel(), many),
            (Forking(history="as_rendered", max_turns=3), many),
            (Forking(history="as_rendered", max_turns=3), many | {"update": {"attention": "padded"}}),
        )
    )
    assert agents == 2 * plain
    assert rendered / plain == pytest.approx((4 * 20 + 16 * 2 * 64) / (4 * 20 + 16 * 64))
    assert padded / plain == pytest.approx(16 * 3 * (20 + 64) / (4 * 20 + 16 * 64))
    few = setting(rollout=runs.SAMPLED, environment=[Duel()])
    one = setting(rollout=runs.SAMPLED, environment=[Forking()])
    caches = [of_llama(made).phases["rollout"]["cache"] for made in (one, few)]
    assert caches[1] > caches[0]
