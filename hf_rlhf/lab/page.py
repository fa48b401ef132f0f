"""Markdown page of the whole matrix, on the documentation site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from hf_rlhf.lab.study import Row, Verdict
from hf_rlhf.lab.table import cosine, describe_world, number, of_estimator, of_kl, yes
from hf_rlhf.lab.world import World

INTRODUCTION = """# The lab

`hf-rlhf lab RECIPE`, or `hf-rlhf lab` with axis choices (`advantages.use=gae kl.0.use=in_reward`), shows which objective a
combination of plugins actually optimizes. For a policy small enough to enumerate, every completion and every group is
weighted by its exact probability, in float64. The plugins and the loss are the trainer's; their expected gradient is compared
with those of named objectives. Nothing is sampled or trained: errors below 1e-9 are shown as 0, and are near 1e-15.

- **expected gradient of**: the recognized objective, with one factor at two policies, or `none`. `sg` is held fixed.
  `per-state` divergences are those of the next token's distributions, with the visited states held fixed. The `score half`
  of grad E[sum e] holds e fixed, the `path half` the probability; in the `own-token half` each token's e multiplies only its
  own score. l is the log-ratio of a completion to the reference, T its length. `c(pi)` is a factor that depends on the policy.
- **cosine** and **bias**: of the expected gradient and the goal, grad E[r] - beta grad KL(pi||ref); the bias is the length of
  their difference over the goal's.
- **variance**: the trace of the covariance of a rollout's gradient, times its rows.
- **pi\\* stationary**: yes if it vanishes at pi\\* = ref e^(r/beta) / Z, where the goal is highest.
- **a gradient**: yes if it is the gradient of any function, that is, if its Jacobian is symmetric.

The world: {world}; two reward sources; beta {beta:g}; seed {seed}. `hf-rlhf lab --all --json` gives every number of this page
and more, `hf-rlhf lab --seed 1` another world."""

LEGEND = {
    Verdict.GOAL: "a multiple of the goal",
    Verdict.OTHER_BETA: "a multiple of the goal with another beta",
    Verdict.PARALLEL: "parallel to the goal, by a factor that depends on the policy",
    Verdict.OTHER: "the gradient of another, recognized objective",
    Verdict.FIXED: "recognized, but not the gradient of any function, as part of it is held fixed",
    Verdict.UNKNOWN: "the gradient of an unrecognized function",
    Verdict.NOTHING: "not recognized, and not the gradient of any function",
}
PLAIN = "seq_mean_token_sum"
UNBIASED = "leave_one_out"


def page(sections: Mapping[str, Sequence[Row]], *, beta: float, seed: int, picture: str | None = None) -> str:
    """Return the whole page from the `sections` of `Matrix`, with a link to `picture`."""
    parts = [INTRODUCTION.format(world=describe_world(World(seed=seed)), beta=beta, seed=seed)]
    if picture:
        parts.append(f"![The cosine with the goal of every combination]({picture})")
    whole = sections["whole"]
    parts += [
        *_recipes(sections["recipes"]),
        *_kls(whole),
        *_estimators([*whole, *sections["settings"]]),
        *_aggregations(whole),
        *_critics(sections["critics"]),
        *_other_worlds(sections["binary"], sections["two_prompts"]),
        *_losses(sections["losses"], sections["off_policy"]),
        *_whole(whole),
    ]
    return "\n\n".join(parts) + "\n"


def _recipes(rows: Iterable[Row]) -> Iterator[str]:
    yield (
        "## Recipes\n\nEach recipe's advantages, KLs, policy loss and aggregation, in the first optimizer step of a rollout; "
        "the critic has exact values. The sampler, filters, loss terms and rollout corrections are left out."
    )
    yield markdown(
        ["recipe", "advantages", "KL", "policy loss", "aggregation", *HEADER],
        [
            [
                *map(code, (row.recipe or "", of_estimator(row), of_kl(row), row.policy_loss, row.aggregation)),
                *_numbers(row),
            ]
            for row in rows
        ],
    )


def _kls(rows: Iterable[Row]) -> Iterator[str]:
    yield (
        f"## KL\n\nEvery placement, estimator and level, with advantages `{UNBIASED}` and aggregation `{PLAIN}`. Rejected ones "
        "are computed too; `hf-rlhf check` says why they are rejected."
    )
    chosen = [row for row in rows if row.advantages == UNBIASED and row.aggregation == PLAIN and row.objective]
    yield markdown(
        [
            "KL",
            "expected gradient of",
            "error",
            "cosine",
            "bias",
            "variance",
            "pi\\* stationary",
            "a gradient",
            "refused",
        ],
        [[code(of_kl(row)), *_numbers(row), yes(bool(row.refused))] for row in chosen],
    )
    reasons = dict.fromkeys(reason for row in rows for reason in row.refused if row.advantages == UNBIASED)
    yield "Why they are rejected:\n\n" + "\n".join(f"- {reason}" for reason in reasons)


def _numbers(row: Row) -> list[str]:
    return [
        code(row.objective or ""),
        number(row.relative_error, 2),
        cosine(row.cosine),
        number(row.bias),
        number(row.variance),
        yes(row.stationary),
        yes(row.is_gradient),
    ]


def _estimators(rows: Sequence[Row]) -> Iterator[str]:
    alone = [row for row in rows if row.kl == "none"]
    names = list(dict.fromkeys(row.aggregation for row in alone))
    yield (
        "## Advantages\n\nEvery estimator with its default settings, then with one setting changed, without a KL. Cells show "
        "the objective, then the cosine; the variance is that with the first aggregation. Settings without an effect here are "
        "omitted."
    )
    names.sort(key=lambda name: name != PLAIN)
    found: dict[str, dict[str, Row]] = {}
    for row in alone:
        found.setdefault(of_estimator(row), {})[row.aggregation] = row
    lines = []
    for row in _distinct(by[PLAIN] for by in found.values()):
        by = found[of_estimator(row)]
        cells = [f"{code(by[x].objective or '')} {cosine(by[x].cosine)}" for x in names]
        lines.append([code(of_estimator(row)), *cells, number(row.variance)])
    yield markdown(["advantages", *map(code, names), "variance"], lines)


def _distinct(rows: Iterable[Row]) -> Iterator[Row]:
    """Skip rows that a changed setting leaves unchanged."""
    seen: dict[tuple[str, ...], str] = {}
    for row in rows:
        key = (row.advantages, of_kl(row), row.aggregation, row.objective or "", number(row.variance, 6))
        if seen.setdefault(key, of_estimator(row)) == of_estimator(row):
            yield row


def _aggregations(rows: Iterable[Row]) -> Iterator[str]:
    yield (
        "## Aggregations\n\nWith estimators that are exact under the right aggregation: without a KL, with k1 in the reward, and "
        "with k2 of the sequence in the loss."
    )
    shown = {("none", None, None), ("in_reward", "k1", "token"), ("in_loss", "k2", "sequence")}
    chosen = [
        row for row in rows if row.advantages in ("reinforce", UNBIASED) and (row.kl, row.estimator, row.level) in shown
    ]
    yield markdown(
        ["aggregation", "advantages", "KL", *HEADER],
        [[code(row.aggregation), code(row.advantages), code(of_kl(row)), *_numbers(row)] for row in chosen],
    )


HEADER = ["expected gradient of", "error", "cosine", "bias", "variance", "pi\\* stationary", "a gradient"]


def _critics(rows: Iterable[Row]) -> Iterator[str]:
    yield (
        f"## Critics\n\nAbove, critics have exact values of the return after the KL in the reward. With arbitrary values and "
        f"aggregation `{PLAIN}`:"
    )
    yield markdown(
        ["advantages", "KL", *HEADER],
        [
            [code(of_estimator(row)), code(of_kl(row)), *_numbers(row)]
            for row in _distinct(rows)
            if row.aggregation == PLAIN
        ],
    )


def _other_worlds(binary: Sequence[Row], two: Sequence[Row]) -> Iterator[str]:
    for title, rows in (
        ("Rewards of 0 and 1, groups of four", binary),
        ("Two prompts, groups of two, at most two tokens", two),
    ):
        yield f"## {title}\n\nWithout a KL, aggregation `{PLAIN}`."
        yield markdown(
            ["advantages", *HEADER[:5], HEADER[6]],
            [
                [code(of_estimator(row)), *_numbers(row)[:5], _numbers(row)[6]]
                for row in _distinct(rows)
                if row.aggregation == PLAIN
            ],
        )


def _losses(on: Iterable[Row], off: Iterable[Row]) -> Iterator[str]:
    yield (
        f"## Policy losses\n\nWith advantages `{UNBIASED}` and aggregation `{PLAIN}`, without a KL: in the first optimizer step "
        "of a rollout, where the ratio is 1, and on rollouts of another policy, some 0.3 away in each logit. There none is "
        "exact, as the ratio of a token does not know how likely its state has become; what counts is the cosine."
    )
    by = {row.policy_loss: row for row in off if row.kl == "none" and row.aggregation == PLAIN}
    yield markdown(
        ["policy loss", "on-policy", "cosine", "variance", "off-policy: cosine", "bias", "variance"],
        [
            [
                *(code(row.policy_loss), code(row.objective or ""), cosine(row.cosine), number(row.variance)),
                *(cosine(other.cosine), number(other.bias), number(other.variance)),
            ]
            for row in on
            if row.aggregation == PLAIN and (other := by[row.policy_loss])
        ],
    )
    yield "What a KL in the loss adds on rollouts of another policy, over -beta; `per-state` visits are then the other policy's:"
    yield markdown(
        ["KL", "adds the gradient of", "factor"],
        [
            [code(of_kl(row)), code(row.kl_part or "none"), number(row.kl_factor)]
            for row in off
            if row.kl != "none" and row.aggregation == PLAIN and row.objective
        ],
    )


def _whole(rows: Sequence[Row]) -> Iterator[str]:
    legend = "\n".join(f"- `{verdict.value}` {text}" for verdict, text in LEGEND.items())
    yield (
        "## The whole matrix\n\nEvery estimator with its default settings, every KL and every aggregation, in one character "
        "each:\n\n"
        f"{legend}\n- `( )` around it: rejected; empty: not defined"
    )
    columns = list(dict.fromkeys(of_estimator(row) for row in rows))
    for aggregation in dict.fromkeys(row.aggregation for row in rows):
        by: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row.aggregation == aggregation:
                by.setdefault(of_kl(row), {})[of_estimator(row)] = row
        yield f"### {aggregation}"
        yield markdown(
            ["KL", *(row.split("(")[0] for row in columns)],
            [[code(kl), *(character(line[name]) for name in columns)] for kl, line in by.items()],
        )


def character(row: Row) -> str:
    """Return one cell of the whole matrix."""
    found = code(row.verdict.value)
    return f"({found})" if row.refused and found else found


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; `|` in a cell is escaped."""
    found = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in found)


def code(text: str) -> str:
    """Format as code, unless empty."""
    return f"`{text}`" if text.strip() else ""
