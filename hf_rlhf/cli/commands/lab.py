"""`hf-rlhf lab`: the objective of a combination, as a table, a picture, or the page of the whole matrix."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json
from hf_rlhf.runtime.errors import UserError

TrustRegion = Annotated[
    bool,
    typer.Option(
        "--trust-region", help="Show how far a policy may move before the surrogate of its old samples misleads."
    ),
]
Staleness = Annotated[
    bool,
    typer.Option("--staleness", help="Show what policy losses and rollout corrections make of older samples."),
]
Distillation = Annotated[
    bool,
    typer.Option("--distillation", help="Show what each form of distillation descends, its bias, and its variance."),
]
PictureFile = Annotated[Path | None, typer.Option("--picture", help="Also write a picture: a .svg, .png or .pdf.")]
Length = Annotated[
    int | None, typer.Option("--length", help="Maximum tokens of a completion, or of each turn; 3 by default.")
]
Turns = Annotated[
    int | None,
    typer.Option("--turns", help="Maximum turns of an episode; 1 by default. With 2, --length is 2 by default."),
]


@app.command(
    short_help="Show which objective the expected gradient of a recipe ascends.",
    epilog=examples(
        "hf-rlhf lab rloo",
        "hf-rlhf lab advantages.use=leave_one_out kl.0.use=in_reward",
        "hf-rlhf lab ppo --length 2 --off-policy --json",
        "hf-rlhf lab grpo --group 2 --picture grpo.svg",
        "hf-rlhf lab advantages.use=turn_gae --turns 2",
        "hf-rlhf lab --trust-region",
        "hf-rlhf lab --staleness",
        "hf-rlhf lab --distillation",
        "hf-rlhf lab --all > lab.md    # the whole matrix: minutes",
    ),
)
def lab(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe's name, package/name, or YAML file.",
            autocompletion=completion.recipes_and_overrides,
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Axis choices such as advantages.use=gae kl.0.use=in_reward.",
            autocompletion=completion.overrides,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the whole matrix as Markdown, as in the docs.")
    ] = False,
    trust_region: TrustRegion = False,
    staleness: Staleness = False,
    distillation: Distillation = False,
    as_json: Json = False,
    picture: PictureFile = None,
    group: Annotated[int | None, typer.Option("--group", help="Completions per prompt; 3 by default.")] = None,
    length: Length = None,
    turns: Turns = None,
    off_policy: Annotated[
        bool, typer.Option("--off-policy", help="Sample rollouts from a different policy than the updated one.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the policy, the reference and the rewards.")] = 0,
    plugin: PluginOptions = None,
) -> None:
    """Print what the expected gradient of a recipe, or of axis choices, is the gradient of, for each aggregation.

    Exact: every completion and every group of a small tabular policy is enumerated. Refused combinations are computed too.
    """
    if picture is not None:
        from hf_rlhf.lab.picture import require

        require(picture)
    import torch

    torch.set_num_threads(1)  # the tensors are small
    length = 2 if length is None and turns and turns > 1 else length
    wanted = {"group": group, "length": length, "turns": turns, "seed": seed}
    sizes: dict[str, Any] = {name: x for name, x in wanted.items() if x is not None}
    given = [*([recipe] if recipe else []), *(words or [])]
    options = [*(f"--{name}" for name in sizes if name != "seed"), *["--off-policy"] * off_policy]
    if everything:
        if beside := [*given, *options]:
            raise UserError(f"--all computes every combination and takes --seed only, got {beside[0]}")
        _everything(as_json, picture, seed)
    elif asked := [name for name, on in zip(THEORY, (trust_region, staleness, distillation), strict=True) if on]:
        if given or off_policy or group or turns or picture or len(asked) > 1:
            raise UserError(f"{asked[0]} takes --length, --seed and --json only: it depends on no recipe")
        THEORY[asked[0]](sizes, as_json)
    else:
        named = recipe if recipe and "=" not in recipe else None
        _one(named, given[bool(named) :], as_json, picture, sizes, off_policy)


def _everything(as_json: bool, picture: Path | None, seed: int) -> None:
    from hf_rlhf.lab.choices import BETA
    from hf_rlhf.lab.matrix import Matrix
    from hf_rlhf.lab.page import page
    from hf_rlhf.lab.picture import of_matrix, save

    sections = Matrix(beta=BETA, seed=seed).sections()
    if picture is not None:
        save(of_matrix(sections["whole"]), picture)
    if as_json:
        print_json([row.as_dict() for rows in sections.values() for row in rows])
    else:
        print(page(sections, beta=BETA, seed=seed, picture=picture.name if picture else None), end="")


def _trust_region(sizes: dict[str, Any], as_json: bool) -> None:
    from hf_rlhf.lab.table import of_moves
    from hf_rlhf.lab.trust_region import moves
    from hf_rlhf.lab.world import World

    found = moves(World(group=1, **sizes))
    if as_json:
        print_json([vars(move) for move in found])
        return
    for line in of_moves(found):
        print(line)


def _staleness(sizes: dict[str, Any], as_json: bool) -> None:
    from hf_rlhf.lab.staleness import AGES, distances, study
    from hf_rlhf.lab.table import of_ages
    from hf_rlhf.lab.world import World

    world = World(group=2, **sizes)
    found, far = list(study(world)), distances(world)
    if as_json:
        print_json({"ages": AGES, "total_variation": far, "choices": [vars(aged) for aged in found]})
        return
    for line in of_ages(AGES, far, found):
        print(line)


def _distillation(sizes: dict[str, Any], as_json: bool) -> None:
    from hf_rlhf.lab.distillation import LONGEST, TOKENS, forms, gaps
    from hf_rlhf.lab.table import of_distillation
    from hf_rlhf.lab.world import World

    whole = list(forms(World(group=1, rewards="none", **sizes)))
    top = list(gaps(World(**{"length": LONGEST, **sizes}, group=1, tokens=TOKENS, rewards="none")))
    if as_json:
        print_json({"forms": [vars(form) for form in whole], "top_k": [vars(gap) for gap in top]})
        return
    for line in of_distillation(whole, top):
        print(line)


THEORY = {"--trust-region": _trust_region, "--staleness": _staleness, "--distillation": _distillation}
"""Option -> the study that depends on no recipe."""


def _one(
    recipe: str | None,
    overrides: list[str],
    as_json: bool,
    picture: Path | None,
    sizes: dict[str, Any],
    off_policy: bool,
) -> None:
    from hf_rlhf.lab.choices import BETA, read, rewards_of
    from hf_rlhf.lab.picture import of_one, save
    from hf_rlhf.lab.single import left_out, run
    from hf_rlhf.lab.table import lines
    from hf_rlhf.lab.world import World

    chosen = read(recipe, overrides)
    world = World(rewards=rewards_of(chosen.algorithm()), **sizes)
    own = any(word.startswith("kl.") and word.partition("=")[0].endswith(".beta") for word in overrides)
    with output_to_stderr(as_json):
        rows = run(chosen, world=world, beta=None if own else BETA, off_policy=off_policy)
    if picture is not None:
        title = " ".join([recipe or "", *overrides]).strip() or "reinforce"
        save(of_one(rows, title), picture)
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    for line in lines(rows, world):
        print(line)
    notes = [*chosen.notes, *(f"left out: {name}" for name in left_out(chosen.algorithm()))]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
