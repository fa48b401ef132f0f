"""Checks of every plugin and of KL controllers, as functions that raise AssertionError.

With `hf_rlhf.conformance.rewards`, `hf_rlhf.conformance.models`, `invariances` and `gradients`, the body of
`hf_rlhf.testing.conformance`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import itertools
import math
import os
import pickle
import random
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hf_rlhf.axes import KLController, Plugin, PromptSampler
from hf_rlhf.runtime.checkpoint_state import plain
from hf_rlhf.runtime.errors import CheckpointError

Checks = Iterator[tuple[str, Callable[[], None]]]
Make = Callable[[], Any]
"""Function that makes a fresh model."""
Statistics = Sequence[Mapping[str, float]]

FIRST_ROLLOUT: Mapping[str, float] = {
    "rollout/rows": 64.0,
    "rollout/tokens": 512.0,
    "reward/total/mean": 0.5,
    "reward/after_kl/mean": 0.375,
    "kl/rollout/sequence": 3.0,
    "kl/rollout/token": 0.25,
}
"""Some statistics of a first rollout."""
LATER_ROLLOUT: Mapping[str, float] = {
    **{name: 2 * x for name, x in FIRST_ROLLOUT.items()},
    "policy/approx_kl": 0.125,
    "policy/entropy": 1.5,
}
"""Some statistics of a later rollout, which include the updates before it."""


def plugin_checks(plugin: Plugin, history: Statistics) -> Checks:
    """Yield the checks of every axis. `history` holds the statistics of two rollouts."""
    yield "it is a dataclass with a name, and every setting is documented", lambda: _is_documented(plugin)
    yield "needs and provides are sets of known names", lambda: _needs_are_known(plugin)
    yield "its settings survive a recipe", lambda: _settings_survive(plugin)
    yield "it can be copied and pickled", lambda: _can_be_copied(plugin)
    yield "its state survives a checkpoint", lambda: _state_survives(plugin, history)


# Names, docstrings, settings


def _is_documented(plugin: Plugin) -> None:
    cls = type(plugin)
    called = cls.__name__
    assert "__dataclass_params__" in cls.__dict__ or not inspect.get_annotations(cls), (
        f"{called} declares settings and is not a dataclass. Write @dataclass(kw_only=True) above it"
    )
    name = getattr(plugin, "name", None)
    assert isinstance(name, str), f'{called} has no name. Write name = "..." in its body'
    assert name.isidentifier(), f"{called}.name must be a word like group_norm, got {name!r}"
    settings = [setting.name for setting in fields(plugin)]
    for name in ("name", "needs", "provides", "places", "stops_gradient"):
        assert name not in settings, f"{called}.{name} became a setting. Annotate it as ClassVar, or not at all"
    positional = [
        f"{part.__name__}.{x.name}" for part in _groups(cls) for x in fields(part) if x.init and not x.kw_only
    ]
    said = ", ".join(positional)
    assert not positional, f"settings must be keyword-only, got {said}. Write @dataclass(kw_only=True) above the class"
    doc = cls.__dict__.get("__doc__") or f"{called}("  # what dataclass writes where there is none
    assert not doc.startswith(f"{called}("), f"{called} has no docstring. Say in its first line what it computes"
    missing = [x.name for part in _groups(cls) for x in fields(part) if x.name not in _documented_fields(part)]
    assert not missing, f"{called} has settings without a docstring below them: {', '.join(missing)}"


def _groups(cls: Any) -> Iterator[Any]:
    """Yield a class of settings, and the dataclasses that hold groups of them."""
    from hf_rlhf.registry.settings_schema import nested, setting_types

    yield cls
    try:
        hints = setting_types(cls)
    except (NameError, AttributeError):
        return  # "its settings survive a recipe" says so
    for hint in hints.values():
        if (held := nested(hint)) is not None and held.group:
            yield from _groups(held.group)


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


def _needs_are_known(plugin: Plugin) -> None:
    from hf_rlhf.config.algorithm import CORE_PROVIDES, FIXES
    from hf_rlhf.runtime.errors import did_you_mean

    known = CORE_PROVIDES | FIXES.keys()
    for title in ("needs", "provides"):
        names = getattr(plugin, title)
        assert isinstance(names, frozenset), f"{title} must be a frozenset, got {names!r}"
        # Other names are allowed: another plugin of the same package may provide them.
        for name in sorted(names - known):
            assert not did_you_mean(name, known), f"{title} names {name!r}.{did_you_mean(name, known)}"


def _settings_survive(plugin: Plugin) -> None:
    from hf_rlhf.config import recipe, recipe_reader
    from hf_rlhf.config.recipe_yaml import read_yaml, write_yaml
    from hf_rlhf.registry.settings_schema import nested, setting_types

    cls = type(plugin)
    try:
        types = setting_types(cls)
    except NameError as error:
        raise AssertionError(
            f"the type of a setting is unknown at run time: {error}. Import it outside TYPE_CHECKING"
        ) from error
    try:
        written = recipe_reader.settings_as_plain(plugin)
        read = read_yaml(write_yaml(written), "its settings") or {}
    except Exception as error:
        raise AssertionError(
            f"its settings cannot be written into a recipe. Use numbers, text, lists and mappings. {error}"
        ) from error
    given = {name: getattr(plugin, name) if nested(hint) else read.get(name) for name, hint in types.items()}
    made, problems = recipe.make(cls, given)
    said = "; ".join(f"{path}: {text}" for path, text in problems)
    assert made is not None, f"a recipe with its own settings is rejected: {said}"
    again = recipe_reader.settings_as_plain(made)
    changed = [f"{name} {written[name]!r} becomes {again[name]!r}" for name in written if again[name] != written[name]]
    assert not changed, f"rebuilt from its own settings it differs: {', '.join(changed)}"


def _can_be_copied(plugin: Plugin) -> None:
    """Check a copy from before `setup`: what `setup` starts need not be copied."""
    made = _made_again(plugin)
    for way, other in (("copied", copy.deepcopy(made)), ("pickled", pickle.loads(pickle.dumps(made)))):  # noqa: S301  (made here)
        assert other == made, f"after being {way} it is {other}, not {made}"


def _made_again(plugin: Plugin) -> Plugin:
    return type(plugin)(**{setting.name: getattr(plugin, setting.name) for setting in fields(plugin) if setting.init})


def duplicate(plugin: Plugin) -> Plugin:
    """Return a copy with its state and what `setup` started, or as before `setup` if that cannot be copied."""
    try:
        return copy.deepcopy(plugin)
    except TypeError:  # a lock, a connection, a process
        return _made_again(plugin)


# Memory


def with_nested(plugin: Plugin) -> Iterator[Plugin]:
    """Yield the plugin and the plugins inside it."""
    yield plugin
    for setting in fields(plugin):
        value = getattr(plugin, setting.name)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, Plugin):
                yield from with_nested(child)


def has_memory(plugin: Plugin) -> bool:
    """Return whether the plugin, or one inside it, keeps state over rollouts."""
    return any(type(each).observe is not Plugin.observe for each in with_nested(plugin))


def observe(plugin: Plugin, statistics: Mapping[str, float]) -> None:
    """Let a plugin observe a rollout: its statistics, or for a sampler rows and their scores."""
    if isinstance(plugin, PromptSampler):
        plugin.observe([0, 0, 1, 1, 2, 2], [1.0, 0.0, 1.0, 1.0, math.nan, math.nan])
    else:
        plugin.observe(statistics)


def restored_pair(plugin: Plugin, history: Statistics) -> tuple[Plugin, Plugin]:
    """Return a copy that observed rollouts, and another one with the state of the first."""
    trained, fresh = duplicate(plugin), duplicate(plugin)
    for each, other in zip(with_nested(trained), with_nested(fresh), strict=True):
        for statistics in history:
            observe(each, statistics)
        other.load_state_dict(through_a_file(each.state_dict()))
    return trained, fresh


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state as a resumed run gets it."""
    file = io.BytesIO()
    try:
        torch.save(plain(state, "state_dict()"), file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
    except (CheckpointError, pickle.UnpicklingError) as error:
        raise AssertionError(str(error)) from None
    return loaded


def _state_survives(plugin: Plugin, history: Statistics) -> None:
    started = duplicate(plugin)
    try:
        trained, fresh = restored_pair(plugin, history)
    except KeyError as error:
        raise AssertionError(
            f"it reads the statistic {error}, which is not measured in every rollout. Use statistics.get"
        ) from error
    before, after = trained.state_dict(), fresh.state_dict()
    assert equal(after, before), f"load_state_dict turned {before} into {after}"
    for name, value in vars(trained).items():
        if _is_plain(value) and not equal(value, vars(started).get(name)):
            kept = equal(vars(fresh).get(name), value)
            assert kept, f"observe changes {name} to {value!r}, which a checkpoint loses. Add it to state_dict"


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return (
        all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, int | float | str | Tensor)
    )


def controller_checks(plugin: KLController) -> Checks:
    """Yield the checks of a KL controller."""
    yield "beta stays finite and non-negative", lambda: _beta_is_sane(plugin)
    yield "more KL never gives a smaller beta", lambda: _beta_rises(plugin)
    yield "asking for beta does not change it", lambda: _beta_repeats(plugin)


def _after(plugin: KLController, kl: float, rollouts: int, rows: float = 64.0, **others: float) -> float:
    """Return beta after rollouts with this KL, for a beta of 0.1 in the recipe."""
    own = copy.deepcopy(plugin)
    measured = {**FIRST_ROLLOUT, "rollout/rows": rows, "kl/rollout/sequence": kl, "kl/rollout/token": kl / 8, **others}
    for _ in range(rollouts):
        own.observe(measured)
    beta = own(0.1)
    number = isinstance(beta, int | float) and not isinstance(beta, bool)
    assert number, f"beta must be a number, got {type(beta).__name__}"
    return float(beta)


def _beta_is_sane(plugin: KLController) -> None:
    for kl, rows, rollouts in itertools.product((0.0, -5.0, 1e-6, 6.0, 1e6), (1.0, 64.0, 512.0), (0, 1, 20)):
        beta = _after(plugin, kl, rollouts, rows)
        said = f"after {rollouts} rollouts of {rows:g} rows with a KL of {kl:g} beta is {beta:g}"
        assert math.isfinite(beta), f"{said}; it must be finite"
        assert beta >= 0, f"{said}; below 0 it drives the policy away from the reference"


def _beta_rises(plugin: KLController) -> None:
    for rollouts in (1, 20):
        low, high = _after(plugin, 0.0, rollouts), _after(plugin, 1e3, rollouts)
        assert high >= low, f"a KL of 1000 nats gives beta {high:g}, a KL of 0 gives {low:g}. Check the sign"


def _beta_repeats(plugin: KLController) -> None:
    own = copy.deepcopy(plugin)
    own.observe(FIRST_ROLLOUT)
    first, second, twice = own(0.1), own(0.1), own(0.2)
    assert first == second, f"called twice between two rollouts it returns beta {first:g} and {second:g}"
    assert twice >= first, f"the recipe's beta 0.1 gives {first:g} and 0.2 gives {twice:g}"


# Helpers of every module of facts


def equal(a: Any, b: Any) -> bool:
    """Compare type and value, through lists, dicts and tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def generators_now() -> list[Any]:
    """Return the states of the global random generators of torch, Python and NumPy."""
    import numpy

    return [torch.get_rng_state(), random.getstate(), pickle.dumps(numpy.random.get_state())]


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], why: str) -> None:
    """Assert that `got` holds the tensors of `want` up to rounding."""
    for name, x in want.items():
        y = got[name]
        assert x.shape == y.shape, f"{name} must have shape {tuple(x.shape)}, got {tuple(y.shape)}: {why}"
        if not torch.allclose(y.double(), x.double(), rtol=1e-9, atol=1e-12, equal_nan=True):
            worst = (y.double() - x.double()).abs().nan_to_num(math.inf).max().item()
            raise AssertionError(f"{name} changes by up to {worst:.3g}: {why}")


COLLECTIVE = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list"),
    *("barrier", "reduce", "reduce_scatter", "gather", "gather_object", "scatter"),
)


@contextmanager
def second_of_two_processes() -> Iterator[None]:
    """Simulate process 1 of 2, in which any collective raises."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it calls torch.distributed; the core gathers rows, a plugin must not")

    def gives(answer: Any) -> Callable[..., Any]:
        return lambda *_, **__: answer

    with ExitStack() as stack:
        found: dict[str, Any] = {name: refuse for name in COLLECTIVE if hasattr(torch.distributed, name)}
        found |= {"is_initialized": gives(True), "get_rank": gives(1), "get_world_size": gives(2)}
        for name, instead in found.items():
            stack.enter_context(patch.object(torch.distributed, name, instead))
        stack.enter_context(patch.dict(os.environ, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}))
        yield
