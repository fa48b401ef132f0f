"""What all reward models share: the settings of one model with a tokenizer of its own, its loading and its sessions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_rlhf import Metric
from hf_rlhf.axes import Context, Count, RewardSource

from .batches import Row, Value, scores_of
from .files import Kind, ModelFiles
from .loading import Loaded, loaded, model_of, output_of, refusals

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class ModelReward(RewardSource):
    """A model that reads prompt and completion as text, through its own tokenizer and chat template.

    Sources whose model is loaded alike (same files, format, device) hold one copy of it together.
    """

    provides = frozenset({"reward_model"})
    metrics = (
        Metric(
            "truncated",
            "share of rows",
            "of which the model saw only the end",
            (None, 0.05),
            "Texts are longer than the model's context: raise `max_length`, or use a model with a longer one.",
            optional=True,
        ),
    )
    kind: ClassVar[Kind] = "sequence"
    default_outputs: ClassVar[dict[int, int]] = {1: 0}
    """Number of labels -> the one that scores where `output` is left out."""

    model: str
    """A folder or a name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    tokenizer: str | None = None
    """Folder or Hub name of its tokenizer; the model's own when left out."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of its weights; autocast does not change it."""
    device: str = "auto"
    """Where it runs: `auto` (the run's own device), `cpu`, `cuda:1`, ..."""
    offload: bool = False
    """Keep its weights away from the device but for its calls: in main memory. The scores are the same
    bits."""
    model_kwargs: dict[str, Any] | None = None
    """Further arguments of transformers' `from_pretrained`: attn_implementation, quantization_config, device_map, ..."""
    output: int | str | None = None
    """Which of several labels scores: its number, or its name in the model's configuration."""
    batch_size: Count = 16
    """Rows per forward pass, at most."""
    max_tokens_per_batch: Count | None = None
    """Tokens per forward pass, padding included; a longer row runs alone. No bound when left out."""
    max_length: Count | None = None
    """Of longer texts the model sees this many tokens: a BOS or [CLS] in front, and the end. At most, and when left out,
    the model's context (max_position_embeddings, the tokenizer's model_max_length). The share of rows so cut is logged."""
    chat: bool = False
    """Put a text prompt into the model's chat template, as one user message."""

    def __post_init__(self) -> None:
        self._loaded: Loaded | None = None
        self._cut: list[float] = []

    def __getstate__(self) -> dict[str, Any]:
        """A pickled copy has no model: `setup` loads it."""
        return {**self.__dict__, "_loaded": None}

    @property
    def asker(self) -> str:
        """Who loads a model, for messages."""
        return f"rewards.{self.name}"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        return self.refusals()

    def refusals(self) -> Iterator[str]:
        """What is wrong with the settings, before any model is loaded."""
        yield from refusals(self.asker, self.device, self.offload, self.model_kwargs or {})

    def setup(self, context: Context) -> None:
        self.load_model(context.device)

    def load_model(self, device: torch.device) -> None:
        """Load the model and its tokenizer for a run on `device`. Raises `ValueError` where it is no such reward model."""
        for refusal in self.refusals():
            raise ValueError(refusal)
        found = loaded(self._wanted(device), self.asker)
        output_of(found, self.output, self.default_outputs, self.asker)
        self._loaded = found

    def fresh_model(self, device: torch.device) -> nn.Module:
        """The model once more, on `device`, for a critic that starts from it and then learns; where it has several labels
        and a linear head, with the one that scores alone."""
        from .heads import narrow

        wanted = self._wanted(device)._replace(device=str(device), offload=False)
        model, tokenizer, labels = model_of(wanted, self.asker)
        found = Loaded(model, tokenizer, labels, wanted)
        return narrow(model, output_of(found, self.output, self.default_outputs, self.asker))

    def close(self) -> None:
        self._loaded = None

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        cut, self._cut = self._cut, []
        return {}, {"truncated": cut} if cut else {}

    def _wanted(self, device: torch.device) -> ModelFiles:
        return ModelFiles(
            path=self.model,
            revision=self.revision,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            device=str(device) if self.device == "auto" else self.device,
            offload=self.offload,
            kwargs=self.model_kwargs or {},
            kind=self.kind,
        )

    @contextmanager
    def _session(self) -> Iterator[Loaded]:
        """The model on its device, for this caller alone."""
        if self._loaded is None:
            raise RuntimeError(f"{self.asker} is not loaded: call setup(context) or load_model(device) first")
        with self._loaded.session():
            yield self._loaded

    def _prompt(self, held: Loaded, prompt: Any) -> list[Any] | str:
        """The prompt as the model reads it: a conversation for its chat template, or text."""
        if isinstance(prompt, str) and not self.chat:
            return prompt
        if not held.tokenizer.chat_template:
            raise ValueError(
                f"{self.asker}: the prompts are conversations and the tokenizer of {self.model!r} has no chat template; save "
                "one with it, or use text prompts"
            )
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)

    def _scores(self, held: Loaded, rows: Sequence[Row], value: Value) -> list[Any]:
        """Per row a float, or per row a list of floats (one for each token); None for a row without a token."""
        self._cut += [float(row.cut) for row in rows]
        index = output_of(held, self.output, self.default_outputs, self.asker)
        return scores_of(held.model, rows, self.batch_size, self.max_tokens_per_batch, index, value)
