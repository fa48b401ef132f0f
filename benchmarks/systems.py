"""One run of a `Line` by us or by TRL in this process: seconds of each cycle by phase, peak memory, lengths, gradients.

A cycle goes from the end of one optimizer step to the end of the next (of the last one on a rollout, where there are
several); the rollout lies between. Seconds are processor time of all threads, and wall time beside it.

Phases: `rollout` (sampling), `forward` (log-probs of old policy and reference), `reward`, `update` (forward of the loss
and backward), `optimizer` (the step alone); `rest` is what remains.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from benchmarks.engine import Forced
from benchmarks.peak import mib, peak
from benchmarks.work import EOS, Line, dataset, forced_lengths, make_model, make_tokenizer, prompt_ids, scores, script
from hf_rlhf.axes import PolicyLoss

THEIR_ROWS = 8
"""Rows of a micro-batch of TRL's: its default."""
TOKENS = 1024
"""Most tokens of a micro-batch of ours."""
TRAINING = {
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
"""TrainingArguments of both; what is left out has one default: AdamW, gradients clipped at norm 1."""
CHECKED = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.02}
"""TrainingArguments of the steps whose gradients are compared."""


@dataclass(kw_only=True)
class Cycle:
    """One rollout with its updates."""

    seconds: float
    """By the stopwatch's clock: processor time if it has no other."""
    wall: float
    phases: dict[str, float]
    """name -> seconds of that clock."""


class Stopwatch(TrainerCallback):
    """Collects cycles, and what is timed inside them by name."""

    def __init__(self, steps_per_cycle: int, clock: Callable[[], float] = time.process_time):
        self.steps_per_cycle, self.clock = steps_per_cycle, clock
        self.cycles: list[Cycle] = []
        self._phases: dict[str, float] = {}
        self._began = self._step_began = (0.0, 0.0)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a phase."""
        began = self.clock()
        yield
        self._add(name, self.clock() - began)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to add its calls to a phase."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return function(*args, **kwargs)

        return wrapped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = self._now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add("optimizer", self._now()[0] - self._step_began[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps_per_cycle:
            return
        now = self._now()
        seconds, wall = (b - a for a, b in zip(self._began, now, strict=True))
        phases = {**self._phases, "rest": max(0.0, seconds - sum(self._phases.values()))}
        self.cycles.append(Cycle(seconds=seconds, wall=wall, phases=phases))
        self._phases, self._began = {}, now

    def _add(self, name: str, seconds: float) -> None:
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def _now(self) -> tuple[float, float]:
        return self.clock(), time.perf_counter()


class Gradients(TrainerCallback):
    """Keeps the policy's gradient of every optimizer step, as one vector."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        policy = getattr(model, "policy", model)
        self.found.append(torch.cat([_gradient(p).flatten() for p in policy.parameters()]))


def _gradient(parameter: Any) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def with_entropy(loss: PolicyLoss) -> PolicyLoss:
    """Return the same loss with the exact entropy of each token's distribution as a metric, as TRL logs it."""
    own = type(loss)

    def call(self: Any, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, **extras: Tensor) -> Any:
        entropy = extras.pop("entropy")
        value, metrics = own.__call__(self, logps, old_logps, advantages, mask, **extras)
        return value, {**metrics, "exact_entropy": entropy.detach()}

    settings = {setting.name: getattr(loss, setting.name) for setting in fields(loss)}
    return type(own.__name__, (own,), {"needs": own.needs | {"entropy"}, "__call__": call})(**settings)


@dataclass(kw_only=True)
class Run:
    """Measurements of a run."""

    cycles: list[Cycle] = field(default_factory=list)
    peak_mib: float = 0.0
    lengths: list[list[int]] = field(default_factory=list)
    """Completion lengths of each rollout, in tokens."""


# Ours


def recipe(line: Line, engine: Any, tokens: int | None = TOKENS, **parts: Any) -> Any:
    """Our recipe for a line: what TRL computes by default, with exact entropy measured as TRL does; `parts` replace its own."""
    from hf_rlhf import load_recipe
    from hf_rlhf.config.recipe import resolve

    named = load_recipe({"grpo": "grpo@trl", "rloo": "rloo"}[line.algorithm])
    kl = (
        {"use": "in_loss", "estimator": {"use": "k3_is"}}
        if line.algorithm == "grpo"
        else {"use": "in_reward", "estimator": {"use": "k1"}}
    )
    return resolve(
        {
            **{axis: named.raw[axis] for axis in ("advantages", "aggregation")},
            "rollout": engine,
            "rewards": [{"use": "function", "function": function} for function in scores(line.rewards)],
            "kl": [{**kl, "beta": line.beta / line.kls} for _ in range(line.kls)] if line.beta else [],
            "reference": "frozen" if line.beta else "none",
            "filters": [{"use": "too_short", "min_tokens": 1 + i % 2} for i in range(line.filters)],
            "policy_loss": with_entropy(named.plugins["policy_loss"]),
            "update": {"mini_batches": 1, "epochs": line.epochs, "max_tokens_per_micro_batch": tokens},
            "dataset": {"shuffle": False, "held_out": 0},
            "logging": {"completions": 0},
            **parts,
        },
        name=line.name,
    )


def our_trainer(
    line: Line,
    folder: str,
    rows: list[dict[str, Any]],
    engine: Any,
    callback: TrainerCallback,
    parts: dict[str, Any] | None = None,
    **training: Any,
) -> Any:
    """`RLHFTrainer` for a line; `parts` replace those of its recipe."""
    from transformers import TrainingArguments

    from hf_rlhf import RLHFTrainer

    args = TrainingArguments(folder, per_device_train_batch_size=line.rows, **{**TRAINING, **training})
    tokenizer = make_tokenizer(line.vocabulary)
    trainer = RLHFTrainer(
        make_model(line),
        recipe(line, engine, **(parts or {})),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_ours(line: Line, cycles: int, folder: str) -> Run:
    """`cycles` rollouts."""
    watch = Stopwatch(line.epochs)
    engine = Forced.of(line)
    steps = cycles * line.epochs
    trainer = our_trainer(line, folder, dataset(line, cycles), engine, watch, max_steps=steps)
    watch_ours(trainer, watch)
    try:
        with peak() as held:
            trainer.train()
        return Run(cycles=watch.cycles, peak_mib=mib(held), lengths=engine.lengths)
    finally:
        trainer.close()


def watch_ours(trainer: Any, watch: Stopwatch) -> None:
    """Time the phases that every run logs, by the stopwatch's clock."""
    logged = trainer.meters.time

    @contextmanager
    def both(name: str, *said: str) -> Iterator[None]:
        with watch.time(name), logged(name, *said):
            yield

    trainer.meters.time = both


def our_gradients(line: Line, folder: str) -> list[Tensor]:
    """Return the gradient of every optimizer step on one scripted rollout."""
    found = Gradients()
    engine = {"use": "scripted", "prompts": line.prompts, "num_generations": line.group}
    rows = dataset(line, 1)
    completions = script(line, 0)
    for i, row in enumerate(rows):
        row["completions"] = completions[i * line.group : (i + 1) * line.group]
    trainer = our_trainer(line, folder, rows, engine, found, max_steps=line.epochs, **CHECKED)
    try:
        reference = trainer.collector.forwards.reference
        _set_reference(line, reference and reference.own)
        trainer.train()
    finally:
        trainer.close()
    return found.found


# Theirs


def their_trainer(
    line: Line,
    folder: str,
    rows: list[dict[str, Any]],
    callback: TrainerCallback,
    micro_batch: int = THEIR_ROWS,
    **training: Any,
) -> Any:
    """TRL's trainer for a line, with micro-batches of so many rows."""
    import trl
    from datasets import Dataset

    model, tokenizer = make_model(line), make_tokenizer(line.vocabulary)
    if line.beta or training.get("use_vllm"):  # TRL loads the reference, and vLLM the policy, from where that came from
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.config._name_or_path = folder
    args = getattr(trl, f"{line.algorithm.upper()}Config")(
        folder,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=line.rows // micro_batch,
        num_generations=line.group,
        max_completion_length=line.longest,
        num_iterations=line.epochs,
        beta=line.beta,
        shuffle_dataset=False,
        **{**TRAINING, **training},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(trl, f"{line.algorithm.upper()}Trainer")(
            model,
            scores(line.rewards),
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[callback],
        )
    trainer.remove_callback(PrinterCallback)
    for parameter in () if trainer.ref_model is None else trainer.ref_model.parameters():
        parameter.data = parameter.data.clone()  # in memory from the start, not mapped from the file
    return trainer


def run_trl(line: Line, cycles: int, folder: str) -> Run:
    """`cycles` rollouts."""
    watch = Stopwatch(line.epochs)
    steps = cycles * line.epochs
    trainer = their_trainer(line, folder, dataset(line, cycles), watch, max_steps=steps)
    lengths: list[list[int]] = []
    force(trainer.model, line)
    watch_trl(trainer, watch, lengths)
    with peak() as held:
        trainer.train()
    return Run(cycles=watch.cycles, peak_mib=mib(held), lengths=lengths)


def force(model: Any, line: Line) -> None:
    """Force the lengths of `generate`: the end of sequence is certain there, impossible before."""
    from transformers import LogitsProcessor

    generate, calls = model.generate, iter(range(10**9))

    class Force(LogitsProcessor):
        """Called before each token; the prompt ends at column `start`."""

        def __init__(self, lengths: Tensor, start: int):
            self.lengths, self.start = lengths, start

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            ends = self.lengths <= input_ids.size(1) - self.start + 1
            scores[:, EOS] = torch.where(ends, 1e9, float("-inf"))
            return scores

    def forced(*args: Any, **kwargs: Any) -> Any:
        lengths = forced_lengths(line, next(calls))
        return generate(*args, logits_processor=[Force(lengths, kwargs["input_ids"].size(1))], **kwargs)

    model.generate = forced


def watch_trl(trainer: Any, watch: Stopwatch, lengths: list[list[int]]) -> None:
    """Time the phases of TRL's trainer and record the lengths of its completions."""
    generate, logps = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies

    def generated(*args: Any, **kwargs: Any) -> Any:
        with watch.time("rollout"):
            found = generate(*args, **kwargs)
        ids = found[0] if isinstance(found, tuple) else found
        lengths.append([len(row) for row in ids])
        return found

    def scored(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # part of the update
            return logps(*args, **kwargs)
        with watch.time("forward"):
            return logps(*args, **kwargs)

    trainer._generate_single_turn = generated
    trainer._get_per_token_logps_and_entropies = scored
    trainer._calculate_rewards = watch.timed("reward", trainer._calculate_rewards)
    trainer.compute_loss = watch.timed("update", trainer.compute_loss)
    trainer.accelerator.backward = watch.timed("update", trainer.accelerator.backward)


def their_gradients(line: Line, folder: str) -> list[Tensor]:
    """Return the gradient of every optimizer step on one scripted rollout."""
    found = Gradients()
    trainer = their_trainer(line, folder, dataset(line, 1), found, max_steps=line.epochs, **CHECKED)
    completions = script(line, 0)
    answer = (completions, None) if line.algorithm == "grpo" else completions
    trainer._generate_single_turn = lambda *args, **kwargs: answer
    _set_reference(line, trainer.ref_model)
    trainer.train()
    return found.found


def _set_reference(line: Line, model: Any) -> None:
    """Give the reference other weights than the policy's, so that the KL is nonzero from the first step on."""
    if model is not None:
        other, own = make_model(line, seed=1), make_model(line)
        with torch.no_grad():
            for mine, new, old in zip(model.parameters(), other.parameters(), own.parameters(), strict=True):
                mine.copy_(old + 0.5 * (new - old))


# Either


RUNS: dict[str, Callable[[Line, int, str], Run]] = {"ours": run_ours, "trl": run_trl}
GRADIENTS: dict[str, Callable[[Line, str], list[Tensor]]] = {"ours": our_gradients, "trl": their_gradients}


def run(system: str, line: Line, cycles: int, gradients: Path | None = None) -> Run:
    """One run, on one thread. Afterwards the gradients of scripted completions go to `gradients`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = RUNS[system](line, cycles, folder)
    if gradients is not None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(GRADIENTS[system](line, folder), gradients)
    return found


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest distance of a step's gradients, relative to theirs; infinite if the numbers of steps differ."""
    if len(ours) != len(theirs) or not ours:
        return float("inf")
    apart = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True)]
    return max(apart)


def prompts_and_lengths(line: Line, cycle: int) -> tuple[list[int], list[list[int]]]:
    """Tokens of each prompt, and of each of its completions."""
    lengths = forced_lengths(line, cycle).view(line.prompts, line.group).tolist()
    return [len(ids) for ids in prompt_ids(line, cycle)], lengths
