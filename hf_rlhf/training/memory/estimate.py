"""Forecast the peak memory of each phase on one process from shapes, before a model is loaded.

Rows are as long as they may become. Tensors are counted: not the process and its libraries, nor what kernels and the
allocator need besides. Activations are within about a third of what a forward really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import TrainingArguments

from hf_rlhf.axes import TrainedCritic, UpdateRule
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.quantization import bytes_of, lighten
from hf_rlhf.modeling.attention import attention_refusal
from hf_rlhf.modeling.ema import average_bytes
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.training.memory.blueprint import (
    BlueprintError,
    first_line,
    local_config,
    named_config,
    with_adapter,
    without_weights,
)
from hf_rlhf.training.memory.shapes import (
    cache_per_token,
    cast_bytes,
    kept_per_token,
    layer_input_bytes,
    logits_tile,
    optimizer_bytes,
    tensor_bytes,
    trunk_of,
)
from hf_rlhf.training.offload_checks import optimizer_name

PROMPT_TOKENS = 256
"""Longest prompt if nothing bounds prompts."""
GROWTH = 32
"""Completion tokens that a rollout's cache holds at first; it doubles from there."""
PREFILL = 16384
"""Prompt tokens that enter the model at a time in a rollout."""

Sizes = dict[str, float]
"""Part -> bytes, later MiB."""


@dataclass
class Estimate:
    """Phase -> part -> MiB; the sum over the parts is the phase's peak. `notes` name assumptions and what is missing."""

    phases: dict[str, Sizes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def peak(self, phase: str) -> float:
        """Return a phase's peak in MiB."""
        return sum(self.phases[phase].values())

    def add(self, phase: str, sizes: Sizes, spared: tuple[float, float] = (0.0, 0.0)) -> None:
        """Add a phase in bytes. `spared`: what `bytes_of` found for a quantised base."""
        lighten(sizes, *spared)
        self.phases[phase] = {part: size / MIB for part, size in sizes.items() if size > 0}


@dataclass(kw_only=True)
class Workload:
    """Inputs of the memory estimate besides the model."""

    algorithm: Algorithm
    args: TrainingArguments
    prompt_tokens: int | None = None
    """Tokens of the longest prompt; None if unknown."""

    @cached_property
    def processes(self) -> int:
        return int(self.args.world_size)

    @cached_property
    def device(self) -> str:
        return self.args.device.type

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of the longest completion, if the rollout engine bounds it."""
        return getattr(self.algorithm.rollout, "max_new_tokens", None)

    def rows(self, prompts: int) -> int:
        """Return this process's rows of `prompts` prompts."""
        return -(-prompts // self.processes) * int(self.algorithm.rollout.num_generations)

    def micro_batch(self, prompts: int, prompt: int, padded: bool) -> tuple[int, int, bool]:
        """Return (tokens, sampled tokens) of the largest micro-batch of `prompts` prompts, and whether there are several."""
        group, length, rows = self.algorithm.rollout.num_generations, self.completion_tokens or 0, self.rows(prompts)

        def tokens(n: int) -> int:
            return (n if padded else -(-n // group)) * prompt + n * length

        most = self.algorithm.update.max_tokens_per_micro_batch
        bound = min(rows, self.args.per_device_train_batch_size)
        sizes = [n for n in range(1, bound + 1) if padded or n < group or n % group == 0]  # a group is split alone
        largest = max((n for n in sizes if most is None or tokens(n) <= most), default=1)
        return tokens(largest), largest * length, largest < rows


def from_settings(
    settings: Model, work: Workload, peft_config: Any = None, trust_remote_code: bool = False
) -> Estimate:
    """Return the forecast for a model that is only named, or a note if its configuration is not on this machine."""
    from transformers import AutoModelForCausalLM

    try:
        config = named_config(settings, trust_remote_code)
        model = without_weights(AutoModelForCausalLM, config, settings, trust_remote_code)
    except BlueprintError as error:
        return Estimate(notes=[f"not estimated: {error}"])
    return _estimate(with_adapter(model, settings, peft_config), work, bytes_of(model, settings))


def from_model(model: Any, settings: Model, work: Workload, peft_config: Any = None) -> Estimate:
    """Return the forecast for a loaded model; none of its weights is copied."""
    return _estimate(with_adapter(model, settings, peft_config), work, (0.0, 0.0))


def _estimate(model: Any, work: Workload, spared: tuple[float, float]) -> Estimate:
    found = Estimate()
    if work.completion_tokens is None:
        found.notes.append(f"not estimated: rollout={work.algorithm.rollout.name} does not bound its completions")
        return found
    phases = _Phases(model, work, found.notes)
    held, asked = phases.held(), phases.asked
    found.add("rollout", asked(held) | phases.rollout(), spared)
    forwards = [asked(held, *parts) | {"forward": size} for parts, size in phases.forwards()]
    if forwards:
        found.add("forward", max(forwards, key=lambda sizes: sum(sizes.values())), spared)
    if any("reward_model" in source.provides for source in work.algorithm.rewards):
        found.add("reward", asked(held, "reward models"), spared)
    found.add("update", phases.update(held), spared)
    return found


class _Phases:
    """The phases of a run in bytes."""

    def __init__(self, model: Any, work: Workload, notes: list[str]) -> None:
        self.model, self.work, self.notes = model, work, notes
        self.a = work.algorithm
        self.on_cpu, self.half = work.device == "cpu", bool(work.args.bf16)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        self.prompt = work.prompt_tokens or min(PROMPT_TOKENS, max(1, context - (work.completion_tokens or 0)))
        if work.prompt_tokens is None:
            notes.append(f"prompts of {self.prompt} tokens are assumed: dataset.max_prompt_tokens sets a bound")
        second, wanted = "double_backward" in self.a.needs, self.a.update.attention
        padded = wanted == "padded" or (wanted == "auto" and second)
        self.shared = attention_refusal(model) is None  # rows can share their prompt
        self.padded = padded or not self.shared
        keys = self.prompt + (work.completion_tokens or 0) if second else 0
        self.kept = kept_per_token(model, self.half, keys)
        self.layers = model.config.get_text_config().num_hidden_layers
        self.away: Sizes = {}

    @cached_property
    def critic(self) -> tuple[int, int]:
        """Bytes of a separate critic's trunk, as large as the policy's, and of what of it is trained."""
        if not isinstance(self.a.critic, TrainedCritic) or self.a.critic.shares_forward:
            return 0, 0
        trunk = trunk_of(self.model)
        if "adapter" in self.a.critic.needs:  # on the policy's own frozen weights
            return (trained := tensor_bytes(trunk, trainable=True)), trained
        whole = sum(p.nbytes for name, p in trunk.named_parameters() if "lora_" not in name)
        return whole, whole

    def held(self) -> Sizes:
        """Return what is on the device all the time; what `offload` brings only on request goes to `away`."""
        a, args, model, held = self.a, self.work.args, self.model, {"weights": float(tensor_bytes(self.model))}
        trained, (critic, of_critic) = tensor_bytes(model, trainable=True), self.critic

        def put(part: str, size: float, *choices: Any) -> None:
            offloaded = not self.on_cpu and any(getattr(choice, "offload", False) for choice in choices)
            kept = self.away if offloaded else held
            kept[part] = kept.get(part, 0.0) + size

        for size, offloaded in self._reward_models():
            if offloaded and not self.on_cpu:
                self.away["reward models"] = max(size, self.away.get("reward models", 0.0))  # one at a time
            else:
                put("reward models", size)
        if "ref_logps" in a.provides and "adapter" not in a.reference.needs:
            frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
            put("reference", tensor_bytes(model) - frozen, a.reference)
        put("critic", critic, a.critic)
        if a.update.ema is not None:
            put("average", average_bytes(model), a.update)
        if type(a.optimizer).hold is not UpdateRule.hold:
            self.notes.append(f"without the vectors of optimizer={a.optimizer.name}")
        else:
            factor = optimizer_bytes(optimizer_name(args), 1, self.notes)
            put("optimizer", factor * trained, a.update)
            put("optimizer", factor * of_critic, a.update, a.critic)
        if self.work.processes > 1:
            put("gradient buckets", trained + of_critic)
        return held

    def asked(self, held: Sizes, *parts: str) -> Sizes:
        """Return what is on the device if the offloaded `parts` are too."""
        return held | {part: held.get(part, 0.0) + self.away[part] for part in parts if part in self.away}

    def rollout(self) -> Sizes:
        """Return the cache, the logits of one step and one layer's activations, at the prefill or the last step."""
        engine, tokens = self.a.rollout, self.work.completion_tokens or 0
        own = self.work.rows(engine.prompts)
        rows = min(own, getattr(engine, "max_rows", None) or own)
        prompts, cached = -(-rows // engine.num_generations), cache_per_token(self.model, self.half)
        of_prompts = (prompts if self.shared else rows) * self.prompt * cached
        of_rows = rows * (room(tokens - 1) if self.shared else tokens) * cached
        head = self.model.get_output_embeddings().weight
        copies = 1 + (engine.temperature != 1) + (head.element_size() < 4) / 2
        layer = self.kept / self.layers
        prefill = {"cache": 2.0 * of_prompts, "layers": layer * min(prompts * self.prompt, PREFILL)}
        decode = {"cache": of_prompts + of_rows, "logits": 4 * copies * rows * len(head), "layers": layer * rows}
        found = max((prefill, decode), key=lambda parts: sum(parts.values()))
        if getattr(engine, "decode_dtype", "same") == "bfloat16":
            found["copy in bfloat16"] = 2.0 * sum(p.numel() for p in self.model.parameters())
        return found

    def forwards(self) -> list[tuple[list[str], float]]:
        """Return for each forward without gradient the parts it needs, and its bytes."""
        a, needs = self.a, self.a.needs
        rounds = self.half or next(self.model.parameters()).element_size() < 4
        old = bool(a.readers_of_old_logps) and (rounds or not a.samples_old_logps)
        compared = bool(a.kl_over_distributions("rollout"))
        reads, refers = old or compared or "sum_sq_probs" in needs, "ref_logps" in needs
        tokens, sampled, _ = self.work.micro_batch(a.rollout.prompts, self.prompt, self.padded)
        layer, logits = tokens * self.kept / self.layers, logits_tile(self.model, sampled)
        found = [(["reference"], layer + logits)] if refers else []
        if reads or self.critic[0]:
            found.append((["critic", *(["reference"] if compared else [])], layer + (logits if reads else 0)))
        return found

    def update(self, held: Sizes) -> Sizes:
        """Return the largest micro-batch of an optimizer step, or the optimizer's own step if that is larger."""
        a, args = self.a, self.work.args
        prompts = -(-a.rollout.prompts // a.update.mini_batches)
        tokens, sampled, several = self.work.micro_batch(prompts, self.prompt, self.padded)
        kept = layer_input_bytes(self.model) if checkpoints(args) else self.kept
        trunks = 1 + bool(self.critic[0])
        trained = tensor_bytes(self.model, trainable=True) + self.critic[1]
        parts = {
            **micro_batch_bytes(trained, trunks * tokens * kept, several),
            "weights in 16 bits": cast_bytes(self.model, self.half),
            "backward": tokens * self.kept / self.layers + 2 * logits_tile(self.model, sampled),
        }
        asked = ["critic", *(["reference"] if a.kl_over_distributions("update") else [])]
        step = self.asked(held, *asked, "optimizer", "average")
        before = step if a.steps_per_rollout > 1 else self.asked(held, *asked)
        return max(before | parts, step | {"gradients": trained}, key=lambda sizes: sum(sizes.values()))

    def _reward_models(self) -> list[tuple[float, bool]]:
        """Return the bytes of each reward model and whether it is offloaded; models loaded alike count once."""
        found: dict[tuple[Any, ...], tuple[float, bool]] = {}
        for label, source in zip(self.a.labels(), self.a.rewards, strict=True):
            if "reward_model" not in source.provides:
                continue
            device, dtype = getattr(source, "device", "auto"), getattr(source, "dtype", "float32")
            offload, revision = bool(getattr(source, "offload", False)), getattr(source, "revision", None)
            key = (getattr(source, "model", label), revision, dtype, offload)
            if device not in ("auto", self.work.device):
                self.notes.append(f"without the reward model {label}: it is on another device ({device})")
            elif key not in found:
                found[key] = self._reward_model(label, key[0], revision, dtype), offload
        if found:
            self.notes.append("the phase reward is without what the forwards of reward models take")
        return list(found.values())

    def _reward_model(self, label: str, path: object, revision: str | None, dtype: str) -> float:
        from transformers import AutoModel

        try:
            config = local_config(str(path), revision)
            settings = Model(dtype=dtype)  # type: ignore[arg-type]
            return tensor_bytes(without_weights(AutoModel, config, settings, False))
        except (OSError, ValueError) as error:
            self.notes.append(f"without the reward model {label}: {first_line(error)}")
            return 0.0


def micro_batch_bytes(trained: float, activations: float, later: bool) -> Sizes:
    """Return gradients and activations of a micro-batch.

    The gradients of a first micro-batch come as the activations go; a `later` one finds them there.
    """
    return {"gradients": trained if later else max(0.0, trained - activations), "activations": activations}


def checkpoints(args: TrainingArguments) -> bool:
    """Return whether layers run again in the backward."""
    return bool(getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing)


def room(tokens: int) -> int:
    """Return the tokens for which a completion's cache has room in the end."""
    size = GROWTH
    while size < tokens:
        size *= 2
    return size
