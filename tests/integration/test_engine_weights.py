"""Runs whose engine samples from a copy of the weights: it always has those of the policy, and what fails is saved."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.axes import Environment, Model, Task
from hf_rlhf.batch import Completions
from hf_rlhf.training.completion_checks import check_completions
from hf_rlhf_plugins import _http
from hf_rlhf_plugins._http import HttpError
from tests.helpers import runs
from tests.helpers.environments import Duel, Forking
from tests.helpers.runs import parameters
from tests.helpers.servers import Raw
from tests.helpers.vllm_stub import GENERATE, LOAD_ADAPTER, ROUTES, Stub
from tests.helpers.waits import scaled

PROMPTS = [{"prompt": f"{i}+1="} for i in range(6)]
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def trainer(folder: Path, server: Stub, steps: int = 4, training: dict[str, Any] | None = None, **parts: Any) -> Any:
    rollout = {**runs.SAMPLED, "use": "vllm", "url": server.url, "request_retries": 1, **parts.pop("rollout", {})}
    settings = {"max_steps": steps, "learning_rate": 2.0, **(training or {})}
    return runs.trainer(folder, rollout=rollout, training=settings, data=PROMPTS, eval_data=PROMPTS[:2], **parts)


def versions(server: Stub, made: Any) -> list[str]:
    """The versions that the server was sent, without the run's id."""
    sent = [body["new_version"].partition(":") for body in server.sent("/update_weight_version")]
    assert {run for run, _, _ in sent} == {made.run_id}
    return [step for _, _, step in sent]


def logged(made: Any, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def test_weights_go_to_the_engine_when_they_have_changed_and_the_gap_is_logged_in_every_rollout(tmp_path):
    average = {"update": {"mini_batches": 2, "ema": 0.9}, "evaluation": {"ema": True}}
    with Stub(tmp_path / "model") as server:
        made = trainer(tmp_path / "run", server, **average)
        made.evaluate()
        made.train()
        made.evaluate()
        made.close()
        assert versions(server, made) == ["0", "0:ema", "0", "2", "4", "4:ema"]
    assert len(logged(made, "rollout/sampler_gap/mean")) == 2, "one for each rollout"
    assert max(logged(made, "rollout/sampler_gap/max")) < 1e-5
    assert len(logged(made, "time/sync_s")) == 2


def test_one_optimizer_step_per_rollout_compares_too(tmp_path):
    with Stub(tmp_path / "model") as server:
        made = trainer(tmp_path / "run", server, steps=2, update={"mini_batches": 1})
        made.train()
        made.close()
    assert max(logged(made, "rollout/sampler_gap/max")) < 1e-5


def test_episodes_of_several_turns_are_sampled_from_the_copy(tmp_path):
    twice = [{"use": "second_chance", "max_tokens": 32, "says": "no {prompt}"}]
    rows = [{**row, "answer": "5"} for row in PROMPTS]
    with Stub(tmp_path / "model") as server:
        rollout = {**runs.SAMPLED, "use": "vllm", "url": server.url, "max_new_tokens": 3}
        made = runs.trainer(
            tmp_path / "run", rollout=rollout, environment=twice, rewards=["episode", runs.FORMAT], data=rows
        )
        made.train()
        made.close()
        longest = max(len(body["token_ids"]) for body in server.sent(GENERATE)[1:])
    assert longest > 8, "the second turn is asked for with the first one before it"
    assert max(logged(made, "rollout/sampler_gap/max")) < 1e-5
    assert logged(made, "environment/turns/mean")[0] > 1.5


@pytest.mark.parametrize("environment", [Forking(), Duel()], ids=["forks", "agents"])
def test_forks_and_agents_are_sampled_from_the_copy(environment, tmp_path):
    with Stub(tmp_path / "model") as server:
        rollout = {**runs.SAMPLED, "use": "vllm", "url": server.url, "max_new_tokens": 3}
        made = runs.trainer(
            tmp_path / "run", rollout=rollout, environment=[environment], rewards=["episode"], data=PROMPTS
        )
        made.train()
        made.close()
    assert max(logged(made, "rollout/sampler_gap/max")) < 1e-5
    assert logged(made, "environment/turns/mean")[0] > 1.9
    assert logged(made, "environment/forks/mean")[0] == (3 if environment.name == "forking" else 0)


@dataclass(kw_only=True)
class Patient(Environment):
    """The first episode of a rollout goes on when all others have ended."""

    name = "patient"

    max_tokens: int = 64

    async def play(self, task: Task, model: Model) -> float:
        place = next(self.places) % 16
        if place == 0:
            self.ended = asyncio.Event()
        answer = await model(task.messages)
        if place == 0:
            await asyncio.wait_for(self.ended.wait(), scaled(10))
        words = [*task.messages, answer, {"role": "user", "content": "again"}]
        last = await model(words, stop=["a", "e"], max_tokens=4)
        if place == 0:
            return 0.0
        self.done += 1
        if self.done % 15 == 0:
            self.ended.set()
        return float(len(str(last["content"])))

    def __post_init__(self) -> None:
        self.places, self.done = itertools.count(), 0


def test_no_episode_waits_for_another_where_requests_are_served_one_by_one(tmp_path, caplog):
    """And a resumed run, which says that it may differ, ends as the run that was not stopped if the server repeats itself."""
    with Stub(tmp_path / "model") as server:

        def run(name: str, steps: int, resume: bool = False) -> Any:
            rollout = {**runs.SAMPLED, "use": "vllm", "url": server.url, "max_new_tokens": 3}
            parts: dict[str, Any] = {"environment": [Patient()], "rewards": ["episode"], "data": PROMPTS}
            training = {"max_steps": steps, **SAVING}
            made = runs.trainer(tmp_path / name, rollout=rollout, training=training, **parts)
            made.train(resume_from_checkpoint=resume or None)
            made.close()
            return made

        whole = run("whole", 6)
        assert any("a resumed run repeats them only as far" in remark for remark in whole.plan.remarks)
        assert not any("run free" in line for line in caplog.messages)
        run("run", 4)
        assert torch.equal(parameters(whole), parameters(run("run", 6, resume=True)))
        assert any("episodes run free" in line for line in caplog.messages)
    assert max(logged(whole, "rollout/sampler_gap/max")) < 1e-5
    assert logged(whole, "environment/turns/mean") == [2.0] * 3
    stops = [body["sampling_params"].get("stop") for body in server.sent(GENERATE)]
    assert stops.count(["a", "e"]) == 6 * 16, "every second turn of six rollouts"


def test_a_resumed_run_sends_its_weights_and_ends_as_the_run_that_was_not_interrupted(tmp_path):
    with Stub(tmp_path / "model") as server:
        whole = trainer(tmp_path / "whole", server, steps=6)
        whole.train()
        whole.close()
        first = trainer(tmp_path / "run", server, steps=4, training=SAVING)
        first.train()
        first.close()
        server.restart()
        server.requests.clear()
        resumed = trainer(tmp_path / "run", server, steps=6, training=SAVING)
        resumed.train(resume_from_checkpoint=True)
        resumed.close()
        assert versions(server, resumed) == ["4"]
    assert torch.equal(parameters(whole), parameters(resumed))


def test_a_server_that_is_gone_ends_the_run_with_a_checkpoint_that_goes_on_when_it_is_back(tmp_path):
    with Stub(tmp_path / "model") as server:
        whole = trainer(tmp_path / "whole", server)
        whole.train()
        whole.close()
        failing = trainer(tmp_path / "run", server)
        before = server.counts[GENERATE]
        server.trouble = lambda route, body, number: Raw(status=503) if number > before + 6 else None
        with pytest.raises(HttpError, match=r"HTTP 503: '' \(tried 2 times\)") as ended:
            failing.train()
        failing.close()
        assert "checkpoint-2 is whole" in "".join(ended.value.__notes__)
        server.trouble = lambda route, body, number: None
        server.restart()
        again = trainer(tmp_path / "run", server)
        again.train(resume_from_checkpoint=True)
        again.close()
    assert torch.equal(parameters(whole), parameters(again))


def test_a_server_that_is_started_again_in_mid_run_changes_nothing(tmp_path):
    with Stub(tmp_path / "model") as server:
        whole = trainer(tmp_path / "whole", server)
        whole.train()
        whole.close()
        other = trainer(tmp_path / "run", server, rollout={"request_retries": 2})  # a retry may be what falls next
        start = server.counts[GENERATE]

        def falls(route: str, body: Any, number: int) -> Any:
            if route == GENERATE and number in (start + 3, start + 8):
                server.restart()
                return Raw(drop=True)
            return None

        server.trouble = falls
        other.train()
        other.close()
    assert torch.equal(parameters(whole), parameters(other))


def test_an_engine_that_is_another_model_ends_the_run_before_the_update(tmp_path):
    def tilted(route: str, body: Any, number: int) -> Any:
        if route != GENERATE or number == 0:
            return None
        found = server._generate(body["token_ids"], body["sampling_params"])
        for choice in found["choices"]:
            for x in choice["logprobs"]["content"]:
                x["logprob"] -= 0.2
        return found

    with Stub(tmp_path / "model", tilted) as server:
        made = trainer(tmp_path / "run", server)
        start = parameters(made).clone()
        with pytest.raises(RuntimeError, match=r"differ by 0.2 nats per token, more than rollout.max_sampler_gap=0.05"):
            made.train()
        made.close()
    assert torch.equal(parameters(made), start)
    with Stub(tmp_path / "model", tilted) as server:
        made = trainer(tmp_path / "logged", server, steps=2, rollout={"max_sampler_gap": None})
        made.train()
        made.close()
    assert logged(made, "rollout/sampler_gap/mean") == [pytest.approx(0.2, abs=0.06)], (
        "one prompt of four is not tilted"
    )
    assert logged(made, "rollout/sampler_gap/beyond_clip")[0] > 0.7, "e^0.2 is 1.22"


def test_under_autocast_the_first_rollout_measures_the_gap_of_the_others(tmp_path):
    with Stub(tmp_path / "model", dtype="torch.bfloat16") as server:
        made = trainer(tmp_path / "run", server, training={"bf16": True, "logging_steps": 1})
        made.train()
        made.close()
    first, limits = logged(made, "rollout/sampler_gap/mean")[0], logged(made, "rollout/sampler_gap/limit")
    assert 1e-5 < first < 0.05
    assert limits == pytest.approx([max(1e-3, 3 * first)] * len(limits))
    assert logged(made, "rollout/sampler_gap/beyond_clip")[0] == 0.0


def test_of_a_policy_with_an_adapter_the_adapter_alone_is_sent(tmp_path):
    with Stub(tmp_path / "model", lora_rank=8) as server:
        made = trainer(tmp_path / "run", server, lora=True)
        made.train()
        before = server.counts[LOAD_ADAPTER]
        made.evaluate()
        server.restart()
        made.evaluate()
        made.close()
        assert not any("args" in body and body["method"] == "hf_rlhf_load" for body in server.sent("/collective_rpc"))
        assert (before, server.counts[LOAD_ADAPTER]) == (2, 4), "each version once, and again after a restart"
    assert max(logged(made, "rollout/sampler_gap/max")) < 1e-5


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({}, "loads adapters up to rank 0: start it with --enable-lora --max-lora-rank 8"),
        ({"lora_rank": 1}, "loads adapters up to rank 1: start it with --enable-lora --max-lora-rank 8"),
        (
            {"lora_rank": 8, "routes": ROUTES[:-1]},
            "start it with the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
    ],
)
def test_a_server_that_cannot_load_the_adapter_is_refused(tmp_path, server, said):
    with Stub(tmp_path / "model", **server) as stub, pytest.raises(ValueError, match=said):
        trainer(tmp_path / "run", stub, lora=True)


def test_truncated_sampling_with_a_correction_is_refused(tmp_path):
    with Stub(tmp_path / "model") as server:
        with pytest.raises(ValueError, match="needs sampler_logps and nothing provides them"):
            trainer(tmp_path / "cut", server, rollout={"top_p": 0.9}, rollout_correction="truncated")
        corrected = trainer(tmp_path / "corrected", server, steps=2, rollout_correction="truncated")
        corrected.train()
        corrected.close()
    assert logged(corrected, "rollout/is_ratio/mean") == [pytest.approx(1.0, abs=1e-5)]


def test_the_weights_of_each_row_are_recorded_and_others_than_were_asked_for_are_an_error(tmp_path):
    algorithm = runs.trainer(tmp_path / "local").algorithm
    local = Completions(ids=[[1], [2]], finish_reasons=["stop"] * 2)
    check_completions(algorithm, local, 2, sampled=False, version="run:1")
    assert local.versions == ["run:1"] * 2
    stale = Completions(ids=[[1], [2]], finish_reasons=["stop"] * 2, versions=["run:1", "run:0"])
    with pytest.raises(ValueError, match="must sample every row from the weights run:1, got 2 rows from run:0, run:1"):
        check_completions(algorithm, stale, 2, sampled=False, version="run:1")
    with Stub(tmp_path / "model") as server:
        made = trainer(tmp_path / "run", server)
        buffer = made.collector.collect(0)
        made.close()
    assert set(buffer.extra["texts"]["weights"]) == {f"{made.run_id}:0"}
