"""What a plugin returns is checked in a run: the error names the plugin, what it must return and what it gave."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_rlhf import load_plugin
from hf_rlhf.axes import AXES, check_output
from hf_rlhf.batch import Credit
from hf_rlhf.contract.outputs import SEEN, PluginOutputError
from hf_rlhf.training import collector, losses, rollout_buffer
from tests.helpers import runs

Spoil = Callable[[Any], Any]


def spoiled(axis: str, name: str, method: str, spoil: Spoil, **settings: Any) -> Any:
    """A plugin one of whose methods returns something else."""
    plugin = load_plugin(axis, name, **settings)
    right = type(plugin)

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        return spoil(getattr(right, method)(self, *args, **kwargs))

    own = type(right.__name__, (right,), {method: wrong, "__module__": __name__, "__doc__": right.__doc__})
    return own(**{field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin) if field.init})


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[0] = torch.nan
    return x


WRONG: dict[str, tuple[Spoil, str]] = {
    "none": (lambda x: None, r"got None|must be a tensor, got None"),
    "text": (lambda x: "all good", "got a str"),
    "shape": (lambda x: x[:1], r"must have shape \(.*\) = \(\d.*\), got \(1,.*\)"),
    "too many dimensions": (lambda x: x.unsqueeze(-1), r"must have shape .*, got \(.*, 1\)"),
    "dtype": (lambda x: x.long(), r"must be (float32 or float64|bool), got int64"),
    "half": (lambda x: x.bfloat16(), r"must be (float32 or float64|bool), got bfloat16"),
    "device": (lambda x: x.to("meta"), "must be on cpu, got meta"),
    "nan": (with_nan, r"must be finite, also off the mask, got nan in row 0"),
    "inf": (lambda x: with_nan(x).nan_to_num(torch.inf), r"must be finite, also off the mask, got inf in row 0"),
}
TENSOR = tuple(WRONG)
NUMBERS = ("nan", "inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A plugin in a recipe, and the method whose result is spoiled."""

    axis: str
    name: str
    parts: Callable[[Any], dict[str, Any]]
    method: str = "__call__"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    wraps: Callable[[Spoil], Spoil] = lambda spoil: spoil
    """From a spoilt tensor to a spoilt result."""
    kinds: tuple[str, ...] = TENSOR
    differentiable: bool = False

    @property
    def title(self) -> str:
        return f"{self.axis}={self.name}" + ("" if self.method == "__call__" else f": {self.method}")


def in_list(axis: str) -> Callable[[Any], dict[str, Any]]:
    return lambda plugin: {axis: [plugin]}


def alone(axis: str) -> Callable[[Any], dict[str, Any]]:
    return lambda plugin: {axis: plugin}


def kl(place: str, **more: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda plugin: {"kl": [{"use": place, "estimator": plugin, **more}], "reference": "frozen"}


FROZEN = {"reference": "frozen"}
SAMPLED = {"rollout": {**runs.SAMPLED}}
PAIR = {"wraps": lambda spoil: lambda pair: (spoil(pair[0]), pair[1])}
CREDIT: dict[str, Any] = {
    "wraps": lambda spoil: lambda credit: dataclasses.replace(credit, returns=spoil(credit.returns)),
    "kinds": tuple(kind for kind in TENSOR if kind != "none"),
}
GAE = {"critic": "value_head"}
CASES = {
    "advantages": Case(axis="advantages", name="group_norm", parts=alone("advantages")),
    "returns": Case(axis="advantages", name="gae", parts=lambda x: {"advantages": x, **GAE}, **CREDIT),
    "baseline": Case(axis="baseline", name="ema", parts=lambda x: {"advantages": {"use": "baseline", "baseline": x}}),
    "filter": Case(axis="filters", name="zero_variance", parts=in_list("filters")),
    "kl_estimator in the loss": Case(axis="kl_estimator", name="k3", parts=kl("in_loss"), differentiable=True),
    "kl_estimator in the reward": Case(axis="kl_estimator", name="k1", parts=kl("in_reward")),
    "full distribution": Case(axis="kl_estimator", name="exact", parts=kl("in_loss"), differentiable=True),
    "sequence level": Case(axis="kl_estimator", name="k2", parts=kl("in_loss", level="sequence"), differentiable=True),
    "penalty in the loss": Case(
        axis="kl",
        name="in_loss",
        method="loss_penalty",
        parts=lambda x: {"kl": [x], **FROZEN},
        differentiable=True,
    ),
    "penalty in the reward": Case(
        axis="kl", name="in_reward", method="reward_penalty", parts=lambda x: {"kl": [x], **FROZEN}
    ),
    "penalty in the advantage": Case(
        axis="kl", name="in_advantage", method="advantage_penalty", parts=lambda x: {"kl": [x], **FROZEN}
    ),
    "policy_loss": Case(axis="policy_loss", name="ppo_clip", parts=alone("policy_loss"), differentiable=True, **PAIR),
    "policy_loss of rows": Case(
        axis="policy_loss", name="gspo", parts=alone("policy_loss"), differentiable=True, **PAIR
    ),
    "select": Case(axis="policy_loss", name="clip_cov", method="select", parts=alone("policy_loss")),
    "aggregation": Case(axis="aggregation", name="token_mean", parts=alone("aggregation")),
    "loss_terms": Case(axis="loss_terms", name="entropy", parts=in_list("loss_terms"), differentiable=True),
    "weights of a term": Case(axis="loss_terms", name="entropy", method="weights", parts=in_list("loss_terms")),
    "correction": Case(
        axis="rollout_correction", name="truncated", parts=lambda x: {"rollout_correction": x, **SAMPLED}
    ),
}


def message_of(folder: Any, case: Case, spoil: Spoil) -> str:
    """The error of a run with the spoilt plugin."""
    plugin = spoiled(case.axis, case.name, case.method, case.wraps(spoil), **case.settings)
    with pytest.raises((PluginOutputError, FloatingPointError)) as error:
        runs.trained(folder, training={"max_steps": 4}, **case.parts(plugin))
    return str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_result_is_named_with_what_it_must_be(name, tmp_path):
    case = CASES[name]
    for kind in case.kinds:
        if kind in NUMBERS and case.axis == "filters":
            continue
        said = message_of(tmp_path, case, WRONG[kind][0])
        assert f"{case.title} must return " in said, (kind, said)
        assert re.search(WRONG[kind][1], said), (kind, said)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differentiable])
@pytest.mark.parametrize("fused_loss", ["auto", "off"])
def test_a_loss_without_a_gradient_is_named(name, fused_loss, tmp_path):
    case = CASES[name]
    plugin = spoiled(case.axis, case.name, case.method, case.wraps(lambda x: x.detach()))
    with pytest.raises(PluginOutputError, match=f"{re.escape(case.title)} must return .*must have a gradient"):
        runs.trained(tmp_path, **case.parts(plugin), update={"mini_batches": 2, "fused_loss": fused_loss})


def test_a_gradient_is_asked_for_after_a_rollout_of_the_same_shape_that_needs_none():
    plugin, logps = load_plugin("kl_estimator", "k3"), torch.zeros(2, 3, requires_grad=True)
    with torch.no_grad():
        check_output("kl_estimator", plugin, torch.zeros(2, 3), logps, inputs={"logps": logps})
    with pytest.raises(PluginOutputError, match=r"kl_estimator=k3 must return .*must have a gradient"):
        check_output("kl_estimator", plugin, torch.zeros(2, 3), logps, inputs={"logps": logps})


@pytest.mark.parametrize("kind", TENSOR)
@pytest.mark.parametrize("place", ["in_reward", "in_loss", "in_advantage"])
def test_an_estimator_that_is_wrong_on_rollouts_alone_is_named_too(place, kind, tmp_path):
    spoil, says = WRONG[kind]
    plugin = spoiled("kl_estimator", "k3", "__call__", lambda x: spoil(x) if x.dim() == 2 and len(x) > 1 else x)
    parts = {**kl(place)(plugin), "update": {"mini_batches": 2, "fused_loss": "off"}, "training": {"max_steps": 4}}
    with pytest.raises((PluginOutputError, FloatingPointError), match=f"kl_estimator=k3 must return .*({says})"):
        runs.trained(tmp_path, **parts)


@pytest.mark.parametrize("given", [None, torch.zeros(3), (torch.zeros(3), None), {"loss": torch.zeros(3)}])
def test_a_policy_loss_must_return_a_pair(given, tmp_path):
    plugin = spoiled("policy_loss", "ppo_clip", "__call__", lambda _: given)
    with pytest.raises(PluginOutputError, match=r"policy_loss=ppo_clip must return a pair: the loss \(B, T\) and a"):
        runs.trained(tmp_path, policy_loss=plugin)


def test_metrics_must_have_the_shape_of_the_loss(tmp_path):
    wrong = spoiled("policy_loss", "ppo_clip", "__call__", lambda x: (x[0], {"mine": x[0].sum()}))
    with pytest.raises(PluginOutputError, match=r"the metric 'mine' must have shape \(B, T\) = .*, got \(\)"):
        runs.trained(tmp_path, policy_loss=wrong)
    credit = spoiled("advantages", "group_norm", "__call__", lambda x: Credit(advantages=x, metrics={"mine": "high"}))
    with pytest.raises(PluginOutputError, match="the metric 'mine' must be a tensor, got a str"):
        runs.trained(tmp_path, advantages=credit)
    fine = {"a": 1, "b": 2.5, "c": torch.tensor(3.0)}
    right = spoiled("advantages", "group_norm", "__call__", lambda x: Credit(advantages=x, metrics=fine))
    runs.trained(tmp_path, advantages=right)


@pytest.mark.parametrize("beta", [None, "0.1", float("nan"), -1.0, True, torch.tensor(0.1)])
def test_a_controller_must_return_a_number(beta, tmp_path):
    controller = spoiled("kl_controller", "adaptive", "__call__", lambda _: beta)
    parts = {"kl": [{"use": "in_reward", "controller": controller}], "reference": "frozen"}
    with pytest.raises(
        PluginOutputError, match="kl_controller=adaptive must return beta, a finite number of at least 0"
    ):
        runs.trained(tmp_path, **parts)


class Flat(torch.nn.Module):
    """A critic's module that returns what `spoil` makes of its values."""

    def __init__(self, spoil: Spoil):
        super().__init__()
        self.bias, self.spoil = torch.nn.Parameter(torch.zeros(())), spoil

    def forward(self, batch: Any, states: Any) -> Any:
        return self.spoil(self.bias.expand(len(batch.targets)))


CRITICS = {
    "none": (lambda x: None, "must be a tensor, got None"),
    "shape": (lambda x: x.unsqueeze(1), r"must have shape \(n\) = .*, got \(\d+, 1\)"),
    "dtype": (lambda x: x.long(), "must be of a floating-point dtype, got int64"),
    "device": (lambda x: x.to("meta"), "must be on cpu, got meta"),
    "nan": (with_nan, "must be finite"),
    "detached": (lambda x: x.detach(), "must have a gradient"),
}


@pytest.mark.parametrize("kind", CRITICS)
def test_the_values_of_a_critic_are_checked(kind, tmp_path):
    critic = spoiled("critic", "separate", "build", lambda _: Flat(CRITICS[kind][0]))
    with pytest.raises(PluginOutputError, match=f"critic=separate: forward must return values .*{CRITICS[kind][1]}"):
        runs.trained(tmp_path, advantages="gae", critic=critic)


@pytest.mark.parametrize(("axis", "name"), [("critic", "separate"), ("reference", "frozen"), ("optimizer", "trpo")])
def test_what_is_built_must_be_of_its_kind(axis, name, tmp_path):
    parts = {"kl": ["in_loss"], "reference": "frozen"} if axis != "critic" else {"advantages": "gae"}
    parts[axis] = spoiled(axis, name, "build", lambda _: "a model")
    with pytest.raises(PluginOutputError, match=rf"{axis}={name}: build must return a torch\S* .*got a str|got a str"):
        runs.trained(tmp_path, **parts)


def test_a_trained_critic_must_build_a_module(tmp_path):
    critic = spoiled("critic", "separate", "build", lambda _: None)
    with pytest.raises(PluginOutputError, match=r"critic=separate: build must return a torch.nn.Module: got None"):
        runs.trained(tmp_path, advantages="gae", critic=critic)


def test_a_reference_that_is_not_finite_is_named(tmp_path):
    def broken(model: Any) -> Any:
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        return model

    reference = spoiled("reference", "frozen", "build", broken)
    with pytest.raises(PluginOutputError, match=r"reference=frozen: logps must return a model .*got nan in row 0"):
        runs.trained(tmp_path, kl=["in_loss"], reference=reference)


def test_a_rollout_must_be_completions(tmp_path):
    with pytest.raises(ValueError, match="rollout=scripted must return Completions, got list"):
        runs.trained(
            tmp_path, rollout=spoiled("rollout", "scripted", "__call__", lambda _: [], prompts=4, num_generations=4)
        )


def test_a_loss_that_is_not_finite_costs_its_step_and_is_warned_of_once(tmp_path, caplog):
    calls = iter([1.0, torch.nan, 1.0, 1.0])
    plugin = spoiled("policy_loss", "ppo_clip", "__call__", lambda x: (x[0] * next(calls), x[1]))
    with caplog.at_level(logging.WARNING):
        made = runs.trained(
            tmp_path, policy_loss=plugin, training={"max_steps": 4}, update={"mini_batches": 1, "fused_loss": "off"}
        )
    assert sum(entry["health/nonfinite_step"] for entry in runs.entries(made)) == 1


def test_numbers_that_come_in_are_not_blamed_on_a_plugin():
    plugin, mask = load_plugin("advantages", "group_norm"), torch.ones(2, 3)
    bad = torch.full((2, 3), torch.nan)
    assert check_output("advantages", plugin, bad, mask, inputs={"token_rewards": bad}) is bad
    plugin.__dict__.pop(SEEN)
    with pytest.raises(PluginOutputError):
        check_output("advantages", plugin, bad, mask, inputs={"token_rewards": mask})


def test_numbers_are_read_once_per_shape(monkeypatch):
    plugin, read = load_plugin("advantages", "group_norm"), []
    finite = Tensor.isfinite
    monkeypatch.setattr(Tensor, "isfinite", lambda self: read.append(tuple(self.shape)) or finite(self))
    for rows in (2, 2, 3, 2, 3):
        check_output("advantages", plugin, torch.zeros(rows, 4), torch.ones(rows, 4))
    assert read == [(2, 4), (3, 4)]


def test_every_axis_says_what_its_plugins_return():
    without = {axis for axis, base in AXES.items() if not base.axis.outputs}
    assert without == {"sampler", "rollout", "sync", "environment", "rewards", "trainer", "doctor"}, (
        "these return no tensors; their results are checked elsewhere"
    )
    checked = {case.axis for case in CASES.values()} | {"kl_controller", "critic", "reference", "optimizer"}
    assert checked == set(AXES) - without
    assert all(hasattr(module, "check_output") for module in (collector, losses, rollout_buffer))
