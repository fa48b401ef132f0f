"""Trials of a model, once each: decoding given tokens must give the logits of a plain forward.

The decode loop is tried on four rows of six tokens. `model.generate` is tried on prompts of different lengths, which are
padded on the left, and on prompts of equal length if that changes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_rlhf.axes import Policy, at_least_float32

from ._decoding import CHECK, Decoder
from ._generating import Generator, inner_of, last_logits
from ._kernels import prepare

STEPS = CHECK + 2
"""Tokens of each row."""
UNEQUAL, EQUAL = (9, 4, 1), (7, 7)
"""Lengths of the prompts on which `model.generate` is tried."""
EXACT, COARSE = (1e-3, 0.02), (0.05, 0.2)
"""Relative differences of logits, in float32 and in half precision, up to which a path is exact, and above which it is another
model. In between lies rounding: chunked state-space layers reach 0.002 in float32 and 0.03 in bfloat16."""
SAME_MODEL = 0.1
"""Share of a bound for kernels, which differ from the model's own by the order of sums alone."""
AMPLIFIED = 3.0
"""Padding that multiplies the difference by more than this does not only round."""


class Trial(NamedTuple):
    """Difference of the logits of `model.generate` from those of a plain forward."""

    relative: float
    """Relative to the spread of the logits, of the worst row; infinite if it raised an error."""
    what: str
    """Description: log-probs in nats, or the error."""


class Generation(NamedTuple):
    """Result of the trials of `model.generate`."""

    equal_lengths: bool
    """True if prompts must have equal lengths, since it samples from another model where they are padded."""
    what: str
    """Description of the change by padding."""


def try_loop(model: Any, device: torch.device, kernel: str = "model") -> str | None:
    """Describe a mismatch of the decode loop's logits with a kernel (see `_kernels`), or return None."""
    words = len(model.get_input_embeddings().weight)
    prompts = [[(5 + 3 * i) % words for i in range(7)], [(8 + 5 * i) % words for i in range(4)]]
    told = _told(4, words, device)
    end = int(told[1, CHECK - 1])
    found: dict[tuple[int, int], Tensor] = {}

    def sampler(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, None]:
        for i, row in enumerate(rows.tolist()):
            found[row, step] = logits[i].clone()
        return told[rows, step], None

    try:
        with _evaluating(model):
            own = prepare(kernel, model)
            Decoder(model=model, eos=[end], steps=STEPS, device=device, kernel=own)(prompts, 2, sampler)
            errors = []
            for row in range(4):
                steps = sorted(step for at, step in found if at == row)
                due = _plain(model, prompts[row // 2], told[row])[steps]
                errors.append(_error(torch.stack([found[row, step] for step in steps]), due))
    except Exception as error:
        return _said(error)
    bound, half = _bound(model, device)
    bound *= 1 if kernel == "model" else SAME_MODEL
    off = float(torch.cat(errors).median() if half else torch.cat(errors).max())
    return None if off <= bound else f"its logits differ from those of a plain forward by {off:.2g} of their spread"


_TRIED: WeakKeyDictionary[Any, dict[str, Generation]] = WeakKeyDictionary()


def try_generate(policy: Policy, settings: Mapping[str, Any]) -> Generation:
    """Return how `model.generate` samples from the policy, with these fields of its configuration.

    Raises `ValueError` if it samples from another model even without padding.
    """
    known, key = _TRIED.setdefault(inner_of(policy.model), {}), repr(sorted(settings.items()))
    if key not in known:
        half = _bound(policy.model, policy.device)[1]
        padded = _trial(policy, UNEQUAL, settings)
        if padded.relative <= EXACT[half]:
            known[key] = Generation(False, padded.what)
        else:
            equal = _trial(policy, EQUAL, settings)
            if equal.relative > COARSE[half]:
                raise ValueError(_refusal(policy, settings, equal, COARSE[half]))
            known[key] = Generation(padded.relative > max(EXACT[half], AMPLIFIED * equal.relative), padded.what)
    return known[key]


def _refusal(policy: Policy, settings: Mapping[str, Any], equal: Trial, bound: float) -> str:
    """Return why the policy cannot be sampled, and the fix."""
    fix = f"{'Remove rollout.generation_kwargs, or choose' if settings else 'Choose'} another model"
    if settings.get("use_cache", True) and _trial(policy, EQUAL, {**settings, "use_cache": False}).relative <= bound:
        fix = (
            "Its cache is at fault: set rollout.generation_kwargs={use_cache: false}, which reads each whole row for each token, "
            "or choose another model"
        )
    return f"model.generate does not sample from {type(policy.model).__name__}: {equal.what}. {fix}"


def _trial(policy: Policy, lengths: Sequence[int], settings: Mapping[str, Any]) -> Trial:
    model = policy.model
    words = len(model.get_input_embeddings().weight)
    prompts = [[(5 + 3 * row + 7 * i) % words for i in range(length)] for row, length in enumerate(lengths)]
    told = _told(len(lengths), words, policy.device)
    forced = _Forced(told, max(lengths))
    generate = Generator(policy=policy, eos=(), settings={**settings, "max_new_tokens": STEPS}, processors=[forced])
    try:
        with _evaluating(model), last_logits(model) as raw:
            forced.raw = raw
            generate(prompts, 1, 0.0)
        with _evaluating(model):
            due = torch.stack([_plain(model, ids, row) for ids, row in zip(prompts, told, strict=True)])
    except Exception as error:
        return Trial(torch.inf, _said(error))
    found = torch.stack(forced.seen, 1)
    off = _error(found, due)
    worst = (off.median(-1).values if _bound(model, policy.device)[1] else off).max()
    chosen = told[:, :, None]
    nats = (found.log_softmax(-1).gather(2, chosen) - due.log_softmax(-1).gather(2, chosen)).abs().max()
    return Trial(float(worst), f"its log-probs differ from those of a plain forward by up to {float(nats):.2g} nats")


class _Forced(LogitsProcessor):
    """Processor that lets through nothing but the tokens `told` (rows, steps), and keeps the model's own logits."""

    def __init__(self, told: Tensor, width: int):
        self.told, self.width = told, width
        self.seen: list[Tensor] = []
        self.raw: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(at_least_float32(self.raw[-1]))
        chosen = self.told[:, input_ids.size(1) - self.width, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _told(rows: int, words: int, device: torch.device) -> Tensor:
    """Return the tokens (rows, STEPS) to decode."""
    return torch.tensor([[(11 + 7 * i + 5 * row) % words for i in range(STEPS)] for row in range(rows)], device=device)


def _said(error: Exception) -> str:
    return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Run a model in evaluation mode without gradients, then restore its modes."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _bound(model: Any, device: torch.device) -> tuple[float, bool]:
    """Return the tolerance for rounding errors in logits, and True for half precision, where outliers may exceed it."""
    narrow = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if narrow or torch.is_autocast_enabled(device.type):
        return 0.1, True
    return 1e-3 if torch.get_float32_matmul_precision() == "highest" else 1e-2, False


def _plain(model: Any, prompt: Sequence[int], told: Tensor) -> Tensor:
    """Return the logits (STEPS, V) of a plain forward, each before a token of `told` (STEPS,)."""
    ids = torch.cat((torch.tensor(prompt, device=told.device), told)).unsqueeze(0)
    logits = at_least_float32(model(input_ids=ids, use_cache=False).logits[0])
    return logits[len(prompt) - 1 : -1]


def _error(found: Tensor, due: Tensor) -> Tensor:
    """Return the difference (..., steps) of logits (..., steps, V), relative to the spread of `due`."""
    return (found - due).norm(dim=-1) / (due - due.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-30)
