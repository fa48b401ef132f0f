"""Checks of rollout engines."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_rlhf.axes import RolloutEngine, Weights
from hf_rlhf.batch import Completions, Prompt
from hf_rlhf.conformance.common import Checks, Make
from hf_rlhf.modeling.policy import ActorCritic, Policy
from hf_rlhf.modeling.token_batch import TokenBatch
from hf_rlhf.runtime.seeding import seeded


def rollout_engine_checks(plugin: RolloutEngine, policy: Make, tokenizer: Any, prompts: Sequence[Prompt]) -> Checks:
    """Yield the checks of a rollout engine on these prompts, with `max_new_tokens` at most 12 if it has it."""
    engine: Any = copy.copy(plugin)
    if hasattr(engine, "max_new_tokens"):
        engine.max_new_tokens = min(engine.max_new_tokens, 12)
    wants = "sampler_logps" in plugin.provides

    @contextmanager
    def ready(model: Any) -> Iterator[Policy]:
        own = Policy(model=model, tokenizer=tokenizer, device=torch.device("cpu"), wants_logps=wants)
        with torch.no_grad(), seeded("conformance", 0):
            engine.load(Weights(policy=own, named=lambda: iter(model.state_dict().items())))
            yield own

    def run(model: Any, given: Sequence[Prompt], generations: int, temperature: float | None = None) -> Completions:
        with ready(model) as own:
            out: Completions = engine(own, copy.deepcopy(given), generations, temperature=temperature)
            return out

    def start(
        model: Any, given: Sequence[Prompt], generations: int
    ) -> tuple[list[tuple[int, Completions]], Completions]:
        with ready(model) as own:
            pending = engine.start(own, copy.deepcopy(given), generations)
            return list(pending), pending.result()

    yield (
        "it returns the requested number of completions per prompt, none empty",
        lambda: _are_completions(run, policy(), prompts, wants),
    )
    yield (
        "exact log-probs are the policy's",
        lambda: _are_the_policys(run, policy(), prompts, plugin.temperature),
    )
    yield "what it starts is what a call returns", lambda: _starts(run, start, policy(), prompts)
    yield "it does not change the model", lambda: _leaves_model(run, policy(), prompts)
    yield "equal random states give equal completions", lambda: _repeats(run, policy(), prompts)
    yield (
        "greedy completions depend on the prompt alone, and are adjacent",
        lambda: _greedy(run, policy(), prompts),
    )


def _are_completions(run: Any, model: Any, prompts: Sequence[Prompt], wants_logps: bool) -> None:
    words = len(model.get_input_embeddings().weight)
    for generations in (2, 1):
        out = run(model, prompts, generations)
        assert isinstance(out, Completions), f"it must return Completions, got {type(out).__name__}"
        rows = len(prompts) * generations
        said = f"for {len(prompts)} prompts with {generations} completions each"
        assert len(out.ids) == rows, (
            f"it returns {len(out.ids)} completions {said}. Use the argument, not its own setting"
        )
        assert len(out.finish_reasons) == rows, f"it returns {len(out.finish_reasons)} finish reasons {said}"
        other = set(out.finish_reasons) - {"stop", "length"}
        assert not other, f"finish reasons must be stop or length, got {sorted(map(str, other))}"
        for row, ids in enumerate(out.ids):
            assert len(ids) > 0, f"row {row} is empty. The end-of-sequence token is part of a completion"
            assert all(isinstance(i, int) and 0 <= i < words for i in ids), f"row {row}: {ids} are not token ids"
        for what, values in (("masks", out.masks), ("logps", out.logps)):
            lengths = [len(x) for x in values or out.ids]
            assert lengths == [len(ids) for ids in out.ids], f"{what} must have one number per completion token"
        assert all(set(mask) <= {0, 1} for mask in out.masks or ()), "its masks must hold 0 and 1 only"
        if wants_logps:
            assert out.logps is not None, "it declares sampler_logps and returns no logps"
        high = [x for row in out.logps or () for x in row if not -torch.inf < x <= 1e-6]
        assert not high, f"log-probs must be finite and at most 0, got {high[0]}"


def _are_the_policys(run: Any, model: Any, prompts: Sequence[Prompt], temperature: float) -> None:
    out = run(model, prompts, 2)
    if not out.exact:
        return
    assert out.logps is not None, "it declares exact log-probs and returns none"
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids)) for ids in out.ids], batch_first=True)
    batch = TokenBatch([prompt.ids for prompt in prompts for _ in range(2)], out.ids, mask, 0, "padded")
    with torch.no_grad():
        due = ActorCritic(model, None, temperature)(batch)["logps"]
    gap = max(
        abs(found - x)
        for row, logps in enumerate(out.logps)
        for found, x in zip(logps, due[row].tolist(), strict=False)
    )
    assert gap < 1e-4, f"its exact log-probs differ from a forward of the policy by {gap:.3g}"


def _leaves_model(run: Any, model: Any, prompts: Sequence[Prompt]) -> None:
    for training in (False, True):
        model.train(training)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        settings = copy.deepcopy(model.generation_config)
        learns = [p.requires_grad for p in model.parameters()]
        run(model, prompts, 1)
        assert model.training == training, (
            f"it leaves the model in {'training' if model.training else 'evaluation'} mode"
        )
        changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
        assert not changed, f"it changes the weights {', '.join(changed[:3])}"
        assert learns == [p.requires_grad for p in model.parameters()], "it changes which parameters learn"
        assert settings == model.generation_config, "it changes model.generation_config"


def _repeats(run: Any, model: Any, prompts: Sequence[Prompt]) -> None:
    first, again = run(model, prompts, 2), run(model, prompts, 2)
    repeats = (first.ids, first.masks, first.logps) == (again.ids, again.masks, again.logps)
    assert repeats, (
        "called twice in the same random state it returns other completions. Draw from the global generators"
    )


def _starts(run: Any, start: Any, model: Any, prompts: Sequence[Prompt]) -> None:
    whole = run(model, prompts, 2)
    landed, result = start(model, prompts, 2)
    assert sorted(i for i, _ in landed) == list(range(len(prompts))), (
        f"it yields completions of the prompts {[i for i, _ in landed]}, each of {len(prompts)} must land once"
    )
    assert result.ids == whole.ids, "in the same random state the result of `start` differs from a call's"
    for i, part in landed:
        due = whole.ids[2 * i : 2 * i + 2]
        assert part.ids == due, f"it yields {part.ids} for prompt {i}, whose completions are {due}"


def _greedy(run: Any, model: Any, prompts: Sequence[Prompt]) -> None:
    together = run(model, prompts, 2, 0.0).ids
    alone = [ids for prompt in prompts for ids in run(model, [prompt], 2, 0.0).ids]
    assert together == alone, f"two prompts are completed to {together} together and to {alone} alone"
