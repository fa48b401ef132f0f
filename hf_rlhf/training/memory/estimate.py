"""How much memory each phase of a run holds at most on one process, told before any model is loaded.

Weights, optimizer state and the rollout's cache are arithmetic; a micro-batch is counted (`fake_tensor_trace`) on the model
that the configuration describes, with every completion as long as it may become. The allocator's own overhead and what
kernels need inside are not in it; on CPU what the process holds before the model loads is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hf_rlhf.axes import TrainedCritic
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.model_loading import disable_dropout, lora_config
from hf_rlhf.data.quantization import bytes_of, lighten
from hf_rlhf.modeling.attention import attention_refusal
from hf_rlhf.runtime.peak_memory import MIB, resident
from hf_rlhf.training.memory.fake_tensor_trace import (
    MicroBatch,
    count_cache,
    count_forward,
    count_heads,
    count_update,
    hollow,
    tensor_bytes,
    trunk_of,
    without_storage,
)
from hf_rlhf.training.memory.resident import (
    ResidentMemory,
    UnmadeError,
    first_line,
    named_config,
    resident_memory,
    without_weights,
)
from hf_rlhf.training.memory.workload import LIBRARIES, PREFILL, SCORES, TRAINER, Workload, room

if TYPE_CHECKING:
    pass


@dataclass
class Estimate:
    """MiB by phase and part; the sum over its parts is a phase's peak. `notes` say what was assumed and what is missing."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def peak(self, phase: str) -> float:
        """MiB."""
        return sum(self.phases[phase].values())


def from_settings(
    settings: Model, setting: Workload, peft_config: Any = None, trust_remote_code: bool = False
) -> Estimate:
    """The estimate for a model that is only named. Without its configuration on this machine it says why there is none."""
    try:
        config = named_config(settings, trust_remote_code)
    except UnmadeError as error:
        return Estimate(notes=[f"not estimated: {error}"])

    spared = [0.0, 0.0]

    def make() -> Any:
        from transformers import AutoModelForCausalLM

        own = getattr(config, "dtype", None) or torch.float32
        dtype = own if settings.dtype == "auto" else getattr(torch, settings.dtype)
        eager = "double_backward" in setting.algorithm.needs or settings.attn_implementation == "eager"
        attention = {"attn_implementation": "eager"} if eager else {}
        model = without_weights(
            AutoModelForCausalLM, config, dtype=dtype, trust_remote_code=trust_remote_code, **attention
        )
        spared[:] = bytes_of(model, settings)
        return with_adapter(model if settings.dropout else disable_dropout(model), settings, peft_config)

    try:
        found = estimate(make, setting, -LIBRARIES)
    except UnmadeError as error:
        return Estimate(notes=[f"not estimated: {error}"])
    for parts in found.phases.values():
        lighten(parts, *(x / MIB for x in spared))
    return found


def from_model(model: Any, settings: Model, setting: Workload, peft_config: Any = None) -> Estimate:
    """The estimate for a model that is there: of its structure, none of its weights is copied."""
    loaded = (tensor_bytes(model) if model.device.type == "cpu" else 0) - TRAINER
    return estimate(lambda: with_adapter(hollow(model, "meta"), settings, peft_config), setting, loaded)


def with_adapter(model: Any, settings: Model, peft_config: Any) -> Any:
    """The model with the adapter that would be trained, if there is one; one that comes with an adapter keeps it."""
    if hasattr(model, "peft_config") or (peft_config is None and settings.lora is None):
        return model
    from peft import get_peft_model

    chosen: Any = peft_config if peft_config is not None else lora_config(settings.lora)  # type: ignore[arg-type]
    return get_peft_model(model, chosen, low_cpu_mem_usage=True)


def estimate(make: Callable[[], Any], setting: Workload, loaded: int = 0) -> Estimate:
    """The phases of a run. `make` gives the policy as it will be trained, on `meta`; `loaded` bytes of it are in this
    process already; where they are negative, as many are still to come."""
    a, found = setting.algorithm, Estimate()
    if setting.completion_tokens is None:
        found.notes.append(f"rollout={a.rollout.name} does not say how long its completions are: not estimated")
        return found
    process = 0.0
    if setting.device == "cpu":
        process = setting.process if setting.process is not None else float(max(0, resident() - loaded))
    blueprint = make()
    setting.context = getattr(blueprint.config.get_text_config(), "max_position_embeddings", None)
    if setting.prompt_tokens is None:
        found.notes.append(
            f"prompts of {setting.longest_prompt} tokens are assumed: dataset.max_prompt_tokens sets a bound"
        )
    critic_blueprint = _critic(a, blueprint)
    with without_storage():
        model = hollow(blueprint).train()
        critic = None if critic_blueprint is None else hollow(critic_blueprint)
        parts = resident_memory(setting, model, critic, found.notes)
        parts.here = {"process": process, **parts.here}
        scored = any("reward_model" in source.provides for source in a.rewards)
        try:
            found.phases["rollout"] = parts.on_device() | _rollout(setting, model)
            if forwards := [parts.on_device(*asked) | {"forward": x} for asked, x in _forwards(setting, model, critic)]:
                found.phases["forward"] = max(forwards, key=lambda of: sum(of.values()))
            if scored:
                found.phases["reward"] = parts.on_device("reward models")
            found.phases["update"] = _update(setting, parts, model, critic)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            found.notes.append(
                f"forwards cannot be counted for this model ({type(error).__name__}: {first_line(error)})"
            )
            found.phases = {"weights": parts.here}
    found.phases = {
        phase: {part: size / MIB for part, size in sizes.items() if size > 0} for phase, sizes in found.phases.items()
    }
    return found


def _critic(a: Algorithm, model: Any) -> Any:
    """A separate critic's trunk, as large as the policy's, or None. Its head is left out."""
    if not isinstance(a.critic, TrainedCritic) or a.critic.shares_forward:
        return None
    base = copy.deepcopy(model)
    if "adapter" in a.critic.needs:
        return trunk_of(base)  # on the policy's own frozen weights
    return trunk_of(base.merge_and_unload() if hasattr(base, "merge_and_unload") else base).requires_grad_(True)


def _rollout(setting: Workload, model: Any) -> dict[str, float]:
    """Bytes of a rollout: what its cache holds, the logits of one step and what is made of them, and the layers' own.

    A prompt's keys and values are held once for its rows. An architecture whose attention takes no layout of ours decodes
    with transformers' cache, every row with its prompt.
    """
    a, trunk, config = setting.algorithm, trunk_of(model), model.config.get_text_config()
    prompt, tokens = setting.longest_prompt, setting.completion_tokens or 0
    own, _ = setting.rows(a.rollout.prompts)
    rows = min(len(own), getattr(a.rollout, "max_rows", None) or len(own))
    prompts = -(-rows // a.rollout.num_generations)
    attention = 0
    if attention_refusal(trunk) is None:
        of_token = count_heads(trunk, setting.autocast)
        of_prompts, of_rows = prompts * prompt * of_token, rows * room(tokens - 1) * of_token
        attention = SCORES * rows * config.num_attention_heads * (prompt + tokens) * 4
    else:
        of_prompts, of_rows = 0, rows * count_cache(trunk, prompt + tokens, setting.autocast)
    head = model.get_output_embeddings().weight
    logits = rows * len(head) * (max(4, head.element_size()) + (head.element_size() if head.element_size() < 4 else 0))
    copies = 1 + (a.rollout.temperature != 1)

    def through(count: int, length: int) -> int:
        batch = MicroBatch(
            prompts=[[0] * length] * count, completions=[[]] * count, attention="flex", autocast=setting.autocast
        )
        return count_forward(trunk, batch, head=False)

    prefill: dict[str, float] = {"cache": 2 * of_prompts, "layers": through(1, min(prompts * prompt, PREFILL))}
    decode: dict[str, float] = {
        "cache": of_prompts + of_rows,
        "logits": logits + copies * rows * len(head) * 4,
        "layers": through(1, rows) + attention,
    }
    found = max((prefill, decode), key=lambda parts: sum(parts.values()))
    if getattr(a.rollout, "decode_dtype", "same") == "bfloat16":
        found["copy in bfloat16"] = 2 * sum(p.numel() for p in model.parameters())
    return found


def _forwards(setting: Workload, model: Any, critic: Any) -> list[tuple[list[str], float]]:
    """For each forward without gradient what is brought for it, and its bytes."""
    a = setting.algorithm
    rounds = setting.args.bf16 or next(model.parameters()).dtype not in (torch.float32, torch.float64)
    old = bool(a.readers_of_old_logps) and (rounds or not a.samples_old_logps)
    compared = bool(a.kl_over_distributions("rollout"))
    reads, refers = old or compared or "sum_sq_probs" in a.needs, "ref_logps" in a.needs
    if not (reads or refers or critic is not None):
        return []
    batch, _ = setting.largest(a.rollout.prompts, _attention(setting, model))
    own = count_forward(model, batch, head=True) if reads or refers else 0
    found: list[tuple[list[str], float]] = [(["reference"], own)] if refers else []
    if reads or critic is not None:
        of_critic = 0 if critic is None else count_forward(critic, batch, head=False)
        found.append((["critic", *(["reference"] if compared else [])], max(own if reads else 0, of_critic)))
    return found


def _update(setting: Workload, parts: ResidentMemory, model: Any, critic: Any) -> dict[str, float]:
    """Bytes of the largest micro-batch of an optimizer step, or of the optimizer's own step where what is brought for it
    makes that the larger one."""
    a = setting.algorithm
    batch, micros = setting.largest(-(-a.rollout.prompts // a.update.mini_batches), _attention(setting, model))
    if setting.checkpointed:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    counted = count_update(
        model, critic, batch, entropy="entropy" in a.needs, by_derivative=a.loss_is_fused, later=micros > 1
    )
    trained = sum(tensor_bytes(m, trainable=True) for m in (model, critic) if m is not None)
    gradients = min(trained, counted.peak - counted.saved)
    rest = counted.peak - counted.saved - gradients
    asked = ["critic", *(["reference"] if a.kl_over_distributions("update") else [])]
    step = parts.on_device(*asked, "optimizer", "average")
    before = step if a.steps_per_rollout > 1 else parts.on_device(*asked)
    backward = before | {"gradients": gradients, "activations": counted.saved, "backward": rest}
    return max(backward, step | {"gradients": trained}, key=lambda sizes: sum(sizes.values()))


def _attention(setting: Workload, model: Any) -> str:
    """How rows enter the model, as far as its configuration says."""
    a = setting.algorithm
    wanted = a.update.attention
    if (
        wanted == "padded"
        or (wanted == "auto" and "double_backward" in a.needs)
        or attention_refusal(model) is not None
    ):
        return "padded"
    return ("flex" if setting.device == "cuda" else "packed") if wanted == "auto" else wanted
