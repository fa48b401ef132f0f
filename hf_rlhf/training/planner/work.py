"""Operations and bytes of each phase of a step, from shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainingArguments

from hf_rlhf.axes import TrainedCritic
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.offline_trainer import OfflineTrainer
from hf_rlhf.modeling.attention import attention_refusal
from hf_rlhf.training.memory import estimate as memory
from hf_rlhf.training.memory.references import reference_models
from hf_rlhf.training.offline.memory_estimate import most_tokens
from hf_rlhf.training.offload_checks import optimizer_name

BACKWARD = 2.0
"""Operations of a backward per operation of its forward: the gradient of the inputs, and that of the weights."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a device: `flops`, `moved` bytes of its memory, `sent` bytes between devices, and `calls` of a layer, each of
    which costs the same however small it is."""

    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    calls: float = 0.0
    half: bool = False
    """Products are in 16 bits."""


Phases = dict[str, list[Work]]
"""Phase -> its parts, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a rollout."""

    prompts: float
    group: int
    prompt_tokens: int
    mean: float
    """Tokens of a completion."""
    longest: float

    @property
    def rows(self) -> float:
        """Completions."""
        return self.prompts * self.group

    def share(self, devices: int) -> Shape:
        """Return the part of one of several devices."""
        return Shape(**{**vars(self), "prompts": self.prompts / devices})


@dataclass(frozen=True)
class Cost:
    """A model's cost per token."""

    trunk: float
    """Operations of the forward below the head."""
    head: float
    context: float
    """Operations of attention per token of its context."""
    layers: int
    width: int
    weights: float
    """Bytes."""
    cache: float
    """Bytes of keys and values."""

    @classmethod
    def of(cls, model: Any, half: bool) -> Cost:
        """Return the cost of a model, which may be on `meta`."""
        config, trunk = model.config.get_text_config(), memory.trunk_of(model)
        rows = {id(m.weight) for m in trunk.modules() if isinstance(m, torch.nn.Embedding)}
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        products = sum(
            p.numel() * (chosen / len(p) if p.dim() == 3 else 1)
            for p in trunk.parameters()
            if p.dim() > 1 and id(p) not in rows
        )
        head = getattr(model.get_output_embeddings(), "weight", None)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        size = memory.tensor_bytes(model)
        return cls(
            trunk=2.0 * products,
            head=0.0 if head is None else 2.0 * head.numel(),
            context=4.0 * layers * config.num_attention_heads * width,
            layers=layers,
            width=config.hidden_size,
            weights=size * (2 / model.dtype.itemsize if half and model.dtype.itemsize > 2 else 1),
            cache=memory.cache_per_token(model, half),
        )

    def sampling(self, shape: Shape, batches: float, split: int, half: bool, calls: float) -> Iterator[Work]:
        """Yield prefill and decoding of a rollout in `batches`, on `split` devices that share each product; `calls` per layer."""
        prompts, length = shape.prompts * shape.prompt_tokens, shape.prompt_tokens
        flops = prompts * (self.trunk + self.context * length / 2)
        yield Work(flops=flops / split, moved=batches * self.weights / split, calls=batches * self.layers, half=half)
        context, tokens, steps = length + shape.mean / 2, shape.rows * shape.mean, batches * shape.longest
        yield Work(
            flops=tokens * (self.trunk + self.head + self.context * context) / split,
            moved=(steps * self.weights + tokens * context * self.cache) / split,
            sent=(split > 1) * 8.0 * self.layers * tokens * self.width,  # two all-reduces in a layer, of 16 bits
            calls=steps * self.layers * calls,
            half=half,
        )

    def reading(self, shape: Shape, shared: bool, half: bool, batches: float = 1, times: float = 1) -> Work:
        """Return a pass over all rows in `batches`, whose operations count `times`; `shared`: prompts are computed once."""
        prompts = shape.prompts if shared else shape.rows
        tokens, sampled = prompts * shape.prompt_tokens + shape.rows * shape.mean, shape.rows * shape.mean
        context = self.context * (shape.prompt_tokens + shape.mean) / 2
        flops = tokens * (self.trunk + context) + sampled * self.head
        calls = batches * self.layers * times
        return Work(flops=times * flops, moved=times * batches * self.weights, calls=calls, half=half)


def phases_of(
    model: Any, a: Algorithm, args: TrainingArguments, shape: Shape, shards: int, reward_models: list[Any]
) -> Phases:
    """Return the phases of a step, a whole rollout with its updates, in one of `args.world_size` processes.

    `shards`: processes that share the weights. For functions, judges and servers that score, each row is a call.
    """
    half, processes = bool(args.bf16), args.world_size
    own, cost = shape.share(processes), Cost.of(model, half)
    rows = getattr(a.rollout, "max_rows", None) or own.rows
    found: Phases = {"rollout": list(cost.sampling(own, max(1.0, own.rows / rows), 1, half, 1.0))}
    if shards > 1:
        found["rollout"].append(Work(sent=cost.weights))
    shared = a.update.attention != "padded" and attention_refusal(model) is None
    batches = micro_batches(own, a, args, shared)
    gathered = Work(sent=cost.weights * batches * (shards - 1) / shards)
    policy = [cost.reading(own, shared, half, batches), gathered]
    readers = [its for _, its in reference_models(model, a, args, []).values()]
    costs = [Cost.of(reader, half) for reader in readers]
    separate = isinstance(a.critic, TrainedCritic) and not a.critic.shares_forward
    costs += [replace(cost, head=0.0)] * separate
    found["forward"] = policy * memory.reads_policy(model, a, half)
    for each in costs:
        found["forward"] += [each.reading(own, shared, half, batches), gathered]
    found["reward"] = [Cost.of(m, half).reading(own, False, half, batches) for m in reward_models]
    found["reward"] += [Work(calls=own.rows)] * (len(a.rewards) > len(reward_models))
    update = cost.reading(own, shared, half, batches, times_of_update(model, args) * a.update.epochs)
    steps = a.steps_per_rollout
    step = optimizer_step(model, args, cost, shards, a.update.epochs * batches, steps)
    found["update"] = [update, step] * (1 + separate)
    return found


def times_of_update(model: Any, args: TrainingArguments) -> float:
    """Return the operations of forward and backward per operation of a forward."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    again = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    return 1.0 + again + (BACKWARD if trained > sum(p.numel() for p in model.parameters()) / 2 else BACKWARD / 2)


def optimizer_step(
    model: Any, args: TrainingArguments, cost: Cost, shards: int, batches: float, steps: int = 1
) -> Work:
    """Return what `steps` optimizer steps read, write and exchange besides forwards and backwards in `batches`."""
    size, others = memory.tensor_bytes(model, trainable=True), (args.world_size - 1) / args.world_size
    state = memory.optimizer_bytes(optimizer_name(args), size, [])
    sent = 2.0 * steps * size if shards == 1 else batches * (2 * cost.weights + size)  # an all-reduce sends twice
    return Work(moved=steps * 2 * (2 * size + state) / shards, sent=sent * others, calls=steps * cost.layers)


def micro_batches(shape: Shape, a: Algorithm, args: TrainingArguments, shared: bool) -> float:
    """Return how many micro-batches a pass over all rows takes, at least one for each mini-batch."""
    tokens = shape.rows * (shape.mean + shape.prompt_tokens / (shape.group if shared else 1))
    most = a.update.max_tokens_per_micro_batch
    packed = shared and most is not None
    count = tokens / most if packed and most else shape.rows / args.per_device_train_batch_size
    return float(max(a.update.mini_batches, count, 1.0))


def offline_phases(model: Any, trainer: OfflineTrainer, args: TrainingArguments, shards: int) -> Phases:
    """Return the optimizer step of a recipe without rollouts in one of `args.world_size` processes."""
    half, cost = bool(args.bf16), Cost.of(model, bool(args.bf16))
    footprint = trainer.footprint(hasattr(model, "peft_config"))
    batches = args.gradient_accumulation_steps
    rows = args.per_device_train_batch_size * footprint.texts * batches
    shape = Shape(prompts=rows, group=1, prompt_tokens=0, mean=most_tokens(model, trainer) or 0, longest=0)
    passes = times_of_update(model, args) + footprint.reference
    step = optimizer_step(model, args, cost, shards, batches)
    return {"update": [cost.reading(shape, False, half, batches, passes), step]}
