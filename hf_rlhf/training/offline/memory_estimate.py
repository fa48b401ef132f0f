"""How much memory a run without rollouts holds at most on one process, told before any model is loaded.

Weights and optimizer state are arithmetic; a micro-batch is counted (`fake_tensor_trace`) on the model that the configuration
describes, with every row as long as it may become. What `hf_rlhf.training.memory.estimate` leaves out is left out here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_rlhf.contract.model_settings import Model
from hf_rlhf.contract.offline_trainer import Footprint, OfflineTrainer
from hf_rlhf.data.model_loading import disable_dropout
from hf_rlhf.data.quantization import bytes_of, lighten
from hf_rlhf.runtime.peak_memory import MIB, resident
from hf_rlhf.training.memory.estimate import Estimate, with_adapter
from hf_rlhf.training.memory.fake_tensor_trace import (
    LiveTensors,
    count_step,
    hollow,
    tensor_bytes,
    trunk_of,
    whole_depth,
    without_storage,
)
from hf_rlhf.training.memory.resident import UnmadeError, first_line, named_config, optimizer_bytes, without_weights
from hf_rlhf.training.memory.workload import LIBRARIES

if TYPE_CHECKING:
    from transformers import TrainingArguments

TILE = (4096, 32768)
"""Tokens and width of the room that the head of TRL's trainers has for logits, however small the vocabulary is."""
COPIES = 6
"""On CPU no more of that room is used than the vocabulary fills, and this many copies of it are made in the backward."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Texts of one forward."""

    texts: int
    tokens: int
    """Of each."""
    packed: bool = False
    """All of them in one row."""

    def inputs(self) -> dict[str, Tensor]:
        """What the model is given."""
        if self.packed:
            shape = (1, self.texts * self.tokens)
            return {
                "input_ids": torch.zeros(shape, dtype=torch.long),
                "position_ids": torch.zeros(shape, dtype=torch.long),
            }
        ids = torch.zeros((self.texts, self.tokens), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def estimate_offline(
    settings: Model,
    trainer: OfflineTrainer,
    args: TrainingArguments,
    *,
    tokens: int | None = None,
    process: float | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """The phases `evaluation` and `update` of a recipe without rollouts, or a note that says why there are none.

    `tokens`: of the longest row; as many as may be where it is left out. `process`: bytes of this process on CPU without any
    model; what it holds now, and what training loads, when left out.
    """
    found = Estimate()
    try:
        config = named_config(settings, trust_remote_code)
        room = _room(trainer, config)
        if tokens is None:
            if room is None:
                raise UnmadeError("nothing bounds a row's tokens; set trainer.max_length")
            tokens = room
            found.notes.append(
                f"rows of {room:,} tokens are assumed, as trainer.max_length and the model's context allow"
            )
        plain = _blueprint(settings, trainer, config, trust_remote_code)
    except UnmadeError as error:
        return Estimate(notes=[f"not estimated: {error}"])
    footprint = trainer.footprint(settings.lora is not None)
    long = room if footprint.packed and room is not None else tokens
    spared, layer = bytes_of(plain, settings)
    blueprint = with_adapter(plain, settings, _peft(settings, trainer))
    here = 0.0
    if args.device.type == "cpu":
        here = float(resident() + LIBRARIES) if process is None else process
    with without_storage():
        model = hollow(blueprint).train()
        held = {"process": here, **_held(model, footprint, args, found.notes)}
        try:
            evaluated = Rows(texts=args.per_device_eval_batch_size * footprint.texts, tokens=tokens)
            found.phases["evaluation"] = held | _evaluation(model, trainer, footprint, evaluated, args)
            texts = args.per_device_train_batch_size * footprint.texts
            batch = Rows(texts=texts, tokens=long, packed=footprint.packed)
            found.phases["update"] = held | _update(model, trainer, footprint, batch, args)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            found.notes.append(
                f"forwards cannot be counted for this model ({type(error).__name__}: {first_line(error)})"
            )
            found.phases = {"weights": held}
    for parts in found.phases.values():
        lighten(parts, spared, layer)
        if "reference" in parts:
            parts["reference"] -= spared
    found.phases = {
        phase: {part: size / MIB for part, size in parts.items() if size > 0} for phase, parts in found.phases.items()
    }
    return found


def _room(trainer: OfflineTrainer, config: Any) -> int | None:
    """The most tokens that a row can have, if anything bounds them."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min((x for x in (trainer.max_length, context) if x is not None), default=None)


def _blueprint(settings: Model, trainer: OfflineTrainer, config: Any, trust_remote_code: bool) -> Any:
    """The model with its head, on `meta`."""
    import transformers

    from hf_rlhf.training.offline.model import AUTO

    own = getattr(config, "dtype", None) or torch.float32
    if trainer.head != "causal":
        config.num_labels = trainer.outputs
        config.get_text_config().pad_token_id = 0
    options = {"attn_implementation": "eager"} if settings.attn_implementation == "eager" else {}
    model = without_weights(
        getattr(transformers, AUTO[trainer.head]),
        config,
        dtype=own if settings.dtype == "auto" else getattr(torch, settings.dtype),
        trust_remote_code=trust_remote_code,
        **options,
    )
    return model if settings.dropout else disable_dropout(model)


def _peft(settings: Model, trainer: OfflineTrainer) -> Any:
    """The adapter's configuration for the trainer's head, if there is an adapter."""
    from hf_rlhf.training.offline.model import lora_for

    if settings.lora is None:
        return None
    return lora_for(settings.lora, trainer.head)


def _held(model: Any, footprint: Footprint, args: TrainingArguments, notes: list[str]) -> dict[str, float]:
    """Bytes that are there all the time."""
    trained = tensor_bytes(model, trainable=True)
    held: dict[str, float] = {"weights": tensor_bytes(model)}
    if footprint.reference:
        held["reference"] = tensor_bytes(model)
    held["optimizer"] = optimizer_bytes(str(getattr(args.optim, "value", args.optim)), trained, notes)
    if args.world_size > 1:
        held["gradient buckets"] = trained
    return held


def _evaluation(
    model: Any, trainer: OfflineTrainer, footprint: Footprint, rows: Rows, args: TrainingArguments
) -> dict[str, float]:
    """Bytes of the largest forward without gradient."""

    def count() -> list[int]:
        with torch.no_grad(), _cast(args), LiveTensors() as live:
            _loss(model, trainer, rows, args.device.type == "cpu")
        return [live.peak]

    found: dict[str, float] = {"forward": whole_depth([trunk_of(model)], count)[0]}
    if footprint.logits:
        head = model.get_output_embeddings().weight
        found["logits"] = (rows.texts * head.element_size() + 3 * 4) * rows.tokens * len(head)  # a row's more than once
    return found


def _update(
    model: Any, trainer: OfflineTrainer, footprint: Footprint, rows: Rows, args: TrainingArguments
) -> dict[str, float]:
    """Bytes of a micro-batch of an optimizer step."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    def losses() -> list[Tensor]:
        if footprint.reference:
            with torch.no_grad():
                _loss(model, trainer, rows, args.device.type == "cpu")
        return [_loss(model, trainer, rows, args.device.type == "cpu")]

    autocast = torch.bfloat16 if args.bf16 else None
    several = args.gradient_accumulation_steps > 1
    counted = count_step([model], [trunk_of(model)], losses, autocast, later=several)
    gradients = min(tensor_bytes(model, trainable=True), counted.peak - counted.saved)
    rest = counted.peak - counted.saved - gradients
    return {"gradients": gradients, "activations": counted.saved, "backward": rest}


def _loss(model: Any, trainer: OfflineTrainer, rows: Rows, on_cpu: bool) -> Tensor:
    """Something that needs what the trainer's loss needs."""
    if trainer.head != "causal":
        scores: Tensor = model(**rows.inputs(), use_cache=False).logits
        return scores.float().sum()
    states = trunk_of(model)(**rows.inputs(), use_cache=False).last_hidden_state.flatten(0, 1)
    logps: Tensor = _Tiled.apply(states, model.get_output_embeddings().weight, on_cpu)
    return logps.sum()


def _cast(args: TrainingArguments) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(args.bf16))


class _Tiled(torch.autograd.Function):
    """Log-probs of a token for each state, with a tile of the logits at a time, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, on_cpu: bool) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.on_cpu = on_cpu
        _tile(states, weight, on_cpu)
        return states.new_empty(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor | None, None]:
        states, weight = ctx.saved_tensors
        of_states = torch.empty_like(states, dtype=torch.float32)
        of_weight = torch.empty_like(weight, dtype=torch.float32) if weight.requires_grad else None
        _tile(states, weight, ctx.on_cpu)
        return of_states.to(states.dtype), None if of_weight is None else of_weight.to(weight.dtype), None


def _tile(states: Tensor, weight: Tensor, on_cpu: bool) -> Tensor:
    width = COPIES * min(TILE[1], len(weight)) if on_cpu else TILE[1]
    return states.new_empty(min(TILE[0], len(states)), width)
