"""The same rows behind another prompt: self-distillation (SDFT, arXiv:2601.19897; SDPO, arXiv:2601.20802).

The reference reads the row's prompt with a context, such as a hint, a worked solution, feedback or a sibling's success, and then
the row's own completion, token by token. A row without a context keeps its prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Context, Reference, chat, choice

from .._functions import load_function

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Rollouts


@dataclass(kw_only=True)
class WithContext(Reference):
    """Log-probs of another reference, or of the policy, behind prompts with a context of their own."""

    name = "with_context"

    of: Reference = choice("frozen")
    """Reference that reads the rows: frozen, ema, policy (the current policy itself), adapter_off, model, ..."""
    context: str | Callable[..., Any]
    """Dataset column of each row's context, or a function, `my.py:function` or the function itself, that returns one text or
    None per row. It gets `rollouts` (`hf_rlhf.batch.Rollouts`, whole groups of this process) and, if it has such a parameter,
    `scores`: label of each reward source, and `total` -> a number or None per row; it is then called after the rewards."""
    template: str = "{prompt}\n\n{context}"
    """Text in place of the prompt, of a chat in place of its last user message."""

    def __post_init__(self) -> None:
        named = isinstance(self.context, str)
        self._function: Callable[..., Any] | None = None
        if not named or ":" in str(self.context):
            self._function = load_function(str(self.context), "context function") if named else self.context  # type: ignore[assignment]
            if "scores" in inspect.signature(self._function).parameters:  # type: ignore[arg-type]
                vars(self)["needs"] = frozenset({"scores"})
        if "{context}" not in self.template or "{prompt}" not in self.template:
            raise ValueError(f"template must contain {{prompt}} and {{context}}, got {self.template!r}")
        self._tokenizer: Any = None
        vars(self).update({name: getattr(self.of, name) for name in ("provides", "scores", "moves", "follows_policy")})

    @property
    def base(self) -> Reference:
        return self.of

    @property
    def known_tokens(self) -> int | None:
        return self.of.known_tokens

    def in_words(self) -> str:
        """Return what reads the rows, and behind what."""
        named = self.context if isinstance(self.context, str) else getattr(self.context, "__name__", "a function")
        return f"{self.of.in_words()} behind prompts with {named}"

    def columns(self) -> set[str]:
        """Return the dataset column that it reads."""
        return set() if self._function is not None else {str(self.context)}

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if isinstance(self.of, WithContext):
            yield "of must be a reference that reads its rows, got with_context. Set of.use=frozen"
        elif "ref_logps" not in self.of.provides:
            yield f"of={self.of.name} provides no log-probs. Set of.use=frozen"

    def setup(self, context: Context) -> None:
        """Take the tokenizer."""
        self._tokenizer = context.tokenizer

    def build(self, policy: PreTrainedModel) -> Module | None:
        return self.of.build(policy)

    def active(self, policy: PreTrainedModel) -> Any:
        return self.of.active(policy)

    def move(self, model: Module, policy: PreTrainedModel, step: int) -> None:
        self.of.move(model, policy, step)

    def prompts(
        self, rollouts: Rollouts, scores: Mapping[str, Sequence[float | None]] | None = None
    ) -> list[list[int]]:
        contexts = self._contexts(rollouts, scores)
        made: dict[tuple[int, str], list[int]] = {}
        found = []
        for i, text in enumerate(contexts):
            if text is None:
                found.append(rollouts.prompt_ids[i])
                continue
            key = (rollouts.group_ids[i] if rollouts.group_ids else i, text)
            if key not in made:
                made[key] = _tokens(self._tokenizer, self._joined(rollouts.prompts[i], text))
            found.append(made[key])
        return found

    def _contexts(self, rollouts: Rollouts, scores: Any) -> list[str | None]:
        if self._function is None:
            given = rollouts.column(str(self.context))
        else:
            given = self._function(rollouts, **({"scores": scores} if "scores" in self.needs else {}))
            if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(rollouts):
                got = f"{len(given)}" if isinstance(given, Sequence) else f"a {type(given).__name__}"
                raise ValueError(
                    f"{self._said()} must return one text or None for each of {len(rollouts)} rows, got {got}"
                )
        for i, text in enumerate(given):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{self._said()} must hold texts or None, got a {type(text).__name__} in row {i}")
        return list(given)

    def _said(self) -> str:
        return f"reference.with_context: context={self.context if isinstance(self.context, str) else self._function!r}"

    def _joined(self, prompt: Any, context: str) -> Any:
        """Return a prompt with its context: text, or messages."""
        if isinstance(prompt, str):
            return self._filled(prompt, context)
        last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
        if last is None:
            raise ValueError(f"{self._said()} is put into the last message of the user, and a prompt has none")
        changed = {**prompt[last], "content": self._filled(prompt[last]["content"], context)}
        return [*prompt[:last], changed, *prompt[last + 1 :]]

    def _filled(self, prompt: str, context: str) -> str:
        before, _, after = self.template.partition("{prompt}")
        return before.replace("{context}", context) + prompt + after.replace("{context}", context)


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    """Return the tokens of a prompt, as the dataset's are made."""
    text = prompt
    if not isinstance(prompt, str):
        end: Any = "open" if prompt[-1]["role"] == "assistant" else "answer"
        text = chat.render(tokenizer, chat.Conversation(prompt, end))[0]
    ids: list[int] = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
    return list(chat.one_bos(tokenizer, ids))


@hookimpl
def reference() -> list[type[Reference]]:
    return [WithContext]
