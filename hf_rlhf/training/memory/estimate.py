"""Forecast the peak memory of each phase on one process from shapes, before a model is loaded.

Rows are as long as they may become. Tensors are counted, not libraries or what kernels and the allocator need besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments

from hf_rlhf.axes import TrainedCritic, UpdateRule
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.quantization import bytes_of, lighten
from hf_rlhf.modeling.attention import attention_refusal
from hf_rlhf.modeling.ema import average_bytes
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.training.memory import shapes
from hf_rlhf.training.memory.shapes import BlueprintError, Sizes, load_config, with_adapter, without_weights
from hf_rlhf.training.offload_checks import optimizer_name

PROMPT_TOKENS = 256
"""Longest prompt if nothing bounds prompts."""
GROWTH = 32
"""Completion tokens that a rollout's cache holds at first; it doubles from there."""
PREFILL = 16384
"""Prompt tokens that enter the model at a time in a rollout."""


@dataclass
class Estimate:
    """Phase -> part -> MiB; the sum over the parts is the phase's peak. `notes` name assumptions and what is missing."""

    phases: dict[str, Sizes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, phase: str, sizes: Sizes, spared: tuple[float, float]) -> None:
        """Add a phase in bytes. `spared`: what `bytes_of` found for a quantised base."""
        lighten(sizes, *spared)
        self.phases[phase] = {part: size / MIB for part, size in sizes.items() if size > 0}


def estimate(
    settings: Model,
    a: Algorithm,
    args: TrainingArguments,
    *,
    model: Any = None,
    peft_config: Any = None,
    prompt_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """Return the forecast for a loaded model, or else the one that the settings name; notes if there is none."""
    found, spared, length = Estimate(), (0.0, 0.0), getattr(a.rollout, "max_new_tokens", None)
    try:
        if length is None:
            raise BlueprintError(f"rollout={a.rollout.name} does not bound its completions")
        if model is None:
            config = load_config(settings.path, settings.revision, trust_remote_code)
            model = without_weights(AutoModelForCausalLM, config, settings.dtype, trust_remote_code)
            spared = bytes_of(model, settings)
    except BlueprintError as error:
        return Estimate(notes=[f"not estimated: {error}"])
    if prompt_tokens is None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        prompt_tokens = min(PROMPT_TOKENS, max(1, context - length))
        found.notes.append(f"prompts of {prompt_tokens} tokens are assumed: dataset.max_prompt_tokens sets a bound")
    model = with_adapter(model, settings, peft_config)
    for phase, sizes in _phases(model, a, args, prompt_tokens, length, found.notes):
        found.add(phase, sizes, spared)
    return found


def _phases(
    model: Any, a: Algorithm, args: TrainingArguments, prompt: int, length: int, notes: list[str]
) -> Iterator[tuple[str, Sizes]]:
    """Yield each phase with what it holds and computes, in bytes."""
    separate = isinstance(a.critic, TrainedCritic) and not a.critic.shares_forward
    trunk = shapes.trunk_of(model).named_parameters() if separate else ()
    whole = "adapter" not in a.critic.needs  # else an adapter on the policy's frozen weights
    critic = sum(p.nbytes for name, p in trunk if ("lora_" not in name if whole else p.requires_grad))
    held, away = _held(model, a, args, critic, notes)

    def present(*parts: str) -> Sizes:
        return held | {part: held.get(part, 0.0) + away[part] for part in parts if part in away}

    half, shared = bool(args.bf16), attention_refusal(model) is None
    own = -(-a.rollout.prompts // args.world_size) * a.rollout.num_generations
    rows = min(own, getattr(a.rollout, "max_rows", None) or own)
    prompts = -(-rows // a.rollout.num_generations) if shared else rows
    room = GROWTH << max(0, (length - 2).bit_length() - 5)  # the last token is not cached
    cache, head = shapes.cache_per_token(model, half), model.get_output_embeddings().weight
    prefill = {"cache": 2.0 * prompts * prompt * cache}
    prefill["layers"] = shapes.layer_bytes(model, half, min(prompts * prompt, PREFILL))
    decode = {"cache": (prompts * prompt + rows * room) * cache}
    decode["logits"] = 4 * (1 + (a.rollout.temperature != 1)) * rows * len(head)
    rollout = max(prefill, decode, key=lambda sizes: sum(sizes.values()))
    if getattr(a.rollout, "decode_dtype", "same") == "bfloat16":
        rollout["copy in bfloat16"] = 2 * sum(p.numel() for p in model.parameters())
    yield "rollout", held | rollout
    padded = not shared or a.update.attention == "padded" or "double_backward" in a.needs
    group = 1 if padded else a.rollout.num_generations
    batch = range(1, min(own, args.per_device_train_batch_size) + 1)  # whole groups, or a part of one
    sizes = [(-(-n // group) * prompt + n * length, n * length) for n in batch if n < group or n % group == 0]
    most = a.update.max_tokens_per_micro_batch
    tokens, sampled = max((size for size in sizes if most is None or size[0] <= most), default=sizes[0])
    logits = shapes.logits_tile(model, sampled)
    readers = ["reference"] * ("ref_logps" in a.needs) + ["critic"] * bool(critic)
    rounds = half or next(model.parameters()).element_size() < 4
    old = a.readers_of_old_logps and (rounds or not a.samples_old_logps)
    if readers or old or "sum_sq_probs" in a.needs:
        read = sorted(readers, key=lambda part: away.get(part, 0.0))[-1:]  # one after the other
        yield "forward", present(*read) | {"forward": shapes.layer_bytes(model, half, tokens) + logits}
    if any("reward_model" in source.provides for source in a.rewards):
        notes.append("the phase reward is without what the forwards of reward models take")
        yield "reward", present("reward models")
    models = ["critic", *["reference"] * bool(a.kl_over_distributions("update"))]
    gradients = {"gradients": float(shapes.tensor_bytes(model, trainable=True) + critic)}
    step = present(*models, "optimizer", "average") | gradients
    backward = (step if a.steps_per_rollout > 1 else present(*models)) | gradients
    backward |= shapes.micro_batch_bytes(model, args, tokens, 2 * logits, 1 + bool(critic))
    yield "update", max(backward, step, key=lambda sizes: sum(sizes.values()))


def _held(model: Any, a: Algorithm, args: TrainingArguments, critic: int, notes: list[str]) -> tuple[Sizes, Sizes]:
    """Return what is on the device in every phase, and what `offload` brings to it only for some."""
    held, away, trained = Sizes(weights=shapes.tensor_bytes(model)), Sizes(), shapes.tensor_bytes(model, trainable=True)

    def put(part: str, size: float, *choices: Any) -> None:
        offloads = args.device.type != "cpu" and any(getattr(choice, "offload", False) for choice in choices)
        kept = away if offloads else held
        kept[part] = kept.get(part, 0.0) + size

    for label, source in zip(a.labels(), a.rewards, strict=True):
        if "reward_model" in source.provides and getattr(source, "device", "auto") in ("auto", args.device.type):
            try:
                config = load_config(getattr(source, "model", label), getattr(source, "revision", None))
                reward = without_weights(AutoModel, config, getattr(source, "dtype", "float32"))
                put("reward models", shapes.tensor_bytes(reward), source)
            except BlueprintError as error:
                notes.append(f"without the reward model {label}: {error}")
    if "ref_logps" in a.provides and "adapter" not in a.reference.needs:
        put("reference", trained, a.reference)
    put("critic", critic, a.critic)
    if a.update.ema is not None:
        put("average", average_bytes(model), a.update)
    if type(a.optimizer).hold is UpdateRule.hold:
        factor = shapes.optimizer_bytes(optimizer_name(args), 1, notes)
        put("optimizer", factor * trained, a.update)
        put("optimizer", factor * critic, a.update, a.critic)
    if args.world_size > 1:
        put("gradient buckets", trained + critic)
    return held, away
