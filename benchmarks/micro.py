"""Parts alone: the head, sampling, packing, what a plugin costs by being one, and a row of a reward source.

`python -m benchmarks.micro [--quick] [--only PART ...] [--json PATH]`: processor time on one thread in float32, the least
of several runs, variants in turn; every variant of a part is checked against the first. The result goes to
benchmarks/results/micro.json, and as tables to docs/benchmarks.md; of a quick run, with smaller sizes, to
micro_quick.json and micro_quick.md alone. `python -m benchmarks.estimators` measures the advantage estimators.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.micro_parts import Part, Variants, apart, in_turn, part
from benchmarks.peak import mib, peak
from benchmarks.work import FIRST_WORD, PAD, Line, make_model, prompt_ids, script
from hf_rlhf.axes import Filter, LossTerm, PolicyLoss

RESULTS = Path(__file__).parent / "results"
VOCABULARIES = (4096, 151936)
WIDTH = 256
"""Width of hidden states."""


# The head


def head(vocabulary: int, tokens: int, times: int) -> Part:
    """Log-probs and exact entropy of sampled tokens, and the gradient of a weighted sum of the log-probs."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, WIDTH, generator=draw, requires_grad=True)
    linear = nn.Linear(WIDTH, vocabulary, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(vocabulary, WIDTH, generator=draw) * WIDTH**-0.5)
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    by_token = torch.randn(tokens, generator=draw)
    variants = heads(linear, states, targets, by_token)

    def cleared(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def once() -> Tensor:
            states.grad = linear.weight.grad = None
            return run()

        return once

    variants = {name: cleared(run) for name, run in variants.items()}
    due: list[Tensor] = []
    errors, peaks = {}, {}
    for name, run in variants.items():
        with peak() as held:
            entropy = run()
        assert states.grad is not None
        assert linear.weight.grad is not None
        found = [entropy, states.grad, linear.weight.grad]
        due = due or found
        errors[name], peaks[name] = apart(found, due), mib(held)
    seconds = in_turn(variants, times)
    entries = [
        {"variant": name, "seconds": seconds[name], "peak, MiB": peaks[name], "apart by": errors[name]}
        for name in variants
    ]
    text = f"{tokens} tokens of width {WIDTH}, forward and backward, exact entropy without gradient."
    return part(f"Head, vocabulary {vocabulary:,}", text, ("peak, MiB", "apart by"), entries)


def heads(linear: Any, states: Tensor, targets: Tensor, by_token: Tensor) -> Variants:
    """Each gives the entropies (n,) and leaves gradients in `states` and the weight."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from hf_rlhf.modeling.lm_head import Head, TokenStatistics, score

    def plain() -> Tensor:
        log_probs = linear(states).log_softmax(-1)
        (log_probs.gather(1, targets[:, None]).squeeze(1) * by_token).sum().backward()
        with torch.no_grad():
            return -(log_probs.exp() * log_probs).sum(-1)

    def theirs() -> Tensor:
        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            states, linear.weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
        )
        (logps * by_token).sum().backward()
        return entropy.detach()

    def ours() -> Tensor:
        found = score(Head(linear), states, targets, 1.0, TokenStatistics(entropy=True))
        (found["logps"] * by_token).sum().backward()
        return found["entropy"].detach()

    def known() -> Tensor:
        found = score(
            Head(linear),
            states,
            targets,
            1.0,
            TokenStatistics(entropy=True),
            derivative=lambda values, chunk: {"logps": by_token[chunk]},
        )
        found["loss"].backward()
        return found["entropy"].detach()

    return {
        "matrix product and log_softmax": plain,
        "TRL's, in chunks": theirs,
        "ours, in chunks": ours,
        "ours, derivative known in the forward": known,
    }


# Sampling


def sampling(vocabulary: int, rows: int, times: int) -> Part:
    """Measure sampling of a token for each row from its logits, with the token's log-prob."""
    from hf_rlhf_plugins.rollout.generate import Generate

    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(rows)
    prompts: list[Any] = [None] * rows
    samplers = {wants: Generate().sampler(prompts, 1, 1.0, torch.device("cpu"), wants) for wants in (False, True)}

    def multinomial() -> tuple[Tensor, None]:
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1), None

    def logged() -> tuple[Tensor, Tensor]:
        log_probs = logits.log_softmax(-1)
        tokens = torch.multinomial(log_probs.exp(), 1)
        return tokens.squeeze(1), log_probs.gather(1, tokens).squeeze(1)

    def copied(run: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: run(logits, numbers, 0)

    variants: Variants = {
        "softmax and multinomial": multinomial,
        "the same with log-probs": logged,
        "ours": copied(samplers[False]),
        "ours with log-probs": copied(samplers[True]),
    }
    due = logits.log_softmax(-1)
    errors = {}
    for name, run in variants.items():
        tokens, logps = run()
        if logps is not None:
            errors[name] = float((logps - due.gather(1, tokens[:, None]).squeeze(1)).abs().max())
    seconds = in_turn(variants, times)
    entries = [
        {"variant": name, "seconds": seconds[name], **({"apart by": errors[name]} if name in errors else {})}
        for name in variants
    ]
    return part(f"Sampling, vocabulary {vocabulary:,}", f"One token for each of {rows} rows.", ("apart by",), entries)


# Packing


def packing(line: Line, times: int) -> Part:
    """Forward and backward of the log-probs of one rollout's completions."""
    from hf_rlhf.modeling.policy import ActorCritic
    from hf_rlhf.modeling.token_batch import TokenBatch

    model = make_model(line)
    actor = ActorCritic(model, None, 1.0)
    prompts = [ids for ids in prompt_ids(line, 0) for _ in range(line.group)]
    completions = script(line, 0)
    apart_prompts = [[FIRST_WORD + i, *ids[1:]] for i, ids in enumerate(prompts)]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(ids)) for ids in completions], batch_first=True)
    batches = {
        "padded": (prompts, "padded"),
        "padded, other prompts": (apart_prompts, "padded"),
        "packed, other prompts": (apart_prompts, "packed"),
        "packed, prompts shared": (prompts, "packed"),
    }
    made = {
        name: TokenBatch(ids, completions, mask, PAD, attention)  # type: ignore[arg-type]
        for name, (ids, attention) in batches.items()
    }
    found: dict[str, list[Tensor]] = {}
    peaks = {}

    def run(name: str) -> Callable[[], list[Tensor]]:
        def once() -> list[Tensor]:
            actor.zero_grad()
            logps = actor(made[name])["logps"]
            logps.sum().backward()
            return [logps.detach(), *(p.grad for p in actor.parameters() if p.grad is not None)]

        return once

    variants: Variants = {name: run(name) for name in made}
    for name, once in variants.items():
        with peak() as held:
            found[name] = [x.clone() for x in once()]
        peaks[name] = mib(held)
    del variants["padded, other prompts"]  # was there to check the packed ones
    seconds = in_turn(variants, times)
    entries = [
        {
            "variant": name,
            "seconds": seconds[name],
            "positions": made[name].positions,
            "peak, MiB": peaks[name],
            "apart by": apart(found[name], found["padded, other prompts" if "other" in name else "padded"]),
        }
        for name in variants
    ]
    span = f"{line.shortest_prompt}-{line.longest_prompt}"
    text = (
        f"{line.rows} completions of up to {line.longest} tokens after {line.prompts} prompts of {span}, forward and "
        "backward. With other prompts no two rows share one, all lengths being the same."
    )
    return part(f"Packing, prompts of {span} tokens", text, ("positions", "peak, MiB", "apart by"), entries)


# Plugins


class NoLoss(PolicyLoss):
    """Gives the log-probs back."""

    name = "none"

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, **others: Tensor) -> Any:
        return logps, {}


class NoTerm(LossTerm):
    """Gives the log-probs back."""

    name = "none"

    def __call__(self, logps: Tensor, mask: Tensor) -> Tensor:
        return logps


class All(Filter):
    """Gives back what it is given."""

    name = "all"

    def __call__(self, scored: Any) -> Any:
        return scored


def dispatch(calls: int, times: int) -> Part:
    """Measure the overhead of calls through the recipe's plugins: plugins that return their argument, against functions."""
    from hf_rlhf.config.recipe import resolve
    from hf_rlhf.training.losses import POLICY_GETS

    a = resolve(
        {
            "rollout": "generate",
            "rewards": ["length"],
            "advantages": "group_norm",
            "policy_loss": NoLoss(),
            "loss_terms": [NoTerm()],
            "filters": [All()],
        }
    ).algorithm()
    x = torch.zeros(1)
    known = {"old_logps": x, "advantages": x, "mask": x, "logps": x}

    def repeated(run: Callable[[], Any]) -> Callable[[], None]:
        def once() -> None:
            for _ in range(calls):
                run()

        return once

    loss, term, chosen = NoLoss(), NoTerm(), All()
    stages: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "policy_loss": (
            lambda: loss(x, x, x, x),
            lambda: a.policy_loss(x, x, x, x, **a.extras(a.policy_loss, known, POLICY_GETS)),
        ),
        "loss_terms": (
            lambda: term(x, x),
            lambda: [t(x, x, **a.extras(t, known, frozenset())) for _, t in a.titled("loss_terms")],
        ),
        "filters": (lambda: chosen(x), lambda: [f(x) for _, f in a.titled("filters")]),
    }
    variants: Variants = {}
    for name, (direct, through) in stages.items():
        variants |= {f"{name}, direct": repeated(direct), f"{name}, by the recipe": repeated(through)}
    seconds = {name: x / calls for name, x in in_turn(variants, times).items()}
    entries = [{"variant": name, "seconds": x} for name, x in seconds.items()]
    text = "One call of a plugin that does nothing, as it stands and as the step makes it."
    return part("Dispatch", text, (), entries, compared=False)


# The command


def parts(quick: bool) -> dict[str, list[Callable[[], Part]]]:
    """Name -> its tables."""
    from benchmarks.micro_rewards import rewards

    times = 1 if quick else 5
    short = Line(name="short", prompts=2, longest=32) if quick else Line(name="short")
    long = replace(short, name="long", shortest_prompt=128, longest_prompt=256)

    def with_tokens(vocabulary: int) -> int:
        return (128 if quick else 1024) if vocabulary == VOCABULARIES[0] else (64 if quick else 512)

    return {
        "head": [lambda v=v: head(v, with_tokens(v), times) for v in VOCABULARIES],  # type: ignore[misc]
        "sampling": [lambda v=v: sampling(v, 32, 4 * times) for v in VOCABULARIES],  # type: ignore[misc]
        "packing": [lambda line=line: packing(line, times) for line in (short, long)],  # type: ignore[misc]
        "dispatch": [lambda: dispatch(1000 if quick else 20000, times)],
        "rewards": [lambda: rewards(64 if quick else 512, 4 * times)],
    }


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=list(parts(True)), metavar="PART", help="all when left out")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    from benchmarks.speed_page import micro_section, publish

    torch.set_num_threads(1)
    path = options.json or RESULTS / ("micro_quick.json" if options.quick else "micro.json")
    command = "python -m benchmarks.micro" + (" --quick" if options.quick else "")
    found: dict[str, Any] = {**record.head(command), "parts": []}
    for name, tables in parts(options.quick).items():
        if options.only is None or name in options.only:
            found["parts"] += [table() for table in tables]
    publish(found, path, "Parts alone", micro_section(found))
    print(micro_section(found))


if __name__ == "__main__":
    main()
