"""How much work an optimizer step does: positions, matrix products, waits for the device, messages between processes.

As a program with RANK and WORLD_SIZE set it trains in one of several processes and writes the collectives and the version it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.modeling.packing import Packed
from hf_rlhf.modeling.policy import why_not_packed
from hf_rlhf.testing import tiny_policy
from hf_rlhf.training.rollout_buffer import Buffer
from tests.helpers import runs
from tests.helpers.paths import environment
from tests.helpers.processes import ended_well, ranks, warm

SCRIPTED = {**runs.SCRIPTED, "mask_column": "masks"}
STEP = {
    "rollout": SCRIPTED,
    "dataset": {"shuffle": False},
    "policy_loss": "reinforce",
    "update": {"mini_batches": 2},
}
"""Two optimizer steps of two groups each, with a loss that needs no log-probs before the update."""


def group(prompt: str, texts: list[str], tail: int = 0) -> dict[str, Any]:
    """A prompt with completions, whose last `tail` tokens come from a tool."""
    sampled = [max(1, len(text) + 1 - tail) for text in texts]
    masks = [[1] * n + [0] * (len(text) + 1 - n) for n, text in zip(sampled, texts, strict=True)]
    return {"prompt": prompt, "completions": texts, "masks": masks}


LIVE = [
    group("1+1=", ["0", "zz", "0 0 0", "z"]),
    group("22+3=", ["z0z0z0", "0", "0A0", "zz"]),
    group("1+1=", ["0z0zz", "zz00", "0000", "z"], tail=2),
    group("5+0=", ["000", "zzz", "zz", "00"]),
]
"""Groups whose completions begin early and late in the alphabet: `runs.FORMAT` rewards the early ones."""
DEAD = [group(f"{i}+1=", ["0" * (i + 1), "A", "0A", "B"]) for i in range(4)]
"""Groups whose completions all earn the same."""


@contextmanager
def positions(made: Any) -> Iterator[Counter[str]]:
    """What goes through the embedding and each linear layer of the policy (and of the reference), in tokens, outside
    decoding."""
    counts: Counter[str] = Counter()
    decoding = [False]

    def watch(name: str) -> Callable[..., None]:
        def seen(module: Any, args: Any, out: torch.Tensor) -> None:
            if not decoding[0]:
                counts[name] += out.numel() // out.size(-1)

        return seen

    models = {"": made.model}
    why_not_packed(made.model)  # found out once, by forwards of its own
    if (reference := made.collector.forwards.reference) is not None:
        models["reference "] = reference.own
        why_not_packed(reference.own)
    handles = []
    for title, model in models.items():
        handles.append(model.get_input_embeddings().register_forward_hook(watch(f"{title}trunk")))
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_hook(watch(f"{title}{name}")))
    own = made.collector.roll_out

    def roll_out(*args: Any, **kwargs: Any) -> Any:
        decoding[0] = True
        try:
            return own(*args, **kwargs)
        finally:
            decoding[0] = False

    made.collector.roll_out = roll_out
    try:
        yield counts
    finally:
        made.collector.roll_out = own
        for handle in handles:
            handle.remove()


class HeadProducts(TorchDispatchMode):
    """Multiplications and additions in matrix products over the vocabulary, in units of tokens x vocabulary x hidden size."""

    def __init__(self, made: Any):
        super().__init__()
        self.size, self.total = made.model.lm_head.weight.shape, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            if self.size[0] in (*a.shape, *b.shape):
                self.total += a.size(0) * a.size(1) * b.size(1) / (self.size[0] * self.size[1])
        return func(*args, **(kwargs or {}))


def kept_rows(made: Any, groups: list[dict[str, Any]]) -> list[tuple[str, str, list[int]]]:
    """(prompt, completion, mask) of each row that the update should see."""
    count = made.algorithm.rollout.num_generations
    return [
        (row["prompt"], text, mask)
        for row in groups
        for text, mask in list(zip(row["completions"], row["masks"], strict=True))[:count]
        if any(mask)
    ]


def packed_positions(rows: list[tuple[str, str, list[int]]]) -> int:
    """Each distinct prompt once, and behind it each distinct completion up to the last token that a sampled one is
    predicted from."""
    last = [max(i for i, on in enumerate(mask) if on) for *_, mask in rows]
    distinct = {(prompt, text[:n]) for (prompt, text, _), n in zip(rows, last, strict=True)}
    return sum(map(len, {prompt for prompt, *_ in rows})) + sum(len(text) for _, text in distinct)


def steps(made: Any, parts: list[list[dict[str, Any]]]) -> tuple[int, int]:
    """Positions of the trunk and of the head in an update of these groups, one list for each optimizer step."""
    rows = [kept_rows(made, part) for part in parts]
    return sum(map(packed_positions, rows)), sum(sum(mask) for part in rows for *_, mask in part)


def test_the_update_takes_each_prompt_once_no_padding_and_three_products_of_the_head(tmp_path):
    data = [LIVE[0], DEAD[1], LIVE[2], LIVE[1]]  # first and third share their prompt, in two steps
    made = runs.trainer(tmp_path, data=data, **STEP)
    with positions(made) as counts, HeadProducts(made) as products:
        made.train(overwrite=True)
    trunk, head = steps(made, [[LIVE[0]], [LIVE[2], LIVE[1]]])
    linear = {name: count for name, count in counts.items() if name != "trunk"}
    assert counts["trunk"] == trunk
    assert len(linear) == 14
    assert set(linear.values()) == {trunk}
    assert products.total == pytest.approx(3 * head)


def test_equal_prompts_of_different_groups_are_read_once(tmp_path):
    made = runs.trainer(tmp_path, data=[LIVE[0], LIVE[2], LIVE[1], LIVE[3]], **STEP)
    with positions(made) as counts:
        made.train(overwrite=True)
    assert counts["trunk"] == steps(made, [[LIVE[0], LIVE[2]], [LIVE[1], LIVE[3]]])[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_equal_completions_are_read_once_unless_the_forward_draws(dropout, tmp_path, monkeypatch):
    """Without dropout, training as if each were read is the same up to rounding; with it, to the bit, for each is read."""
    data = [group("1+1=", ["0", "zzz", "zzz", "zzz"]), group("22+3=", ["zz", "00A", "zz", "00A"])]

    def train() -> tuple[int, torch.Tensor]:
        model, _ = tiny_policy(dtype=torch.float64)
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(dropout))
        parts = STEP | {"rollout": SCRIPTED | {"prompts": 2}, "update": {"mini_batches": 1}, "model": {"dropout": True}}
        made = runs.trainer(tmp_path, policy=model, data=data, training={"max_steps": 1}, **parts)
        with positions(made) as counts:
            made.train(overwrite=True)
        return counts["trunk"], runs.parameters(made)

    (count, found), every = train(), 4 + 5 + 1 + 3 * 3 + 2 * 2 + 2 * 3
    assert count == (every if dropout else 4 + 5 + 1 + 3 + 2 + 3)
    monkeypatch.setattr(Packed, "_first", staticmethod(lambda prompts, completions, used: list(range(len(used)))))
    count, due = train()
    assert count == every
    torch.testing.assert_close(found, due, rtol=0, atol=0 if dropout else 1e-8)


def test_padded_rows_cost_what_packing_saves(tmp_path):
    made = runs.trainer(tmp_path, data=LIVE, **{**STEP, "update": {"mini_batches": 2, "attention": "padded"}})
    with positions(made) as counts:
        made.train(overwrite=True)
    widest = [
        max(len(g["prompt"]) + len(t) + 1 for g in part for t in g["completions"][:4]) for part in (LIVE[:2], LIVE[2:])
    ]
    assert counts["trunk"] == 8 * sum(widest) > 1.5 * steps(made, [LIVE[:2], LIVE[2:]])[0]


# Rows without advantage


def train(folder: Path, data: Any, dead: bool, monkeypatch: Any, **training: Any) -> tuple[Any, list[torch.Tensor]]:
    """The trainer and its parameters after each step; with `dead` rows without advantage are in the update."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(runs.parameters(made))

    seen: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        if dead:
            patch.setattr(Algorithm, "skips_rows_without_advantage", property(lambda self: False))
        update = {"mini_batches": 1, "epochs": 2}
        parts = {**STEP, "update": update}
        made = runs.trainer(folder, data=data, dtype=torch.float64, training=training, callbacks=[Watch()], **parts)
        seen.append(runs.parameters(made))
        made.train(overwrite=True)
    made.close()
    return made, seen


OPTIMIZERS = {
    "adam": {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.01},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_leaving_out_rows_without_advantage_changes_no_parameter(optimizer, tmp_path, monkeypatch):
    data = [LIVE[0], DEAD[1], LIVE[2], DEAD[3]]
    options = {"max_steps": 4, **OPTIMIZERS[optimizer]}
    made, left_out = train(tmp_path, data, False, monkeypatch, **options)
    assert made.algorithm.skips_rows_without_advantage
    _, kept = train(tmp_path, data, True, monkeypatch, **options)
    moved = (kept[-1] - kept[0]).norm()
    assert moved > 1e-2
    assert (left_out[-1] - kept[-1]).norm() < 1e-6 * moved


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rollout_without_any_advantage_moves_parameters_as_zero_gradients_do(optimizer, tmp_path, monkeypatch):
    """Two steps on a rollout, then two on one in which nothing differs: momentum goes on, exactly."""
    options = {"max_steps": 4, **OPTIMIZERS[optimizer]}
    _, left_out = train(tmp_path, [*LIVE, *DEAD], False, monkeypatch, **options)
    _, kept = train(tmp_path, [*LIVE, *DEAD], True, monkeypatch, **options)
    for a, b in zip(left_out, kept, strict=True):
        assert torch.equal(a, b)
    assert (left_out[3] - left_out[2]).norm() > 1e-4
    assert (left_out[4] - left_out[3]).norm() > 1e-4


def test_a_step_without_any_advantage_reads_one_token(tmp_path):
    made = runs.trainer(tmp_path, data=DEAD, **STEP)
    with positions(made) as counts:
        made.train(overwrite=True)
    assert counts["trunk"] == made.state.global_step == 2


# Forwards before the update

RLOO: dict[str, Any] = {
    "rollout": runs.SAMPLED,
    "advantages": "leave_one_out",
    "kl": [{"use": "in_reward", "beta": 0.05, "estimator": "k1"}],
    "reference": "frozen",
    "policy_loss": "reinforce",
    "update": {"mini_batches": 1},
}


@pytest.mark.parametrize("update", [{"mini_batches": 1}, {"mini_batches": 1, "epochs": 2}], ids=["once", "two epochs"])
def test_the_sampler_s_log_probs_spare_the_forward_of_the_old_policy(update, tmp_path):
    """RLOO with a KL to the reference: one forward of the reference, one of the policy for each epoch."""
    made = runs.trainer(tmp_path, training={"max_steps": update.get("epochs", 1)}, **{**RLOO, "update": update})
    with positions(made) as counts:
        made.train(overwrite=True)
    buffer: Buffer = made.buffer
    once = sum(map(len, set(map(tuple, buffer.prompt_ids)))) + sum(len(ids) - 1 for ids in buffer.completion_ids)
    assert counts["reference trunk"] == once
    assert counts["trunk"] == update.get("epochs", 1) * once


@pytest.mark.parametrize(
    "half", [{"rollout": {**runs.SAMPLED, "decode_dtype": "bfloat16"}}, {"training": {"bf16": True}}], ids=str
)
def test_a_sampler_that_rounds_costs_the_forward_of_the_old_policy(half, tmp_path):
    training = {"max_steps": 1, **half.get("training", {})}
    made = runs.trainer(tmp_path, training=training, **{**RLOO, **{k: v for k, v in half.items() if k != "training"}})
    with positions(made) as counts:
        made.train(overwrite=True)
    assert counts["trunk"] == 2 * counts["reference trunk"] > 0


def test_without_a_kl_one_step_per_rollout_needs_the_forward_of_the_loss_alone(tmp_path):
    made = runs.trainer(tmp_path, data=LIVE, training={"max_steps": 1}, **{**STEP, "update": {"mini_batches": 1}})
    with positions(made) as counts:
        made.train(overwrite=True)
    assert counts["trunk"] == steps(made, [LIVE])[0]


# Waits for the device

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


class Waits(TorchDispatchMode):
    """Operators after which the host knows a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if name in WAITS or (by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def waits(made: Any, monkeypatch: Any) -> dict[str, Waits]:
    """What is waited for inside `collect`, decoding left out, in the slot and in the update."""
    found = {name: Waits() for name in ("collect", "slot", "update")}
    running: list[Waits] = []

    def counting(name: str) -> Callable[..., Any]:
        own = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any) -> Any:
            if running:
                running[-1].counts[name] += 1
            return own(self, *args)

        return counted

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counting(name))

    def inside(part: Waits | None, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outer, running[:] = running[:], [part] if part else []
            try:
                if part is None:
                    return own(*args, **kwargs)
                with part:
                    return own(*args, **kwargs)
            finally:
                running[:] = outer

        return run

    monkeypatch.setattr(Buffer, "slot", inside(found["slot"], Buffer.slot))
    monkeypatch.setattr(made.collector, "collect", inside(found["collect"], made.collector.collect))
    monkeypatch.setattr(made, "training_step", inside(found["update"], made.training_step))
    return found


@pytest.mark.parametrize(("completions", "most"), [(0, 22), (16, 26)], ids=["", "recorded for the report"])
def test_waits_for_the_device_do_not_grow_with_the_rows(completions, most, tmp_path, monkeypatch):
    """An upper bound: what is read of lists and masks on the host is counted too. A run records 16 of its rollouts."""
    seen = []
    for prompts in (4, 16):
        with monkeypatch.context() as patch:
            made = runs.trainer(
                tmp_path,
                data=runs.problems(prompts),
                training={"max_steps": 1},
                rollout={**runs.SCRIPTED, "prompts": prompts},
                update={"mini_batches": 1},
                logging={"completions": completions},
            )
            found = waits(made, patch)
            made.train(overwrite=True)
        seen.append({name: sum(part.counts.values()) for name, part in found.items()})
    few, many = seen
    assert few == many
    assert 0 < sum(many.values()) <= most


# Messages between processes

PROCESSES = 2


def collectives(made: Any) -> dict[str, Counter[str]]:
    """Calls of torch.distributed's collectives while the trainer collects, updates and logs. Those in which DDP averages
    gradients are its own and not counted."""
    import torch.distributed as dist

    found: dict[str, Counter[str]] = {name: Counter() for name in ("collect", "update", "log", "between")}
    inside = ["between"]

    def count(name: str) -> None:
        own = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[inside[-1]][name] += 1
            return own(*args, **kwargs)

        setattr(dist, name, call)

    def phase(owner: Any, method: str, name: str) -> None:
        own = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            inside.append(name)
            try:
                return own(*args, **kwargs)
            finally:
                inside.pop()

        setattr(owner, method, run)

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier"):
        count(name)
    phase(made.collector, "collect", "collect")
    phase(made, "training_step", "update")
    phase(made, "log", "log")
    return found


def main(folder: Path) -> None:
    """One process: two rollouts of two optimizer steps, logged each."""
    torch.set_num_threads(1)
    made = runs.trainer(folder / "out", data=[*LIVE, *LIVE], training={"max_steps": 4}, **STEP)
    found = collectives(made)
    made.train(overwrite=True)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps({**found, "version": made.collector.policy.version}))


def test_a_rollout_takes_few_collectives(tmp_path):
    words, pipe = [*warm(__name__), str(tmp_path)], subprocess.PIPE
    ended_well(
        [subprocess.Popen(words, env=environment(**rank), stdout=pipe, stderr=pipe, text=True) for rank in ranks()]
    )
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert seen[0] == seen[1], "the version of the policy included"
    rollouts, updates = 2, 4
    collect, log = Counter(seen[0]["collect"]), Counter(seen[0]["log"])
    table, statistics = 3, 3
    assert collect["all_gather"] == (table + statistics) * rollouts, (
        "shapes, masks and tensors by row; mean and deviation of rewards and of advantages, their ends"
    )
    assert collect["all_gather_object"] == rollouts, "names of what was measured in the updates before"
    assert collect["all_reduce"] == rollouts - 1, "their sums, where there were updates before"
    assert log == {"all_gather_object": updates, "all_reduce": updates}, "names and sums of what is logged"
    assert collect.total() == (table + statistics) * rollouts + rollouts + rollouts - 1
    assert not seen[0]["update"], "but for what DDP does in the backward"


if __name__ == "__main__":
    from hf_rlhf.cli.main import _end as end  # threads of a process group may abort an ordinary end

    main(Path(sys.argv[1]))
    end(0)
