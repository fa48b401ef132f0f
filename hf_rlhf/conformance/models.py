"""Checks of plugins that use the model: critics, references, update rules, text terms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from hf_rlhf.axes import Critic, Reference, TextTerm, UpdateRule
from hf_rlhf.conformance.common import Checks, Make, assert_equal, equal
from hf_rlhf.conformance.metrics import check_declared, check_finite
from hf_rlhf.contract.optimizer_step import Step
from hf_rlhf.modeling.policy import ActorCritic, distributions
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.runtime.seeding import seeded

# Critics


def critic_checks(plugin: Critic, policy: Make) -> Checks:
    """Yield the checks of a critic, for policies that `policy` makes."""

    @cache
    def is_sound() -> bool:
        try:
            _gives_values(plugin, policy())
        except Exception:
            return False
        return True

    def if_sound(check: Callable[..., None]) -> Callable[[], None]:
        def holds() -> None:
            if not is_sound():
                raise SkipTest("skipped: it does not return one value per sampled token")
            check(plugin, policy())

        return holds

    yield "it returns one finite value per sampled token", lambda: _gives_values(plugin, policy())
    yield "a value does not depend on later tokens", if_sound(_is_causal)
    yield "other rows and padding change no value", if_sound(_values_alone)
    yield "it learns, and building it does not change the policy", if_sound(_learns)


def _built(plugin: Critic, policy: Any) -> Any:
    algorithm: Any = None
    module = plugin.build(policy, algorithm)
    if module is None:
        assert "values" not in plugin.provides, "it declares values and builds no module"
        return None
    return ActorCritic(policy, module, 1.0)


def _random(plugin: Critic, policy: Any) -> Any:
    """Build the critic and perturb its parameters: a head that starts at 0 would hide its inputs."""
    critic = _built(plugin, policy)
    if critic is not None:
        with torch.no_grad(), seeded("critic"):
            for parameter in critic.critic.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return critic


PROMPTS, ROWS = [[5, 6, 7], [8]], [[9, 10, 11, 12], [13, 14]]
MASK = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])


def _values(critic: Any, prompts: list[list[int]], rows: list[list[int]], mask: Tensor) -> Tensor:
    batch = TokenBatch(prompts, rows, mask, pad=0)
    out: Tensor = critic(batch, values=True, logps=False)["values"]
    return out


def _gives_values(plugin: Critic, policy: Any) -> None:
    critic = _random(plugin, policy)
    if critic is None:
        return
    due, shapes = (int(MASK.sum()),), []

    def look(_: Any, __: Any, out: Any) -> None:
        shapes.append(tuple(getattr(out, "shape", ())))
        assert shapes[-1] == due, f"values must have shape (n,) = {due}, got {shapes[-1]}"

    critic.critic.register_forward_hook(look)
    values = _values(critic, PROMPTS, ROWS, MASK)
    assert bool(values.isfinite().all()), "its values are not finite"
    assert values.requires_grad, "no gradient reaches its values"


def _is_causal(plugin: Critic, policy: Any) -> None:
    critic = _random(plugin, policy)
    if critic is None:
        return
    before = _values(critic, PROMPTS, ROWS, MASK)
    for column in (0, 2, 3):
        rows = copy.deepcopy(ROWS)
        rows[0][column] = 40
        after = _values(critic, PROMPTS, rows, MASK)
        why = f"token {column} was replaced and the value of its state changed. Read at the token before"
        assert_equal({"a value": after[0, : column + 1]}, {"a value": before[0, : column + 1]}, why)


def _values_alone(plugin: Critic, policy: Any) -> None:
    critic = _random(plugin, policy)
    if critic is None:
        return
    together = _values(critic, PROMPTS, ROWS, MASK)
    for row, ids in enumerate(ROWS):
        mask = MASK[row : row + 1, : len(ids)]
        alone = _values(critic, PROMPTS[row : row + 1], [ids], mask)
        assert_equal({"a value": alone[0]}, {"a value": together[row, : len(ids)]}, "the row was computed alone")


def _learns(plugin: Critic, policy: Any) -> None:
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    learned, mode = [p.requires_grad for p in policy.parameters()], policy.training
    critic = _built(plugin, policy)
    changed = [name for name, x in policy.state_dict().items() if not torch.equal(x, before[name])]
    assert not changed, f"building it changes the policy: {', '.join(changed[:3])}"
    assert [p.requires_grad for p in policy.parameters()] == learned, (
        "building it changes which of the policy's weights learn"
    )
    assert policy.training == mode, "building it changes the policy's mode"
    if critic is None:
        return
    own = dict(critic.critic.named_parameters())
    assert own, "it has no parameters"
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in own.values()}
    assert not shared, "its parameters are the policy's own. Hold no reference to the policy, or copy it"
    (_values(critic, PROMPTS, ROWS, MASK) - 1).square().sum().backward()
    without = [name for name, p in own.items() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient reaches {', '.join(without[:3])}, and every process waits for it"
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in own.values()), "its gradient is 0 everywhere"


# References


def reference_checks(plugin: Reference, policy: Make) -> Checks:
    """Yield the checks of a reference, for policies that `policy` makes."""
    if not plugin.follows_policy:
        yield "updates of the policy do not change its log-probs", lambda: _stays(plugin, policy())
    if plugin.moves:
        yield "it moves towards the policy, and moves nothing else", lambda: _moves(plugin, policy())


IDS = torch.tensor([[3, 5, 7, 9]])


def _stays(plugin: Reference, policy: Any) -> None:
    own = plugin.build(policy)
    asked = type(plugin).score is not Reference.score  # a server's, for instance
    if own is None and (asked or "ref_logps" not in plugin.provides):
        return

    @torch.no_grad()
    def logits() -> Tensor:
        model: Any = own
        if own is not None:
            return model(input_ids=IDS).logits
        with plugin.active(policy):
            return policy(input_ids=IDS).logits

    trained = [p for p in policy.parameters() if p.requires_grad]
    before = logits()
    assert own is None or not any(p.requires_grad for p in own.parameters()), (
        "its model has parameters that require grad"
    )
    assert own is None or not own.training, "its model is in training mode. Call eval()"
    assert trained, "building it left the policy without parameters that require grad"
    _disturb(policy)
    assert_equal({"the reference's logits": logits()}, {"the reference's logits": before}, "the policy moved")


@torch.no_grad()
def _disturb(policy: Any) -> None:
    for p in policy.parameters():
        if p.requires_grad:
            p.add_(0.1)


@torch.no_grad()
def _moves(plugin: Reference, policy: Any) -> None:
    own: Any = plugin.build(policy)
    assert own is not None, "it moves and builds no model"
    _disturb(policy)

    def log_probs(model: Any) -> Tensor:
        out: Tensor = model(input_ids=IDS).logits.log_softmax(-1)
        return out

    there = log_probs(policy)
    start = float((log_probs(own) - there).abs().max())
    for step in range(1, 1025):
        plugin.move(own, policy, step)
    moved = log_probs(own)
    assert float((moved - there).abs().max()) < start, (
        f"after 1024 steps it is as far from the policy as before ({start:.3g})"
    )
    assert not own.training, "moving puts its model into training mode"
    assert not any(p.requires_grad for p in own.parameters()), "moving makes its parameters require grad"
    assert_equal({"the policy": log_probs(policy)}, {"the policy": there}, "the reference moved")
    _disturb(policy)
    assert_equal({"the reference": log_probs(own)}, {"the reference": moved}, "the policy moved. Copy its weights")


# Update rules, terms with texts


def update_rule_checks(plugin: UpdateRule, policy: Make) -> Checks:
    """Yield the checks of an update rule, for policies that `policy` makes."""
    yield "its optimizer holds every parameter it is given", lambda: _holds_all(plugin, policy())
    yield "a step updates policy and critic, which stay finite", lambda: _steps(plugin, policy())
    yield "metrics of a step are declared, finite numbers", lambda: _logs_steps(plugin, policy())


def _holds_all(plugin: UpdateRule, policy: Any) -> None:
    parameters = list(policy.parameters())
    optimizer = plugin.build(policy, [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}])
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in parameters}, f"it holds {len(held)} of {len(parameters)} parameters"


def _steps(plugin: UpdateRule, policy: Any) -> None:
    critic = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = plugin.build(policy, [{"params": [critic], "lr": 1e-3}])
    if optimizer is None:
        return
    if not any(critic is p for group in optimizer.param_groups for p in group["params"]):
        raise AssertionError("its optimizer leaves out the critic's parameters")
    batches = [
        (TokenBatch(PROMPTS[i : i + 1], ROWS[i : i + 1], torch.ones(1, len(ROWS[i])), 0, "padded"), 1 - 2 * i)
        for i in (0, 1)
    ]

    def log_probs(micro: Any) -> Tensor:
        batch, _ = micro
        return distributions(policy, batch, 1.0)

    def sampled(micro: Any) -> Tensor:
        batch, _ = micro
        return log_probs(micro).gather(1, batch.targets.unsqueeze(1))

    old = [sampled(micro).detach() for micro in batches]

    def loss(micro: Any) -> Tensor:
        place = [micro is each for each in batches].index(True)
        return -micro[1] * (sampled(micro) - old[place]).exp().mean()

    (torch.stack([loss(micro) for micro in batches]).sum() + critic.square().sum()).backward()
    before = [p.detach().clone() for p in policy.parameters()]
    plugin.hold(Step(micro_batches=batches, loss=loss, log_probs=log_probs, total=lambda x: x.detach()))
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in (critic, *policy.parameters())), (
        "a step leaves a parameter that is not finite"
    )
    assert any(not torch.equal(p, x) for p, x in zip(policy.parameters(), before, strict=True)), (
        "the policy does not change"
    )
    assert bool((critic != 1).any()), "the critic does not change"


def _logs_steps(plugin: UpdateRule, policy: Any) -> None:
    try:
        _steps(plugin, policy)
    except Exception as error:
        raise SkipTest(f"skipped: a step fails. {error}") from None
    said = plugin.take_logs()
    check_finite(said, "it logs")
    check_declared(plugin, said, "it logs")


def text_term_checks(plugin: TextTerm) -> Checks:
    """Yield the checks of a text term that is set up."""
    yield "texts depend on the step alone, and have at least two tokens", lambda: _texts(plugin)


def _texts(plugin: TextTerm) -> None:
    fresh = copy.deepcopy(plugin)
    in_order = [plugin.texts(step) for step in range(4)]
    for step, texts in enumerate(in_order):
        assert texts, f"it has no text for step {step}"
        for ids in texts:
            whole = len(ids) >= 2 and all(isinstance(i, int) and i >= 0 for i in ids)
            assert whole, f"step {step}: texts must be lists of two or more token ids, got {ids}"
    assert equal(fresh.texts(3), in_order[3]), "asked for step 3 first, as after a resume, it returns other texts"
