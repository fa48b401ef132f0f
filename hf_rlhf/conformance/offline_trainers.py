"""Checks of offline trainers, as functions that raise AssertionError: rows, one optimizer step, metrics."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from hf_rlhf.conformance.common import Checks
from hf_rlhf.conformance.metrics import check_declared
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import Materials, OfflineTrainer
from hf_rlhf.data.addition_rows import KINDS, demo_rows
from hf_rlhf.training.offline.model import AUTO

Rows = Sequence[Mapping[str, Any]]
COUNT = 8
"""Rows of the optimizer step."""


def offline_trainer_checks(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows | None) -> Checks:
    """Yield the checks of an offline trainer.

    policy: a tiny causal model and its tokenizer.
    rows: at least eight rows; None: those of `builtin:addition`, if it has the plugin's kind.
    """

    def given() -> list[dict[str, Any]]:
        if rows is None and plugin.rows not in KINDS:
            raise SkipTest("skipped: no rows were given, and builtin:addition has none of its kind")
        found = list(demo_rows(plugin)[1][:COUNT] if rows is None else rows)
        return [dict(row) for row in found]

    yield "columns() returns a set of names", lambda: _names_columns(plugin)
    yield "encode is deterministic, and does not change the row", lambda: _encodes(plugin, policy, given())
    yield "a step updates the model, and the loss is finite", lambda: _moves(plugin, policy, given())
    yield "a split into micro-batches makes the same step", lambda: _splits(plugin, policy, given())
    yield (
        "metrics are finite, within their interval, and change nothing",
        lambda: _measures(plugin, policy, given()),
    )
    yield "its metrics are declared", lambda: _declares(plugin, policy, given())
    yield (
        "metrics do not depend on the evaluation batch size",
        lambda: _measures_alike(plugin, policy, given()),
    )


def tiny_classifier(plugin: OfflineTrainer, policy: tuple[Any, Any]) -> Any:
    """Return a model with the plugin's head and the tiny policy's configuration, in float64."""
    import transformers

    config = copy.deepcopy(policy[0].config)
    config.num_labels = plugin.outputs
    config.classifier_dropout = 0.0
    loader: Any = getattr(transformers, AUTO[plugin.head])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Module.to(loader.from_config(config), torch.float64)


def trainer_of(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows, folder: str, **training: Any) -> Any:
    """Return the plugin's trainer for one step of plain gradient descent on these rows, which are also held out."""
    import datasets

    from hf_rlhf.training.offline.trainer_mixin import complete, factory

    model, tokenizer = tiny_classifier(plugin, policy), policy[1]
    examples = datasets.Dataset.from_list(_examples(plugin, tokenizer, rows))
    settings: dict[str, Any] = {
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "warmup_steps": 0,
    }
    settings |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": len(examples), "logging_steps": 1}
    settings |= {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    record: dict[str, Any] = {"algorithm": {}, "run": {}, "recipe": {"model": {"path": None}}, "versions": {}}
    parts: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "train": examples, "evaluation": examples}
    made = factory(plugin, record, Model(), callbacks=[], **parts)
    return plugin.build(Materials(arguments=complete({**settings, **training}), trainer=made, **parts))


def _examples(plugin: OfflineTrainer, tokenizer: Any, rows: Rows) -> list[dict[str, Any]]:
    made = [plugin.encode(row, tokenizer) for row in rows]
    return [example for example in made if example is not None]


def _names_columns(plugin: OfflineTrainer) -> None:
    names = plugin.columns()
    assert isinstance(names, set), f"columns() must return a set of names, got {names!r}"
    assert names, "columns() is empty. Name the columns that a dataset must have"
    assert all(isinstance(name, str) for name in names), f"columns() must return text, got {names!r}"


def _encodes(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows) -> None:
    before = copy.deepcopy(list(rows))
    missing = plugin.columns() - set(rows[0])
    assert not missing, f"columns() names {', '.join(sorted(missing))}, which the rows lack"
    examples = _examples(plugin, policy[1], rows)
    assert examples, "encode returned None for every row"
    assert rows == before, "encode changes the row that it is given"
    assert _examples(plugin, policy[1], rows) == examples, "encode returns something else the second time"
    for example in examples:
        assert example.keys() == examples[0].keys(), (
            f"encoded rows must have the same keys, got {sorted(example)} and {sorted(examples[0])}"
        )
        assert any(isinstance(value, list) and value for value in example.values()), (
            "an encoded row must hold a list of tokens"
        )
        wrong = [name for name, value in example.items() if not all(map(_is_number, _flat(value)))]
        assert not wrong, f"an encoded row must hold numbers and lists of numbers, not {', '.join(wrong)}"


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parameters(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def _movement(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows, **training: Any) -> tuple[Tensor, float]:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        trainer = trainer_of(plugin, policy, rows, folder, **training)
        before = _parameters(trainer)
        loss = trainer.train().training_loss
        trainer.run_log.flush()
        return _parameters(trainer) - before, loss


def _moves(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows) -> None:
    movement, loss = _movement(plugin, policy, rows)
    assert math.isfinite(loss), f"the loss of the first step is {loss}"
    assert bool(movement.isfinite().all()), "the model is not finite after a step"
    assert float(movement.norm()) > 1e-9, "a step of gradient descent changes nothing"


def _splits(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows) -> None:
    rows = [row for row in rows if plugin.encode(row, policy[1]) is not None]
    rows = rows[: len(rows) // 2 * 2]
    whole, _ = _movement(plugin, policy, rows)
    halves = {"per_device_train_batch_size": len(rows) // 2, "gradient_accumulation_steps": 2}
    split, _ = _movement(plugin, policy, rows, **halves)
    error = float((whole - split).norm() / whole.norm())
    assert error < 1e-5, (
        f"in two micro-batches the step differs by {error:.2g} of its length. Divide the loss by all rows of the step"
    )


def _measured(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows, **training: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        trainer = trainer_of(plugin, policy, rows, folder, **training)
        before = _parameters(trainer)
        found = trainer.evaluate()
        assert torch.equal(_parameters(trainer), before), "measuring changes the model"
    timings = ("runtime", "per_second", "preparation_time", "epoch")
    return {name: x for name, x in found.items() if not name.endswith(timings)}


def _measures(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows) -> None:
    found = _measured(plugin, policy, rows)
    wrong = [f"{name}={x}" for name, x in found.items() if not math.isfinite(x)]
    assert not wrong, f"not finite: {', '.join(wrong)}"
    for name, x in found.items():
        low, high = found.get(f"{name}_low", x), found.get(f"{name}_high", x)
        assert low <= x <= high, f"{name} is {x}, outside of its interval {low} to {high}"


def _declares(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows) -> None:
    found = _names_of(plugin, policy, rows)
    check_declared(plugin, [name.removeprefix("eval_") for name in found], "it measures")


def _measures_alike(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows) -> None:
    own = set(_names_of(plugin, policy, rows))
    together, single = (
        {name: x for name, x in _measured(plugin, policy, rows, per_device_eval_batch_size=n).items() if name in own}
        for n in (COUNT, 1)
    )
    changed = [name for name, x in together.items() if not math.isclose(x, single[name], rel_tol=1e-5, abs_tol=1e-6)]
    assert not changed, f"{', '.join(changed)} depends on the evaluation batch size. Ignore padding"


def _names_of(plugin: OfflineTrainer, policy: tuple[Any, Any], rows: Rows) -> list[str]:
    """Return the names of the plugin's own metrics."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        trainer = trainer_of(plugin, policy, rows, folder)
        trainer.model.eval()
        with torch.no_grad():
            return [f"eval_{name}" for name in plugin.measure(trainer, trainer.eval_dataset)]
