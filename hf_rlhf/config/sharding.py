"""`training.fsdp`: weights, gradients and optimizer state sharded over the processes (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.contract.model_settings import Model

LAUNCHER = "ACCELERATE_USE_FSDP"
"""Variable with which `accelerate launch` asks for FSDP."""
FROM_LAUNCHER = {
    "FSDP_VERSION": "version",
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_OFFLOAD_PARAMS": "cpu_offload",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
}
"""Variable of the launcher -> key of `fsdp_config`."""
WORDS = {
    "version": ("2", "only FSDP2 is used"),
    "cpu_offload": ("false", "sharded weights stay on their device"),
    "state_dict_type": ("full_state_dict", "checkpoints hold whole tensors, which any number of processes resumes"),
    "cpu_ram_efficient_loading": ("false", "each process loads the model before it keeps its shards"),
    "auto_wrap_policy": ("transformer_based_wrap", "each decoder layer is a unit"),
    "min_num_params": ("0", "each decoder layer is a unit"),
    "xla": ("false", "it is for TPUs"),
    "xla_fsdp_v2": ("false", "it is for TPUs"),
    "xla_fsdp_grad_ckpt": ("false", "it is for TPUs"),
}
"""Key of `fsdp_config` -> (the value that it may have, why no other)."""
HONOURED = ("reshard_after_forward", "activation_checkpointing")
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimizers that compute each element of a weight by itself, so that a shard is enough."""

SHARDED = "training.fsdp keeps a part of each weight on a process"


@dataclass(frozen=True)
class Sharding:
    """Settings of sharded policies, critics and references."""

    reshard_after_forward: bool = True
    """Free a layer's weights after its forward and gather them again for its backward."""


def sharding_of(args: Any) -> Sharding | None:
    """Return how a run is sharded; None where each process holds the whole model."""
    found: Sharding | None = getattr(args, "_sharding", None)
    return found


def take_sharding(args: Any) -> list[str]:
    """Read `fsdp` and `fsdp_config`, or what the launcher asks for in their place, and keep Trainer from acting on them.

    Returns reasons for refusal.
    """
    if os.environ.pop(LAUNCHER, "false").lower() in ("true", "1") and not args.fsdp:
        args.fsdp = True
        args.fsdp_config = {key: os.environ[name] for name, key in FROM_LAUNCHER.items() if name in os.environ}
    args._sharding = None
    if not args.fsdp or args.fsdp == "no":
        return []
    args.fsdp_plugin_args = None  # Trainer would wrap, save and clip in ways of its own, and on CUDA alone
    config = {key: str(value).lower() for key, value in (args.fsdp_config or {}).items() if value not in (None, [], "")}
    found = [
        f"training.fsdp_config.{key} must be {WORDS[key][0]}, got {value}: {WORDS[key][1]}"
        for key, value in config.items()
        if key in WORDS and value != WORDS[key][0]
    ]
    if unknown := sorted(config.keys() - WORDS.keys() - set(HONOURED)):
        found.append(
            f"training.fsdp_config may have {', '.join(HONOURED)}, got {', '.join(unknown)}. Leave the others out"
        )
    if config.get("activation_checkpointing", "false") == "true":
        args.gradient_checkpointing = True
    args._sharding = Sharding(reshard_after_forward=config.get("reshard_after_forward", "true") != "false")
    return found


def process_problems(args: Any) -> Iterator[str]:
    """Yield why a run cannot be sharded over its processes, which a check of a recipe does not know."""
    if sharding_of(args) is not None and args.world_size == 1:
        yield (
            "training.fsdp shards a model over processes, and this run has one. Start several with `hf-rlhf train RECIPE "
            "--nproc 2`, or leave it out"
        )


def sharding_problems(algorithm: Algorithm, args: Any, model: Model) -> Iterator[str]:
    """Yield what of a recipe with rollouts does not work on shards, with the fix."""
    if sharding_of(args) is None:
        return
    if algorithm.optimizer.name != "trainer":
        yield f"{SHARDED}, and optimizer={algorithm.optimizer.name} reads whole gradients. Leave one of them out"
    yield from model_sharding_problems(args, model, own_optimizer=algorithm.optimizer.name != "trainer")
    for path, plugin in [("update", algorithm.update), *algorithm.plugins()]:
        for setting in ("offload", "device"):
            if getattr(plugin, setting, None):
                yield f"{SHARDED}, which {path}.{setting} would move. Leave one of them out"
    if "double_backward" in algorithm.needs:
        yield f"{SHARDED}, and a plugin takes second derivatives, which FSDP2 has not. Leave one of them out"
    if model.save_merged:
        yield f"{SHARDED}, and model.save_merged merges whole ones. Merge after training, with PEFT's merge_and_unload"


def model_sharding_problems(args: Any, model: Model, own_optimizer: bool = False) -> Iterator[str]:
    """Yield what of optimizer and weights does not work on shards, with the fix. `own_optimizer`: a plugin makes it."""
    if sharding_of(args) is None:
        return
    if not own_optimizer and (name := getattr(args.optim, "value", args.optim)) not in ELEMENTWISE:
        yield f"{SHARDED}, and training.optim={name} reads whole weights. Choose one of {', '.join(ELEMENTWISE)}"
    if model.load_in_4bit or model.load_in_8bit:
        yield f"{SHARDED}, which weights of 4 or 8 bits cannot be. Drop model.load_in_4bit and load_in_8bit, or training.fsdp"
