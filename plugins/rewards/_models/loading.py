"""Loading reward models: what may be loaded, from which checkpoints, to which device; one copy for all who want the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from hf_rlhf.axes import Keeper, keeper, tensors_of

from .files import ModelFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

RESERVED = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "revision",
    "output_loading_info": None,
    "config": None,
}
"""Arguments of `from_pretrained` that are not `model_kwargs`', and the setting that is meant."""


@dataclass(eq=False)
class Loaded:
    """A frozen model in eval mode with its tokenizer, run by one caller at a time."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    wanted: ModelFiles
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.weights = kept(self.model, self.wanted)

    @contextmanager
    def session(self) -> Iterator[None]:
        """On its device, without gradients or autocast."""
        import torch

        device = torch.device(self.wanted.device)
        known = torch.amp.is_autocast_available(device.type)
        plainly = torch.autocast(device.type, enabled=False) if known else nullcontext()
        with self.lock, torch.no_grad(), plainly, self.weights.on_device():
            yield

    def limit(self, max_length: int | None) -> int | None:
        """The tokens of a row that the model sees at most; None without bound."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        bounds = [max_length, context, self.tokenizer.model_max_length]
        return min((x for x in bounds if isinstance(x, int) and 0 < x < 10**9), default=None)


_HELD: WeakValueDictionary[tuple[str, ...], Loaded] = WeakValueDictionary()
"""The models that some source holds."""
_LOADING = threading.Lock()


def loaded(wanted: ModelFiles, asker: str) -> Loaded:
    """The model on its device, shared with the sources that hold the same one. It is freed when the last one closes."""
    with _LOADING:
        key = wanted.key()
        held = _HELD.get(key)
        if held is None:
            model, tokenizer, labels = model_of(wanted, asker)
            model.config.get_text_config().use_cache = False
            held = _HELD[key] = Loaded(model, tokenizer, labels, wanted)
        return held


def refusals(asker: str, device: str, offload: bool, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with settings of a model, before it is loaded."""
    if device != "auto":
        import torch

        try:
            torch.device(device)
        except RuntimeError:
            yield f"{asker}.device: {device!r} is no device; write auto, cpu, cuda or cuda:1"
    if "trust_remote_code" in kwargs:
        yield (
            f"{asker}.model_kwargs: trust_remote_code would run code that a model brings along, which a recipe cannot "
            "allow; leave it out and convert the model to a class of transformers"
        )
    for name in sorted(set(kwargs) & set(RESERVED)):
        instead = f"set {asker}.{RESERVED[name]}" if RESERVED[name] else "leave it out"
        yield f"{asker}.model_kwargs: {name} is not for it: {instead}"
    if offload and {"quantization_config", "device_map"} & set(kwargs):
        yield f"{asker}.offload moves whole plain weights: leave quantization_config and device_map out, or set offload: false"


def model_of(wanted: ModelFiles, asker: str) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """The model as `wanted` says, its tokenizer and the names of its labels. Raises `ValueError` where it is no such model."""
    import torch

    from .heads import causal, classifier

    device = torch.device(wanted.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{asker}.device: {wanted.device!r}, and this machine has {torch.cuda.device_count()} CUDA devices"
        )
    config = _config(wanted, asker)
    tokenizer = _tokenizer(wanted, asker)
    kwargs = dict(wanted.kwargs)
    home = torch.device("cpu") if wanted.offload else device
    quantized = "quantization_config" in kwargs or getattr(config, "quantization_config", None) is not None
    if quantized and wanted.offload:
        raise ValueError(
            f"{asker}: {wanted.path!r} is quantised, and offload moves whole plain weights: set offload: false"
        )
    if quantized:
        kwargs.setdefault("device_map", {"": str(home)})
    build = causal if wanted.kind == "causal" else classifier
    with torch.random.fork_rng(devices=[]):
        model, labels = build(wanted, config, tokenizer, kwargs, asker)
    model.eval().requires_grad_(False)
    return model if "device_map" in kwargs else model.to(home), tokenizer, labels


def kept(model: Any, wanted: ModelFiles) -> Keeper:
    """What has the weights on their device when they are asked for."""
    import torch

    found = keeper(tensors_of(model), torch.device(wanted.device), wanted.offload, at_home=True)
    found.offload()
    return found


def output_of(held: Loaded, output: int | str | None, defaults: Mapping[int, int], asker: str) -> int:
    """The number of the label that scores. Raises `ValueError` naming the choices."""
    labels = held.labels
    if output is None and len(labels) in defaults:
        return defaults[len(labels)]
    if isinstance(output, int) and 0 <= output < len(labels):
        return output
    if output in labels:
        return labels.index(str(output))
    choices = ", ".join(f"{i} ({label!r})" for i, label in enumerate(labels))
    wrong = "" if output is None else f" and none is {output!r}"
    raise ValueError(
        f"{asker}: {held.wanted.path!r} has {len(labels)} labels{wrong}; choose the one that scores: output: {choices}"
    )


def _config(wanted: ModelFiles, asker: str) -> PretrainedConfig:
    import transformers

    path = Path(wanted.path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{asker}: {wanted.path!r} is an adapter without its base: merge them (merge_and_unload) and save the whole model"
        )
    try:
        return transformers.AutoConfig.from_pretrained(wanted.path, revision=wanted.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{asker}: {wanted.path!r} cannot be loaded: it needs a config.json of an architecture that transformers has; "
            f"code that a model brings along is not run ({error})"
        ) from error


def _tokenizer(wanted: ModelFiles, asker: str) -> PreTrainedTokenizerBase:
    import transformers

    path = wanted.tokenizer or wanted.path
    revision = wanted.revision if wanted.tokenizer is None else None
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{asker}: {path!r} has no tokenizer: save it beside the model or name one with tokenizer ({error})"
        ) from error
    if wanted.kind != "sequence" and not tokenizer.is_fast:
        raise ValueError(
            f"{asker}: the tokenizer of {path!r} does not say which characters a token stands for: save a fast one"
        )
    return tokenizer
