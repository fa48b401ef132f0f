"""Base of all reward models: settings of a model with its own tokenizer, loading and sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_rlhf import Metric
from hf_rlhf.axes import Context, Count, HubModel, HubTokenizer, RewardSource, chat

from .batches import Row, Value, scores_of
from .files import Kind, ModelFiles
from .loading import Loaded, loaded, model_of, output_of, refusals, tokenizer_of
from .text import MARK, answered

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class ModelReward(RewardSource):
    """Base class: a model that reads prompt and completion as text, through its own tokenizer and chat template.

    Sources that load the same model (same files, dtype, device) share one copy of it.
    """

    provides = frozenset({"reward_model"})
    metrics = (
        Metric(
            "truncated",
            "share of rows",
            "truncated to their end for the model",
            (None, 0.05),
            "Texts are longer than the model's context: raise `max_length`, or use a model with a longer one.",
            optional=True,
        ),
    )
    kind: ClassVar[Kind] = "sequence"
    default_outputs: ClassVar[dict[int, int]] = {1: 0}
    """Label that scores if `output` is None, by number of labels."""

    model: HubModel
    """Folder or name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    tokenizer: HubTokenizer | None = None
    """Folder or Hub name of its tokenizer; None: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    """Dtype of its weights; not affected by autocast."""
    device: str = "auto"
    """Device on which it runs: `auto` (the run's device), `cpu`, `cuda:1`, ..."""
    offload: bool = False
    """Keep its weights in main memory except during calls. The scores are bit-identical."""
    model_kwargs: dict[str, Any] | None = None
    """Further arguments of transformers' `from_pretrained`: attn_implementation, quantization_config, device_map, ..."""
    output: int | str | None = None
    """Label that scores, if there are several: its index, or its name in the model's configuration."""
    batch_size: Count = 16
    """Maximum rows per forward pass."""
    max_tokens_per_batch: Count | None = None
    """Maximum tokens per forward pass, padding included; a longer row runs alone. None: no limit."""
    max_length: Count | None = None
    """Longer texts are truncated to this many tokens: a leading BOS or [CLS], and the end. At most, and by default, the
    model's context (max_position_embeddings, the tokenizer's model_max_length). The share of truncated rows is logged."""
    chat: bool = False
    """Apply the model's chat template to text prompts, as one user message."""

    def __post_init__(self) -> None:
        self._loaded: Loaded | None = None
        self._cut: list[float] = []
        self._chat_template_kwargs: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the model from pickled copies: `setup` loads it."""
        return {**self.__dict__, "_loaded": None}

    @property
    def asker(self) -> str:
        """Name of this source in messages."""
        return f"rewards.{self.name}"

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        return self.refusals()

    def refusals(self) -> Iterator[str]:
        """Yield errors in the settings, before any model is loaded."""
        yield from refusals(self.asker, self.device, self.offload, self.model_kwargs or {})

    def setup(self, context: Context) -> None:
        self._chat_template_kwargs = context.chat_template_kwargs
        self.load_model(context.device)

    def load_model(self, device: torch.device) -> None:
        """Load the model and its tokenizer for a run on `device`. Raises `ValueError` if it is not such a reward model."""
        for refusal in self.refusals():
            raise ValueError(refusal)
        found = loaded(self._wanted(device), self.asker)
        output_of(found, self.output, self.default_outputs, self.asker)
        self._loaded = found

    def fresh_model(self, device: torch.device) -> nn.Module:
        """Load a separate copy on `device` to initialize a critic; a linear head keeps only the label that scores."""
        from .heads import narrow

        wanted = self._wanted(device)._replace(device=str(device), offload=False)
        model, tokenizer, labels = model_of(wanted, self.asker)
        found = Loaded(model, tokenizer, labels, wanted)
        return narrow(model, output_of(found, self.output, self.default_outputs, self.asker))

    def close(self) -> None:
        self._loaded = None

    def prompt_check(self, chat_template_kwargs: dict[str, Any]) -> Callable[[Any], object]:
        import torch

        self._chat_template_kwargs = chat_template_kwargs
        tokenizer = tokenizer_of(self._wanted(torch.device("cpu")), self.asker)

        def check(prompt: Any) -> None:
            if not isinstance(read := self._prompt(tokenizer, prompt), str):
                try:
                    chat.render(tokenizer, answered(read, MARK), training=True)
                except chat.ChatError as error:
                    raise ValueError(f"{self.asker}, {self.model!r}: {error}") from error

        return check

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
            chat_template_kwargs=self._chat_template_kwargs,
        )

    @contextmanager
    def _session(self) -> Iterator[Loaded]:
        """Yield the model on its device, for exclusive use."""
        if self._loaded is None:
            raise RuntimeError(f"{self.asker} is not loaded. Call setup(context) or load_model(device) first")
        with self._loaded.session():
            yield self._loaded

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[Any] | str:
        """Return the prompt as the model reads it: a conversation for its chat template, or text."""
        if isinstance(prompt, str) and not self.chat:
            return prompt
        if not tokenizer.chat_template:
            raise ValueError(
                f"{self.asker}: the prompts are conversations but the tokenizer of {self.model!r} has no chat template. Save "
                "one with it, or use text prompts"
            )
        return (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else chat.messages_of(prompt, "the prompt")
        )

    def _scores(self, held: Loaded, rows: Sequence[Row], value: Value) -> list[Any]:
        """Return a float per row, or a list of floats (one per token); None for a row without tokens."""
        self._cut += [float(row.cut) for row in rows]
        index = output_of(held, self.output, self.default_outputs, self.asker)
        return scores_of(held.model, rows, self.batch_size, self.max_tokens_per_batch, index, value)
