"""What every plugin, a reward source, a reference and an update rule promise, as functions that raise AssertionError.

With `hf_rlhf.tensor_facts`, the body of `hf_rlhf.testing.conformance`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import itertools
import math
import pickle
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import Plugin, Reference, RewardSource, UpdateRule
from hf_rlhf.batch import Rollouts

Claims = Iterator[tuple[str, Callable[[], None]]]


def of_every_plugin(plugin: Plugin) -> Claims:
    """Whatever its axis."""
    yield "it is a dataclass with a name, and every setting is documented", lambda: _is_documented(plugin)
    yield "it can be copied and pickled", lambda: _can_be_copied(plugin)
    yield "its state survives a checkpoint", lambda: _state_survives(plugin)


def _is_documented(plugin: Plugin) -> None:
    cls = type(plugin)
    called = cls.__name__
    assert "__dataclass_params__" in cls.__dict__ or not inspect.get_annotations(cls), (
        f"{called} declares settings and is no dataclass: write @dataclass(kw_only=True) above it"
    )
    assert isinstance(getattr(plugin, "name", None), str), f'{called} has no name: write name = "..." in its body'
    settings = [setting.name for setting in fields(plugin)]
    for name in ("name", "needs", "provides", "places"):
        assert name not in settings, f"{called}.{name} became a setting: annotate it as ClassVar, or not at all"
    positional = [setting.name for setting in fields(plugin) if not setting.kw_only]
    assert not positional, f"settings are keyword-only, and {positional} are not: write @dataclass(kw_only=True)"
    doc = cls.__dict__.get("__doc__") or f"{called}("  # what dataclass writes where there is none
    assert not doc.startswith(f"{called}("), f"{called} has no docstring; its first line says what it computes"
    missing = [name for name in settings if name not in _documented_fields(cls)]
    assert not missing, f"{called} has settings without a docstring below them: {', '.join(missing)}"


def _documented_fields(cls: type) -> set[str]:
    found: set[str] = set()
    for base in cls.__mro__[:-1]:
        if not inspect.get_annotations(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for setting, doc in itertools.pairwise(tree.body):
            text = doc.value.value if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) else None
            if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name) and isinstance(text, str):
                found.add(setting.target.id)
    return found


def _can_be_copied(plugin: Plugin) -> None:
    for way, other in (("copied", copy.deepcopy(plugin)), ("pickled", pickle.loads(pickle.dumps(plugin)))):
        assert other == plugin, f"{way}, it is {other} and no longer {plugin}"


def _state_survives(plugin: Plugin) -> None:
    state, file = plugin.state_dict(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        loaded = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise AssertionError(
            f"state_dict holds more than numbers, strings, tensors, lists and dicts: {error}"
        ) from None
    other = copy.deepcopy(plugin)
    other.load_state_dict(loaded)
    assert equal(other.state_dict(), state), f"load_state_dict turned {state} into {other.state_dict()}"


def equal(a: Any, b: Any) -> bool:
    """Equal in type and value, through lists, dicts and tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def generators_now() -> list[Any]:
    """The states of the global random generators of torch, Python and NumPy."""
    import numpy

    return [torch.get_rng_state(), random.getstate(), pickle.dumps(numpy.random.get_state())]


def same(got: dict[str, Tensor], want: dict[str, Tensor], why: str) -> None:
    """Asserts that `got` holds the tensors of `want` up to rounding."""
    for name, x in want.items():
        y = got[name]
        assert x.shape == y.shape, f"{name} is {tuple(y.shape)} where {tuple(x.shape)} was due: {why}"
        if not torch.allclose(y.double(), x.double(), rtol=1e-9, atol=1e-12, equal_nan=True):
            worst = (y.double() - x.double()).abs().nan_to_num(math.inf).max().item()
            raise AssertionError(f"{name} changes by up to {worst:.3g}: {why}")


def of_a_reward(plugin: RewardSource, given: Rollouts) -> Claims:
    """Of a reward source, on these rollouts."""
    yield (
        "it gives one number or None per row",
        lambda: _is_a_number_per_row(_scores(plugin, copy.deepcopy(given)), len(given)),
    )
    yield "the order of the rows changes no score", lambda: _scores_rows(plugin, given)
    yield (
        "it changes neither its rollouts nor a random generator, and repeats itself",
        lambda: _is_pure_reward(plugin, given),
    )


def _scores(plugin: RewardSource, given: Rollouts) -> list[Any]:
    try:
        answer: Any = plugin(given)
    except KeyError as error:
        raise AssertionError(
            f"no column for it; pass rollouts=... to conformance with the columns it reads: {error}"
        ) from error
    is_list = hasattr(answer, "__len__") and not isinstance(answer, str | dict)
    assert is_list, f"it gives a {type(answer).__name__}; a list with one number or None per row is due"
    return answer.tolist() if hasattr(answer, "tolist") else list(answer)


def _is_a_number_per_row(scores: Sequence[Any], rows: int) -> None:
    assert len(scores) == rows, f"it gives {len(scores)} numbers for {rows} rows"
    for row, x in enumerate(scores):
        number = x is None or (not isinstance(x, str) and hasattr(x, "__float__"))
        assert number, f"row {row}: {x!r} is neither a number nor None"
        assert x is None or not math.isinf(x), f"row {row}: {x!r} is infinite"


def _scores_rows(plugin: RewardSource, given: Rollouts) -> None:
    backwards = copy.deepcopy(given)
    for name in ("prompts", "completions", "prompt_ids", "completion_ids", "masks", "finish_reasons", "group_ids"):
        getattr(backwards, name).reverse()
    for values in backwards.columns.values():
        values.reverse()
    forth, back = _scores(plugin, copy.deepcopy(given)), _scores(plugin, backwards)
    assert _numbers(forth) == _numbers(back[::-1]), f"the rows backwards score {back[::-1]}, not {forth}"


def _is_pure_reward(plugin: RewardSource, given: Rollouts) -> None:
    seen, generators = copy.deepcopy(given), generators_now()
    first = _scores(plugin, seen)
    for name, value in vars(given).items():
        assert getattr(seen, name) == value, f"it changes rollouts.{name} in place"
    assert _numbers(_scores(plugin, seen)) == _numbers(first), (
        "called twice on the same rollouts, it scores differently"
    )
    assert equal(generators_now(), generators), "it draws from a global random generator"


def _numbers(scores: Sequence[Any]) -> list[float | None]:
    return [None if x is None or math.isnan(x) else float(x) for x in scores]


def of_a_reference(plugin: Reference, policy: Callable[[], Any]) -> Claims:
    """Of a reference, for policies that `policy` makes."""
    yield "the policy's updates leave its log-probs as they are", lambda: _stays(plugin, policy())


def _stays(plugin: Reference, policy: Any) -> None:
    ids = torch.tensor([[3, 5, 7, 9]])
    own = plugin.build(policy)
    if own is None and "ref_logps" not in plugin.provides:
        return

    @torch.no_grad()
    def logits() -> Tensor:
        if own is not None:
            return own(input_ids=ids).logits
        with plugin.active(policy):
            return policy(input_ids=ids).logits

    trained = [p for p in policy.parameters() if p.requires_grad]
    before = logits()
    assert own is None or not any(p.requires_grad for p in own.parameters()), (
        "its model has parameters that would learn"
    )
    assert own is None or not own.training, "its model is in training mode: call eval()"
    assert trained, "building it left the policy nothing to learn"
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    same({"the reference's logits": logits()}, {"the reference's logits": before}, "the policy moved")


def of_an_update_rule(plugin: UpdateRule, policy: Callable[[], Any]) -> Claims:
    """Of an update rule, for policies that `policy` makes."""
    yield "its optimizer holds every parameter it is given", lambda: _holds_all(plugin, policy())


def _holds_all(plugin: UpdateRule, policy: Any) -> None:
    parameters = list(policy.parameters())
    optimizer = plugin.build(policy, [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}])
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in parameters}, f"it holds {len(held)} of {len(parameters)} parameters"
