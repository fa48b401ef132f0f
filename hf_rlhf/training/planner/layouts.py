"""Layouts of a recipe on several devices: who trains and who samples, what each device holds, seconds of a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_rlhf.config.recipe import OfflineRecipe, Recipe
from hf_rlhf.config.sharding import Sharding, model_sharding_problems, sharding_of, sharding_problems
from hf_rlhf.data.model_loading import lora_config, without_weights
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.training.memory import estimate as memory
from hf_rlhf.training.offline.memory_estimate import estimate_offline
from hf_rlhf.training.offline.model import AUTO, lora_for
from hf_rlhf.training.planner.devices import Constants
from hf_rlhf.training.planner.schedule import Timing, simulate
from hf_rlhf.training.planner.work import Cost, Phases, Shape, Work, offline_phases, phases_of

GIB = 1024.0
"""MiB."""
KEPT_FREE = 0.1
"""Share of a device's memory for what a forecast does not count."""
MOST_AHEAD = 2
PASSING = {
    *("cache", "logits", "layers", "forward", "activations", "weights in 16 bits", "backward", "gradients"),
    *("gathered weights", "reference scores", "gradient buckets"),
}
"""Parts of a forecast that come and go within a phase."""


@dataclass(kw_only=True)
class Layout:
    """One way to use the devices. `memory` and `engine`: GiB of a training device by phase and part, of an engine's by part."""

    title: str
    trainers: int
    sharded: bool
    timing: Timing
    overrides: list[str] = field(default_factory=list)
    servers: int = 0
    split: int = 1
    """Devices of a server."""
    ahead: int = 0
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fits: bool = True

    @property
    def peak(self) -> float:
        """GiB of a training device in its largest phase."""
        return max((sum(parts.values()) for parts in self.memory.values()), default=0.0)

    @property
    def runs(self) -> bool:
        """Return whether hf_rlhf has this layout; those ahead of the policy are there to compare."""
        return not self.ahead

    @property
    def words(self) -> list[str]:
        """Arguments of `hf-rlhf train` that make it."""
        found = ["--nproc", str(self.trainers)] * (self.trainers > 1) + ["--fsdp=true"] * self.sharded + self.overrides
        if not self.servers:
            return found
        urls = [f"http://127.0.0.1:{8000 + i}" for i in range(self.servers)]
        devices = list(range(self.trainers, self.trainers + self.servers * self.split))
        serve = f"rollout.serve={{python: ../vllm/bin/python, devices: {devices}}}"
        return [*found, f"rollout.url=[{', '.join(urls)}]", serve, "rollout.sync=nccl"]

    def places(self) -> Iterator[tuple[str, str, str, float]]:
        """Yield (model or state, devices, how it lies there, GiB of each device)."""
        sizes: dict[str, float] = {}
        for parts in self.memory.values():
            for part, size in parts.items():
                if part not in PASSING:
                    sizes[part] = max(size, sizes.get(part, 0.0))
        for part, size in sizes.items():
            whole = not self.sharded or part == "reward models"
            how = "whole" if whole else f"1/{self.trainers} of each weight"
            yield part, _range(0, self.trainers), how, size
        if self.servers:
            how = f"{self.servers} servers" if self.split == 1 else f"{self.servers} servers, each on {self.split}"
            there = _range(self.trainers, self.trainers + self.servers * self.split)
            yield "policy in vLLM", there, how, self.engine["weights"]
            yield "cache of vLLM", there, how, self.engine["cache"]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {**asdict(self), "peak": self.peak, "words": self.words}


def placed(args: TrainingArguments, processes: int, device: str, sharded: bool) -> TrainingArguments:
    """Return the arguments as one of several processes on another device has them."""
    own: Any = copy.copy(args)
    there = {"device": torch.device(device), "world_size": processes}
    own.__class__ = type("Placed", (type(args),), there)
    own._sharding = (sharding_of(args) or Sharding()) if sharded else None
    return own


@dataclass
class Planner:
    """A checked recipe, devices and their constants, from which layouts are made."""

    recipe: Recipe
    args: TrainingArguments
    overrides: list[str]
    """Changes of the recipe that the layouts need."""
    constants: Constants
    spread: float
    """Relative deviation of the seconds of a rollout."""
    mean: float | None
    """Tokens of a completion; None: the most."""
    gpus: int
    gib: float
    device: str
    """Torch's name of the devices."""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> Any:
        """The trained model, on `meta`."""
        return policy_of(self.recipe)

    def colocated(self) -> Iterator[Layout]:
        """Yield layouts in which every device trains, and samples where there are rollouts."""
        for sharded in self._ways(self.gpus):
            base, phases = self._trainers(self.gpus, sharded)
            seconds = {name: self.constants.seconds(name, works) for name, works in phases.items()}
            rollout = seconds.get("rollout", 0.0)
            timing = simulate(rollout, 0.0, sum(seconds.values()) - rollout, spread=self.spread)
            title = "training" if isinstance(self.recipe, OfflineRecipe) else "colocated"
            yield Layout(**base, title=title + ", sharded" * sharded, seconds=seconds, timing=timing)

    def separate(self) -> Iterator[Layout]:
        """Yield layouts in which some devices sample, with the best servers of each number; one after the other and ahead."""
        for trainers in range(1, self.gpus):
            for sharded in self._ways(trainers):
                base, phases = self._trainers(trainers, sharded)
                learn = {n: self.constants.seconds(n, works) for n, works in phases.items() if n != "rollout"}
                yield from self._with_engine(base, learn)

    def _ways(self, trainers: int) -> Sequence[bool]:
        """Return whether weights are sharded in what is compared."""
        if trainers == 1:
            return [] if self.args.fsdp else [False]
        if sharding_of(self.args) is not None:
            return [True]
        args = placed(self.args, trainers, self.device, True)
        if isinstance(self.recipe, OfflineRecipe):
            refused = list(model_sharding_problems(args, self.recipe.model))
        else:
            refused = list(sharding_problems(self.recipe.algorithm(), args, self.recipe.model))
        self.notes += [f"not sharded: {why}" for why in refused if f"not sharded: {why}" not in self.notes]
        return [False] if refused else [False, True]

    def _trainers(self, trainers: int, sharded: bool) -> tuple[dict[str, Any], Phases]:
        """Return the fields of a layout that its trainers fill in, and the work of each."""
        recipe, settings = self.recipe, self.recipe.model
        args = placed(self.args, trainers, self.device, sharded)
        if isinstance(recipe, OfflineRecipe):
            found = estimate_offline(settings, recipe.trainer(), args)
        else:
            few_bits = settings.load_in_4bit or settings.load_in_8bit
            known: Any = {"model": None if few_bits else self.model, "prompt_tokens": recipe.dataset.max_prompt_tokens}
            found = memory.estimate(settings, recipe.algorithm(), args, **known)
        if not found.phases:
            raise UserError("; ".join(found.notes))
        self.notes += [note for note in found.notes if note not in self.notes]
        sizes = {phase: {part: mib / GIB for part, mib in parts.items()} for phase, parts in found.phases.items()}
        fits = max(sum(parts.values()) for parts in sizes.values()) <= (1 - KEPT_FREE) * self.gib
        base = {"trainers": trainers, "sharded": sharded, "overrides": self.overrides, "memory": sizes, "fits": fits}
        return base, work_of(recipe, self.model, args, trainers if sharded else 1, self.mean)

    def _with_engine(self, base: dict[str, Any], learn: dict[str, float]) -> Iterator[Layout]:
        """Yield layouts with the servers on the other devices that sample fastest, if any have room."""
        engines = list(self._engines(self.gpus - base["trainers"]))
        if not engines:
            return
        rollout, engine = min(engines, key=lambda choice: choice[0])
        sync = self.constants.seconds("sync", [Work(sent=Cost.of(self.model, bool(self.args.bf16)).weights)])
        title = f"{base['trainers']} train, {self.gpus - base['trainers']} sample" + ", sharded" * base["sharded"]
        seconds = {"rollout": rollout, **learn, "sync": sync}
        for ahead in range(MOST_AHEAD + 1):
            timing = simulate(rollout, sync, sum(learn.values()), ahead=ahead, spread=self.spread)
            named = title + f", {ahead} ahead" * (ahead > 0)
            yield Layout(**base, **engine, title=named, ahead=ahead, seconds=seconds, timing=timing)

    def _engines(self, devices: int) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield (seconds of a rollout, fields of a layout) of servers that share the devices, if these have room."""
        half = bool(self.args.bf16)
        cost, shape = Cost.of(self.model, half), shape_of(self.recipe, self.model, self.mean)
        for split in [n for n in range(1, devices + 1) if devices % n == 0 and n & (n - 1) == 0]:
            own, weights = shape.share(devices // split), cost.weights / split
            wanted = own.rows * (shape.prompt_tokens + shape.longest) * cost.cache / split
            free = (1 - KEPT_FREE) * self.gib * 2**30 - weights
            if free > wanted / own.rows:
                graphs = 1 / cost.layers  # a step of decoding is one CUDA graph
                works = list(cost.sampling(own, max(1.0, wanted / free), split, half, graphs))
                sizes = {"weights": weights / 2**30, "cache": min(wanted, free) / 2**30}
                engine = {"servers": devices // split, "split": split, "engine": sizes}
                yield self.constants.seconds("vllm", works), engine


def _range(start: int, stop: int) -> str:
    return str(start) if stop == start + 1 else f"{start}-{stop - 1}"


def policy_of(recipe: Recipe, trust_remote_code: bool = False) -> Any:
    """Return the model that a recipe trains, on `meta`, with its adapter. Raises `UserError` where there is none."""
    settings = recipe.model
    if isinstance(recipe, OfflineRecipe):
        plugin = recipe.trainer()
        auto = getattr(transformers, AUTO[plugin.head])
        plain = without_weights(auto, settings, trust_remote_code, num_labels=plugin.outputs)
        return memory.with_adapter(plain, settings.lora and lora_for(settings.lora, plugin.head))
    model = without_weights(AutoModelForCausalLM, settings, trust_remote_code)
    return memory.with_adapter(model, settings.lora and lora_config(settings.lora))


def shape_of(recipe: Recipe, model: Any, mean: float | None = None) -> Shape:
    """Return the size of a rollout whose completions have `mean` tokens, the most by default."""
    a = recipe.algorithm()
    longest = max(a.completion_bounds.values())
    tokens = recipe.dataset.max_prompt_tokens or memory.assumed_prompt(model, longest)
    group = a.rollout.num_generations * a.agents
    return Shape(prompts=a.rollout.prompts, group=group, prompt_tokens=tokens, mean=mean or longest, longest=longest)


def work_of(recipe: Recipe, model: Any, args: TrainingArguments, shards: int, mean: float | None = None) -> Phases:
    """Return the work of one process."""
    if isinstance(recipe, OfflineRecipe):
        return offline_phases(model, recipe.trainer(), args, shards)
    a = recipe.algorithm()
    rewards = [its for _, its in memory.reward_models(a, args, [])]
    return phases_of(model, a, args, shape_of(recipe, model, mean), shards, rewards)
