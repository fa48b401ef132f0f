"""What lies on a process's device beside what a phase computes: weights and optimizer state, by the parts of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_rlhf.axes import UpdateRule
from hf_rlhf.data.addition_task import BUILTIN, addition_config
from hf_rlhf.modeling.ema import average_bytes
from hf_rlhf.training.memory.fake_tensor_trace import tensor_bytes

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.training.memory.workload import Workload

STATES: dict[str, float] = {
    "adamw": 2,
    "adamw_torch_8bit": 0.5,
    "adamw_torch_4bit": 0.25,
    "adamw_8bit": 0.5,
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "paged_adamw_32bit": 2,
    "lion_32bit": 1,
    "lion_8bit": 0.25,
    "adagrad": 1,
    "rmsprop": 1,
    "rmsprop_bnb": 1,
    "sgd": 0,
    "adafactor": 0,
}
"""Optimizer of TrainingArguments -> bytes of its state per byte of float32 weights; `adamw` is every other AdamW."""
CODED = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Optimizers of TrainingArguments whose state is torchao's codes, which are more than plain tensors."""


@dataclass(kw_only=True)
class ResidentMemory:
    """Part -> bytes: of what is on the device all the time, and of what `offload` has there when it is asked for."""

    here: dict[str, float]
    away: dict[str, float]

    def on_device(self, *asked: str) -> dict[str, float]:
        """What is on the device when the parts `asked` are."""
        found = dict(self.here)
        for part in asked:
            found[part] = found.get(part, 0.0) + self.away.get(part, 0.0)
        return found


def resident_memory(setting: Workload, model: nn.Module, critic: Any, notes: list[str]) -> ResidentMemory:
    """Of a run with this policy and separate critic, as they will be trained. `notes` get what is missing."""
    a = setting.algorithm
    of_models, offloaded = _reward_models(setting, notes)
    found = ResidentMemory(
        here={"weights": tensor_bytes(model), "reward models": of_models}, away={"reward models": offloaded}
    )
    if "ref_logps" in a.provides and "adapter" not in a.reference.needs:
        shared = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        _put(found, "reference", tensor_bytes(model) - shared, a.reference)
    trained, of_critic = tensor_bytes(model, trainable=True), 0
    if critic is not None:
        _put(found, "critic", tensor_bytes(critic, trainable="adapter" in a.critic.needs), a.critic)
        of_critic = tensor_bytes(critic, trainable=True)
    if a.update.ema is not None:
        _put(found, "average", average_bytes(model), a.update)
    if type(a.optimizer).hold is not UpdateRule.hold:
        notes.append(f"without the vectors of optimizer={a.optimizer.name}")
    else:
        factor = optimizer_bytes(_optim(setting.args), 1, notes)
        _put(found, "optimizer", factor * trained, a.update)
        _put(found, "optimizer", factor * of_critic, a.update, a.critic)
    if setting.processes > 1:
        found.here["gradient buckets"] = trained + of_critic
    return found


def _put(found: ResidentMemory, part: str, size: float, *choices: Any) -> None:
    """Adds to a part, away where one of `choices` has its `offload` set."""
    kept = found.away if any(getattr(choice, "offload", False) for choice in choices) else found.here
    kept[part] = kept.get(part, 0.0) + size


def offload_problems(a: Algorithm, args: TrainingArguments) -> Iterator[str]:
    """Why the optimizer's state cannot be offloaded, with what to write instead."""
    optim, asked = _optim(args), [axis for axis in ("update", "critic") if getattr(getattr(a, axis), "offload", False)]
    if asked and optim in CODED and type(a.optimizer).hold is UpdateRule.hold:
        drop = " and ".join(f"{axis}.offload=false" for axis in asked)
        yield (
            f"offload moves plain tensors, and the state of training.optim={optim} is torchao's codes: set {drop}, or "
            "training.optim=adamw_torch"
        )


def offload_remarks(a: Algorithm, args: TrainingArguments) -> Iterator[str]:
    """Yield a remark for an `offload` that has no effect."""
    asked = [path for path, part in [("update", a.update), *a.plugins()] if getattr(part, "offload", False)]
    if asked and args.device.type == "cpu":
        yield f"{', '.join(f'{path}.offload' for path in asked)}: no effect on a CPU, where everything is in main memory"
    if a.update.offload and a.update.ema is None and _stateless(args) and type(a.optimizer).hold is UpdateRule.hold:
        yield (
            f"update.offload has no effect: training.optim={_optim(args)} without momentum keeps no state, and there is no "
            "update.ema"
        )


def policy_state(a: Algorithm, args: TrainingArguments) -> bool:
    """Whether an optimizer step leaves state of the policy's parameters behind, where that is known."""
    return type(a.optimizer).hold is UpdateRule.hold and not _stateless(args)


def _stateless(args: TrainingArguments) -> bool:
    pairs = (pair.partition("=") for pair in str(args.optim_args or "").replace(" ", "").split(","))
    momentum = next((value for name, _, value in pairs if name == "momentum"), "0")
    return _optim(args) == "sgd" and float(momentum) == 0


def _optim(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _reward_models(setting: Workload, notes: list[str]) -> tuple[float, float]:
    """Bytes of the reward models' weights: of those that are there all the time, and of the largest that is there only to
    score. One that is loaded alike twice counts once, one on another device does not, which a note says."""
    a = setting.algorithm
    sizes: dict[tuple[Any, ...], tuple[bool, float]] = {}
    for label, source in zip(a.labels(), a.rewards, strict=True):
        if "reward_model" not in source.provides:
            continue
        device = getattr(source, "device", "auto")
        elsewhere = device if device not in ("auto", setting.device) else None
        offload = bool(getattr(source, "offload", False))
        key = (
            getattr(source, "model", label),
            getattr(source, "revision", None),
            getattr(source, "dtype", "float32"),
            offload,
        )
        if elsewhere:
            notes.append(f"without the reward model {label}: it lies elsewhere ({elsewhere})")
        elif key not in sizes:
            sizes[key] = offload, _reward_model(label, source, notes)
    if sizes:
        notes.append("the phase reward is without what the forwards of reward models take")
    stay, visit = ([size for offload, size in sizes.values() if offload == kind] for kind in (False, True))
    return sum(stay), max(visit, default=0.0)


def _reward_model(label: str, source: Any, notes: list[str]) -> float:
    """Bytes of a reward model's weights; 0 with a note where its configuration is not on this machine."""
    from transformers import AutoModel

    path, dtype = getattr(source, "model", None), getattr(source, "dtype", "float32")
    try:
        config = local_config(str(path), getattr(source, "revision", None))
    except (OSError, ValueError) as error:
        notes.append(f"without the reward model {label}: {first_line(error)}")
        return 0.0
    own = getattr(config, "dtype", None) or torch.float32
    return tensor_bytes(AutoModel.from_config(config, dtype=own if dtype == "auto" else getattr(torch, dtype)))


def optimizer_bytes(optim: str, trained: int, notes: list[str]) -> float:
    """Bytes of the state of an optimizer of TrainingArguments over float32 weights of `trained` bytes."""
    factor = STATES.get(optim, STATES["adamw"] if optim.startswith(("adamw", "paged_adamw")) else None)
    if factor is None:
        notes.append(f"without the state of training.optim={optim}")
        return 0.0
    return factor * trained


def local_config(path: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    """A model's configuration from this machine: a folder, or the cache of the Hub. An adapter's is that of its base.
    Raises OSError or ValueError where it is not there."""
    from transformers import AutoConfig

    if path == BUILTIN:
        return addition_config()
    folder = Path(path).expanduser()
    if (adapter := folder / "adapter_config.json").is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        return local_config(base, None, trust_remote_code)
    place = str(folder) if folder.exists() else path
    return AutoConfig.from_pretrained(
        place, revision=revision, local_files_only=True, trust_remote_code=trust_remote_code
    )


class UnmadeError(ValueError):
    """A model that cannot be made without weights; the message says why."""


def named_config(settings: Model, trust_remote_code: bool) -> Any:
    """The configuration of the model that a recipe names. Raises `UnmadeError` where it is not on this machine."""
    if settings.path is None:
        raise UnmadeError("no model is named")
    try:
        return local_config(settings.path, settings.revision, trust_remote_code)
    except OSError as error:
        raise UnmadeError(f"the configuration of {settings.path} is not on this machine") from error
    except (ValueError, ImportError) as error:
        raise UnmadeError(first_line(error)) from error


def without_weights(auto: Any, config: Any, **options: Any) -> Any:
    """The model of a configuration on `meta`, by a class of transformers. Raises `UnmadeError` where code that comes with the
    model does not allow that."""
    try:
        with torch.device("meta"):
            return auto.from_config(config, **options)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, ImportError) as error:
        raise UnmadeError(
            f"the model cannot be made without weights ({type(error).__name__}: {first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says first."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
