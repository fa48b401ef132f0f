"""Loading of reward models: validation of settings and checkpoints, placement, and one shared copy per model."""

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
"""Arguments of `from_pretrained` not allowed in `model_kwargs`, with the setting to use instead."""


@dataclass(eq=False)
class Loaded:
    """Frozen model in eval mode with its tokenizer, run by one caller at a time."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    wanted: ModelFiles
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.weights = kept(self.model, self.wanted)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold the model on its device, without gradients or autocast."""
        import torch

        device = torch.device(self.wanted.device)
        known = torch.amp.is_autocast_available(device.type)
        plainly = torch.autocast(device.type, enabled=False) if known else nullcontext()
        with self.lock, torch.no_grad(), plainly, self.weights.on_device():
            yield

    def limit(self, max_length: int | None) -> int | None:
        """Return the maximum number of tokens per row; None if unlimited."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        bounds = [max_length, context, self.tokenizer.model_max_length]
        return min((x for x in bounds if isinstance(x, int) and 0 < x < 10**9), default=None)


_HELD: WeakValueDictionary[tuple[str, ...], Loaded] = WeakValueDictionary()
"""Models in use by some source."""
_LOADING = threading.Lock()


def loaded(wanted: ModelFiles, asker: str) -> Loaded:
    """Load a model, or share it with the sources that use the same one. It is freed when the last one closes."""
    with _LOADING:
        key = wanted.key()
        held = _HELD.get(key)
        if held is None:
            model, tokenizer, labels = model_of(wanted, asker)
            model.config.get_text_config().use_cache = False
            held = _HELD[key] = Loaded(model, tokenizer, labels, wanted)
        return held


def refusals(asker: str, device: str, offload: bool, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors in a model's settings, before it is loaded."""
    if device != "auto":
        import torch

        try:
            torch.device(device)
        except RuntimeError:
            yield f"{asker}.device must be auto, cpu, cuda or cuda:N, got {device!r}"
    if "trust_remote_code" in kwargs:
        yield (
            f"{asker}.model_kwargs: trust_remote_code would run code from the model's repository, which recipes do not "
            "allow. Remove it and convert the model to a transformers class"
        )
    for name in sorted(set(kwargs) & set(RESERVED)):
        instead = f"Set {asker}.{RESERVED[name]}" if RESERVED[name] else "Remove it"
        yield f"{asker}.model_kwargs must not contain {name}. {instead}"
    if offload and {"quantization_config", "device_map"} & set(kwargs):
        yield f"{asker}.offload does not support quantization_config or device_map. Remove them, or set offload: false"


def model_of(wanted: ModelFiles, asker: str) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """Load the model `wanted`, its tokenizer and its label names. Raises `ValueError` if it is not such a model."""
    import torch

    from .heads import causal, classifier

    device = torch.device(wanted.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{asker}.device must exist, got {wanted.device!r} on a machine with {torch.cuda.device_count()} CUDA devices"
        )
    config = _config(wanted, asker)
    tokenizer = tokenizer_of(wanted, asker)
    kwargs = dict(wanted.kwargs)
    home = torch.device("cpu") if wanted.offload else device
    quantized = "quantization_config" in kwargs or getattr(config, "quantization_config", None) is not None
    if quantized and wanted.offload:
        raise ValueError(
            f"{asker}: offload does not support quantized models such as {wanted.path!r}. Set offload: false"
        )
    if quantized:
        kwargs.setdefault("device_map", {"": str(home)})
    build = causal if wanted.kind == "causal" else classifier
    with torch.random.fork_rng(devices=[]):
        model, labels = build(wanted, config, tokenizer, kwargs, asker)
    model.eval().requires_grad_(False)
    return model if "device_map" in kwargs else model.to(home), tokenizer, labels


def kept(model: Any, wanted: ModelFiles) -> Keeper:
    """Return the keeper that brings the weights to their device on request."""
    import torch

    found = keeper(tensors_of(model), torch.device(wanted.device), wanted.offload, at_home=True)
    found.offload()
    return found


def output_of(held: Loaded, output: int | str | None, defaults: Mapping[int, int], asker: str) -> int:
    """Return the index of the label that scores. Raises `ValueError` naming the choices."""
    labels = held.labels
    if output is None and len(labels) in defaults:
        return defaults[len(labels)]
    if isinstance(output, int) and 0 <= output < len(labels):
        return output
    if output in labels:
        return labels.index(str(output))
    choices = ", ".join(f"{i} ({label!r})" for i, label in enumerate(labels))
    wrong = "" if output is None else f", none of them {output!r}"
    raise ValueError(
        f"{asker}: {held.wanted.path!r} has {len(labels)} labels{wrong}. Choose the one that scores: output: {choices}"
    )


def _config(wanted: ModelFiles, asker: str) -> PretrainedConfig:
    import transformers

    path = Path(wanted.path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{asker}: {wanted.path!r} is an adapter without its base. Merge them (merge_and_unload) and save the whole model"
        )
    try:
        return transformers.AutoConfig.from_pretrained(wanted.path, revision=wanted.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{asker}: cannot load {wanted.path!r}: it needs a config.json with an architecture of transformers; code in the "
            f"model's repository is not run ({error})"
        ) from error


def tokenizer_of(wanted: ModelFiles, asker: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model `wanted`. Raises `ValueError` if it has none that reports what is needed."""
    import transformers

    path = wanted.tokenizer or wanted.path
    revision = wanted.revision if wanted.tokenizer is None else None
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{asker}: {path!r} has no tokenizer. Save it with the model, or set tokenizer ({error})"
        ) from error
    if wanted.kind != "sequence" and not tokenizer.is_fast:
        raise ValueError(f"{asker}: the tokenizer of {path!r} does not report character offsets. Save a fast tokenizer")
    tokenizer.chat_template_kwargs = wanted.chat_template_kwargs
    return tokenizer
