"""Forecast the peak memory of each phase on one process from shapes, before a model is loaded.

Rows are as long as they may become. Tensors are counted, not libraries or what kernels and the allocator need besides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments

from hf_rlhf.axes import Reference, TrainedCritic, UpdateRule
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.schedule import device_of
from hf_rlhf.config.sharding import sharding_of
from hf_rlhf.contract.model_settings import Model
from hf_rlhf.data.adapters import add_adapter
from hf_rlhf.data.model_loading import ModelError, lora_config, without_weights
from hf_rlhf.data.quantization import bytes_of, lighten
from hf_rlhf.modeling.attention import attention_refusal
from hf_rlhf.modeling.ema import average_bytes
from hf_rlhf.modeling.lm_head import tokens_at_a_time
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.training.memory.references import compared_in_update, kept_scores, reference_models
from hf_rlhf.training.offload_checks import optimizer_name

PROMPT_TOKENS = 256
"""Longest prompt if nothing bounds prompts."""
GROWTH = 32
"""Completion tokens that a rollout's cache holds at first; it doubles from there."""
PREFILL = 16384
"""Prompt tokens that enter the model at a time in a rollout."""
STATES = {"adamw": 2, "lion": 1, "adagrad": 1, "rmsprop": 1, "sgd": 0, "adafactor": 0}
"""Bytes of state per byte of float32 weights, by the start of the name in `optim`, for optimizers not in 8 or 4 bits."""

Sizes = dict[str, float]
"""Part -> bytes."""


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
    found, spared, length = Estimate(), (0.0, 0.0), max(a.completion_bounds.values(), default=None)
    try:
        if length is None:
            raise ModelError(f"rollout={a.rollout.name} does not bound its completions")
        if model is None:
            model = without_weights(AutoModelForCausalLM, settings, trust_remote_code)
            spared = bytes_of(model, settings)
        model = with_adapter(model, peft_config or (settings.lora and lora_config(settings.lora)))
    except UserError as error:
        return Estimate(notes=[f"not estimated: {error}"])
    if prompt_tokens is None:
        prompt_tokens = assumed_prompt(model, length)
        found.notes.append(f"prompts of {prompt_tokens} tokens are assumed: dataset.max_prompt_tokens sets a bound")
    for phase, sizes in _phases(model, a, args, prompt_tokens, length, found.notes):
        found.add(phase, sizes, spared)
    return found


def assumed_prompt(model: Any, length: int) -> int:
    """Return the tokens of the longest prompt where nothing bounds prompts, beside completions of `length`."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    return min(PROMPT_TOKENS, max(1, context - length))


def _phases(
    model: Any, a: Algorithm, args: TrainingArguments, prompt: int, length: int, notes: list[str]
) -> Iterator[tuple[str, Sizes]]:
    """Yield each phase with what it holds and computes, in bytes."""
    separate = isinstance(a.critic, TrainedCritic) and not a.critic.shares_forward and _is_here(a.critic, args)
    trunk = trunk_of(model).named_parameters() if separate else ()
    whole = "adapter" not in a.critic.needs  # else an adapter on the policy's frozen weights
    critic = sum(p.nbytes for name, p in trunk if ("lora_" not in name if whole else p.requires_grad))
    half, group = bool(args.bf16), a.rollout.num_generations
    references = reference_models(model, a, args, notes)
    held, gpu = list(_held(model, a, args, critic, references, notes)), args.device.type != "cpu"
    whole_row = conversation(a, length)[1]
    own = -(-a.rollout.prompts // args.world_size) * group
    kept = kept_scores(a, own * a.agents, length, max(4, model.dtype.itemsize))
    held += [("reference scores", kept, [])] * any(use.top_k for use in a.references.values())

    shards = args.world_size if sharding_of(args) is not None else 1
    gathered = {"gathered weights": gathered_bytes(model)} if shards > 1 else {}

    def on_device(*read: str) -> Sizes:
        found: Sizes = dict.fromkeys((part for part, *_ in held), 0.0)
        for part, size, choices in held:
            size /= shards if part in ("weights", "critic", "average", "optimizer", *references) else 1
            found[part] += size * (part in read or not (gpu and any(getattr(x, "offload", False) for x in choices)))
        return found

    shared = attention_refusal(model) is None
    rows = min(own, getattr(a.rollout, "max_rows", None) or own)
    prompts = (-(-rows // group) if shared else rows) * prompt
    turn, bounds = getattr(a.rollout, "max_new_tokens", None) or length, a.completion_bounds
    own_turns = [turn] * ("rollout.max_new_tokens" in bounds)
    said = max(own_turns + [min(e.max_tokens, e.max_turns * turn) for e in a.environment])
    room = GROWTH << max(0, (length - 2).bit_length() - 5)  # the last token is not cached
    cache = cache_per_token(model, half)
    prefill = {"cache": 2.0 * prompts * cache, "layers": layer_bytes(model, half, min(prompts, PREFILL))}
    logits = 4 * rows * len(model.get_output_embeddings().weight) * (1 + (a.rollout.temperature != 1))
    others = own * (a.agents * whole_row - length)
    decode = {"cache": (prompts + rows * room + others) * cache, "logits": logits}
    rollout = max(prefill, decode, key=lambda sizes: sum(sizes.values())) if a.rollout.local else {}
    whole_policy = {"gathered weights": float(tensor_bytes(model))} if shards > 1 and a.rollout.local else {}
    yield "rollout", on_device() | whole_policy | rollout
    tokens, sampled = _micro_batch(a, args, own * a.agents, prompt, length, said, shared)
    logits = logits_tile(model, sampled, args.device)
    readers = [*references, *["critic"] * bool(critic)]
    if readers or reads_policy(model, a, half):
        of_each = [(on_device(), model), *((on_device(x), references.get(x, (None, model))[1]) for x in readers)]
        forwards = [
            x | gathered | {"forward": layer_bytes(m, half, tokens) + logits_tile(m, sampled, args.device)}
            for x, m in of_each
        ]
        yield "forward", max(forwards, key=lambda sizes: sum(sizes.values()))  # one after the other
    if any("reward_model" in source.provides for source in a.rewards):
        notes.append("the phase reward is without what the forwards of reward models take")
        yield "reward", on_device("reward models")
    models = ["critic", *compared_in_update(a)]
    gradients = {"gradients": float(tensor_bytes(model, trainable=True) + critic) / shards}
    step = on_device(*models, "optimizer", "average") | gradients
    backward = (step if a.steps_per_rollout > 1 else on_device(*models)) | gradients
    backward |= gathered | micro_batch_bytes(model, args, tokens, 2 * logits, 1 + bool(critic))
    yield "update", max(backward, step, key=lambda sizes: sum(sizes.values()))


def reads_policy(model: Any, a: Algorithm, half: bool) -> bool:
    """Return whether the policy is run without gradient between rollout and update."""
    noted = a.samples_old_logps and (a.update.old_logps == "sampler" or not (half or model.dtype.itemsize < 4))
    old = a.readers_of_old_logps and not noted
    return bool(old or a.needs & {"sum_sq_probs", "old_entropy", "routing_fractions"})


def _micro_batch(
    a: Algorithm, args: TrainingArguments, rows: int, prompt: int, length: int, said: int, shared: bool
) -> tuple[int, int]:
    """Return the most tokens of a micro-batch of the update, and how many of them are sampled: whole groups, or a part of one."""
    pieces, whole_row = conversation(a, length)
    group, most = a.rollout.num_generations, a.update.max_tokens_per_micro_batch
    if not shared or a.update.attention == "padded" or "double_backward" in a.needs:
        group, whole_row, most_rows = 1, pieces * length + (pieces - 1) * prompt, args.per_device_train_batch_size
    else:
        most_rows = args.per_device_train_batch_size if most is None else rows * pieces
    batch = range(1, min(rows, max(1, most_rows // pieces)) + 1)
    sizes = [(-(-n // group) * prompt + n * whole_row, n * said) for n in batch if n < group or n % group == 0]
    return max((size for size in sizes if most is None or size[0] <= most), default=sizes[0])


def _held(
    model: Any,
    a: Algorithm,
    args: TrainingArguments,
    critic: int,
    references: dict[str, tuple[Reference, Any]],
    notes: list[str],
) -> Iterator[tuple[str, float, list[Any]]]:
    """Yield parts with their bytes, and the choices of which one may `offload` them in phases that do not read them."""
    trained = tensor_bytes(model, trainable=True)
    yield "weights", tensor_bytes(model), []
    for source, reward in reward_models(a, args, notes):
        yield "reward models", tensor_bytes(reward), [source]
    for reference, (base, its) in references.items():
        yield reference, trained if its is model else tensor_bytes(its), [base]
    if any(use.reference.base is not use.reference for use in a.references.values()):
        notes.append("prompts of references with a context of their own count as the rows' own")
    yield "critic", critic, [a.critic]
    if a.update.ema is not None:
        yield "average", average_bytes(model), [a.update]
    if type(a.optimizer).hold is UpdateRule.hold:
        factor = optimizer_bytes(optimizer_name(args), 1, notes)
        yield "optimizer", factor * trained, [a.update]
        yield "optimizer", factor * critic, [a.update, a.critic]
    yield "gradient buckets", (trained + critic) * (args.world_size > 1 and sharding_of(args) is None), []


def _is_here(part: Any, args: TrainingArguments) -> bool:
    return device_of(part, args.device) == args.device


def reward_models(a: Algorithm, args: TrainingArguments, notes: list[str]) -> Iterator[tuple[Any, Any]]:
    """Yield reward sources that run a model on this device, each with its model without weights."""
    for label, source in zip(a.labels(), a.rewards, strict=True):
        if "reward_model" in source.provides and source.workers != "ray" and _is_here(source, args):
            try:
                named = {key: getattr(source, key) for key in ("revision", "dtype") if hasattr(source, key)}
                yield source, without_weights(AutoModel, Model(path=getattr(source, "model", label), **named))
            except UserError as error:
                notes.append(f"without the reward model {label}: {error}")


def conversation(a: Algorithm, length: int) -> tuple[int, int]:
    """Return how many pieces a row has at most, and how many tokens after the prompt.

    With `history: as_rendered` each turn after the first is a fork, which repeats a conversation that has grown evenly. Forks
    that an environment makes by itself are not known before.
    """
    pieces = max((e.max_turns for e in a.environment if e.history == "as_rendered"), default=1)
    return pieces, length * (pieces + 1) // 2


def with_adapter(model: Any, config: Any) -> Any:
    """Return a copy on `meta` with the adapter that would be trained; the model itself if it has one, or none is to be added."""
    if config is None or hasattr(model, "peft_config"):
        return model
    memo = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return add_adapter(copy.deepcopy(model, memo), config, low_cpu_mem_usage=True)


def tensor_bytes(module: Any, *, trainable: bool = False) -> int:
    """Return the bytes of parameters and buffers, tied ones once; with `trainable` of the trained parameters."""
    buffers = () if trainable else module.buffers()
    return sum(x.nbytes for x in (*module.parameters(), *buffers) if x.requires_grad or not trainable)


def gathered_bytes(model: Any) -> float:
    """Return the bytes of a sharded model's weights that are whole at a time: what lies outside the layers, and two of these."""
    kinds = {name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    layers = [tensor_bytes(m) for m in model.modules() if type(m).__name__ in kinds]
    return float(tensor_bytes(model) - sum(layers) + 2 * max(layers, default=0))


def optimizer_bytes(optim: str, trained: int, notes: list[str]) -> float:
    """Return the bytes of an optimizer's state over float32 weights of `trained` bytes; 0 with a note if unknown."""
    factor = next((STATES[name] for name in STATES if optim.removeprefix("paged_").startswith(name)), None)
    if factor is None:
        notes.append(f"without the state of training.optim={optim}")
    return trained * (factor or 0) / (4 if "8bit" in optim else 8 if "4bit" in optim else 1)


def trunk_of(model: Any) -> Any:
    """Return the model below its head, adapters included."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def kept_per_token(model: Any, half: bool) -> float:
    """Return the bytes per token of the inputs and outputs of each product and norm; `half`: products are in 16 bits."""
    trunk, found = trunk_of(model), 0.0
    rows = {id(module.weight) for module in trunk.modules() if isinstance(module, torch.nn.Embedding)}
    experts = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    for name, p in trunk.named_parameters():
        width = 2 if half and p.dim() > 1 else p.element_size()
        if "lora_" in name:
            found += width * min(p.shape) if "lora_A" in name else 0
        elif id(p) not in rows:
            found += width * sum(p.shape[-2:]) * (experts if p.dim() == 3 else 1)
    return found


def cache_per_token(model: Any, half: bool) -> int:
    """Return the bytes of the keys and values that all layers cache of one token."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * sum("attention" in kind for kind in types) * heads * width * (2 if half else model.dtype.itemsize)


def logits_tile(model: Any, tokens: int, device: torch.device) -> int:
    """Return the bytes of the logits that exist at a time."""
    vocabulary = len(model.get_output_embeddings().weight)
    return 4 * vocabulary * min(tokens, tokens_at_a_time(vocabulary, device))


def layer_bytes(model: Any, half: bool, tokens: int) -> float:
    """Return the activations of one layer."""
    return tokens * kept_per_token(model, half) / model.config.get_text_config().num_hidden_layers


def micro_batch_bytes(model: Any, args: TrainingArguments, tokens: int, logits: int, trunks: int = 1) -> Sizes:
    """Return what forwards of `trunks` models keep, with checkpointing the inputs of layers, and the backward takes."""
    config, half = model.config.get_text_config(), bool(args.bf16)
    again = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    inputs = config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    return {
        "activations": trunks * tokens * (inputs if again else kept_per_token(model, half)),
        "weights in 16 bits": 2 * half * sum(p.numel() for p in trunk_of(model).parameters() if p.element_size() == 4),
        "backward": layer_bytes(model, half, tokens) + logits,
    }
