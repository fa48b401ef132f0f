"""Models with scoring heads: transformers' classifiers, a value head on a causal model's trunk, and tokens of a causal
model's vocabulary.

Supported value heads are those saved by TRL's `AutoModelForCausalLMWithValueHead` and LLaMA-Factory (`v_head.summary`, in
the checkpoint or in a separate file), OpenRLHF (`score`, `value_head`), UltraRM and Eurus-RM (`regression_head`), and the
two-layer `score` of Qwen2.5-Math's reward models. They take the trunk's last hidden state at each token; a sequence's score
is the one at its last token. Heads are computed in at least float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .files import Stored

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from .files import ModelFiles

LINEAR = ("v_head.summary", "v_head", "score", "value_head.summary", "value_head", "regression_head", "reward_head")
"""Names of linear heads."""
TWO_LAYERS = {"Qwen2ForRewardModel": "score", "Qwen2ForProcessRewardModel": "score"}
"""Architectures with a two-layer ReLU head."""
WRAPPER = "pretrained_model."
"""Prefix of each name in checkpoints of a wrapper's whole state."""


class Headed(nn.Module):
    """Transformers trunk with a head on its last hidden state; `pooled`: at each row's last token only."""

    def __init__(self, trunk: Any, head: nn.Module, pooled: bool):
        super().__init__()
        self.base_model = trunk
        self.score = head
        self.pooled = pooled
        self.config = trunk.config
        own = self.config if getattr(self.config, "normalize_reward", False) else SimpleNamespace()
        self.mean, self.std = float(getattr(own, "mean", 0.0)), float(getattr(own, "std", 1.0))

    @property
    def device(self) -> torch.device:
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base_model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> SimpleNamespace:
        """Return `logits`: (rows, labels) if pooled, else (rows, tokens, labels)."""
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooled:
            states = states[torch.arange(len(states), device=states.device), attention_mask.sum(1) - 1]
        logits = self.score(states.to(next(self.score.parameters()).dtype))
        return SimpleNamespace(logits=(logits - self.mean) / self.std)


def classifier(
    wanted: ModelFiles, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], asker: str
) -> tuple[Any, list[str]]:
    """Load a sequence or token classifier and its labels: transformers' own, or a trunk with a value head."""
    declared = " ".join(config.architectures or [])
    if "ForSequenceClassification" in declared or "ForTokenClassification" in declared:
        return _own(wanted, config, kwargs, asker)
    stored = Stored(wanted.path, wanted.revision)
    two = next(
        (head for name, head in TWO_LAYERS.items() if name in declared and f"{head}.2.weight" in stored.names), None
    )
    prefixes = [head for head in LINEAR if f"{head}.weight" in stored.names]
    if two is None and not prefixes:
        return _own(wanted, config, kwargs, asker)
    prefix = two or prefixes[0]
    trunk = _trunk(wanted, stored, prefix, kwargs, asker)
    layers = [_linear(stored, f"{prefix}{place}") for place in ((".0", ".2") if two else ("",))]
    head = layers[0] if len(layers) == 1 else nn.Sequential(layers[0], nn.ReLU(), layers[1])
    head = head.to(torch.float64 if wanted.dtype == "float64" else torch.float32)
    return Headed(trunk, head, wanted.kind == "sequence"), _names(layers[-1].out_features, config)


def causal(
    wanted: ModelFiles, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], asker: str
) -> tuple[Any, list[str]]:
    """Load a causal language model whose labels are the logits of a few tokens; the others are not computed."""
    import transformers

    ids = [_token(tokenizer, word, asker) for word in wanted.words]
    model, loading = _load(transformers.AutoModelForCausalLM, wanted, kwargs, asker)
    head = model.get_output_embeddings()
    if loading["missing_keys"] or type(head) is not nn.Linear:
        missing = ", ".join(sorted(loading["missing_keys"])) or "a linear layer to its vocabulary"
        raise ValueError(f"{asker}: {wanted.path!r} has no {missing}, but good_token needs a causal language model")
    model.set_output_embeddings(_rows(head, ids))
    return model, [str(word) for word in wanted.words]


def narrow(model: Any, index: int) -> Any:
    """Keep only row `index` of the last layer of the model's head, if that is linear with several rows."""
    name = "score" if hasattr(model, "score") else "classifier"
    head = getattr(model, name, None)
    layers: list[Any] = list(head) if isinstance(head, nn.Sequential) else [head]
    if type(layers[-1]) is nn.Linear and layers[-1].out_features > 1:
        layers[-1] = _rows(layers[-1], [index])
        setattr(model, name, nn.Sequential(*layers) if isinstance(head, nn.Sequential) else layers[-1])
    return model


def _own(wanted: ModelFiles, config: PretrainedConfig, kwargs: dict[str, Any], asker: str) -> tuple[Any, list[str]]:
    import transformers

    sequence = wanted.kind == "sequence"
    auto = transformers.AutoModelForSequenceClassification if sequence else transformers.AutoModelForTokenClassification
    model, loading = _load(auto, wanted, kwargs, asker)
    heads = {shape[0] for _, shape, _ in loading["mismatched_keys"]}
    if len(heads) == 1 and "num_labels" not in kwargs:  # OpenRLHF keeps the base model's count in the configuration
        return _own(wanted, config, {**kwargs, "num_labels": heads.pop()}, asker)
    wrong = sorted({*loading["missing_keys"], *(names[0] for names in loading["mismatched_keys"])})
    if wrong:
        others = sorted(loading["unexpected_keys"])
        held = f", but holds {', '.join(others[:6])}" if others else ""
        raise ValueError(
            f"{asker}: {wanted.path!r} has no trained weights for {', '.join(wrong)}: it was not saved as a {wanted.kind} "
            f"classifier{held}. Supported heads: {', '.join(LINEAR)}"
        )
    return model, _names(model.config.num_labels, model.config)


def _trunk(wanted: ModelFiles, stored: Stored, prefix: str, kwargs: dict[str, Any], asker: str) -> Any:
    """Load the trunk. Raises `ValueError` if the checkpoint lacks parts of it, or has weights besides it and known heads."""
    import transformers

    if any(name.startswith(WRAPPER) for name in stored.plain):
        kwargs = {"key_mapping": {f"^{WRAPPER[:-1]}\\.": ""}, **kwargs}
    trunk, loading = _load(transformers.AutoModel, wanted, kwargs, asker)
    if loading["missing_keys"]:
        raise ValueError(
            f"{asker}: {wanted.path!r} has a head {prefix!r} but lacks parts of the trunk: "
            f"{', '.join(sorted(loading['missing_keys'])[:6])}. Save the whole model"
        )
    known = (f"{prefix}.", "lm_head.", "embed_out.")
    strange = sorted(name for name in loading["unexpected_keys"] if not name.startswith(known))
    if strange:
        raise ValueError(
            f"{asker}: {wanted.path!r} has unsupported weights besides its head {prefix!r}: "
            f"{', '.join(strange[:6])}. Convert it to a transformers classifier"
        )
    return trunk


def _load(auto: Any, wanted: ModelFiles, kwargs: dict[str, Any], asker: str) -> tuple[Any, dict[str, Any]]:
    try:
        model, loading = auto.from_pretrained(
            wanted.path,
            revision=wanted.revision,
            dtype=wanted.dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ValueError(f"{asker}: {auto.__name__} cannot load {wanted.path!r}: {error}") from error
    return model, loading


def _linear(stored: Stored, name: str) -> nn.Linear:
    """Load a linear layer of the checkpoint."""
    weight = stored.tensor(f"{name}.weight")
    bias = stored.tensor(f"{name}.bias") if f"{name}.bias" in stored.names else None
    return _filled(weight, bias)


def _rows(layer: nn.Linear, rows: Iterable[int]) -> nn.Linear:
    """Select rows of a linear layer."""
    chosen = list(rows)
    return _filled(layer.weight[chosen], None if layer.bias is None else layer.bias[chosen])


def _filled(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _token(tokenizer: PreTrainedTokenizerBase, word: str | int, asker: str) -> int:
    if isinstance(word, int):
        return word
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"{asker}: {word!r} must be one token of its tokenizer, got {len(ids)} ({ids}). Name one token, or its id"
        )
    return int(ids[0])


def _names(count: int, config: PretrainedConfig) -> list[str]:
    """Return the labels' names if the configuration has as many, else LABEL_0, LABEL_1, ..."""
    named = {int(i): str(label) for i, label in (config.id2label or {}).items()}
    return (
        [named[i] for i in range(count)]
        if sorted(named) == list(range(count))
        else [f"LABEL_{i}" for i in range(count)]
    )
