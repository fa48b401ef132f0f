"""Critic, reference and reward model on devices of their own: what runs at the same time, and that nothing else changes.

A machine without accelerators has one device under several names, cpu:1, cpu:2 and so on.
"""

from __future__ import annotations

import threading

import pytest
import torch

from hf_rlhf.config.schedule import beside_forwards, schedule
from hf_rlhf.runtime.background import run_by_device
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.logprobs import Forwards
from hf_rlhf.training.setup import AlgorithmError
from hf_rlhf_plugins.rewards._models.classifier import ModelReward
from tests.helpers import runs
from tests.helpers.classifiers import save_sequence_classifier

OWN = torch.device("cpu")


def parts(folder, critic=None, reference=None, reward="auto"):
    model = {"use": "reward_model", "model": save_sequence_classifier(folder), "device": reward, "label": "rm"}
    return {
        "rewards": [runs.FORMAT, model],
        "advantages": "gae",
        "critic": {"use": "separate", "device": critic},
        "kl": ["in_reward"],
        "reference": {"use": "model", "path": str(folder / "teacher"), "device": reference},
    }


@pytest.fixture
def folder(tmp_path):
    policy, tokenizer = tiny_policy(seed=7)
    for x in (policy, tokenizer):
        x.save_pretrained(tmp_path / "teacher")
    return tmp_path


def test_models_on_several_devices_run_at_the_same_time_and_train_the_same_bits(folder, monkeypatch):
    together = runs.trained(folder / "one", **parts(folder))
    meet, over_rows, session = threading.Barrier(4), Forwards._over_rows, ModelReward._session

    def waits(method):
        def called(*args, **kwargs):
            meet.wait(timeout=30)  # raises if they come one after another
            return method(*args, **kwargs)

        return called

    monkeypatch.setattr(Forwards, "_over_rows", waits(over_rows))
    monkeypatch.setattr(ModelReward, "_session", waits(session))
    apart = runs.trained(folder / "four", **parts(folder, "cpu:1", "cpu:2", "cpu:3"))
    assert not meet.broken
    for name, x in together.actor_critic.state_dict().items():
        assert torch.equal(x, apart.actor_critic.state_dict()[name]), name


def test_works_of_one_device_follow_each_other_and_an_error_ends_all():
    order, meet = [], threading.Barrier(2)

    def work(name, first):
        def run():
            if first:
                meet.wait(timeout=30)
            order.append(name)
            return name

        return run

    devices = [OWN, torch.device("cpu:1")]
    works = [(devices[i % 2], work(f"{i % 2}{i // 2}", i < 2)) for i in range(4)]
    assert run_by_device(works) == ["00", "10", "01", "11"]
    assert [x for x in order if x[0] == "1"] == ["10", "11"]
    with pytest.raises(ZeroDivisionError):
        run_by_device([(devices[0], int), (devices[1], lambda: 1 / 0)])
    assert run_by_device([]) == []


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        ((None, None, "auto"), []),
        (("cpu:1", None, "auto"), ["at the same time: policy, reference on cpu | critic on cpu:1; then the rewards"]),
        (
            ("cpu:1", "cpu:1", "cpu:1"),
            ["at the same time: policy on cpu | critic, reference on cpu:1; then the rewards"],
        ),
        (
            (None, "cpu:1", "cpu:2"),
            ["at the same time: policy, critic on cpu | reference on cpu:1 | reward model rm on cpu:2"],
        ),
    ],
)
def test_the_plan_says_what_runs_at_the_same_time(folder, devices, told):
    algorithm = runs.recipe(**parts(folder, *devices)).algorithm()
    assert list(schedule(algorithm, OWN)) == told
    assert beside_forwards(algorithm, OWN) == ("rm" in str(told))


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        ({"device": "cpu:1", "offload": True}, "critic.offload moves it to the policy's device"),
        ({"device": "gpu0"}, "critic.device must be cpu, cuda:N or another device of torch, got 'gpu0'"),
    ],
)
def test_a_device_that_cannot_be_is_refused(tmp_path, critic, message):
    with pytest.raises(AlgorithmError, match=message):
        runs.trainer(tmp_path, advantages="gae", critic={"use": "separate", **critic})
