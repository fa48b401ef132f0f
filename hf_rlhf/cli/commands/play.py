"""`play`: be the policy of a recipe at the terminal."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.commands.train import EXTRA, Config, Data, Model, RecipeName, Seed, Words, read
from hf_rlhf.cli.output import examples, output_to_stderr
from hf_rlhf.contract.environment import AGENT
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.plain_text import escaped

if TYPE_CHECKING:
    from hf_rlhf.training.typed_policy import PlayedRow, Table

ASK = "> "
SHOWN = (
    AGENT,
    "episode/turn_ends",
    "episode/environment",
    "episode/end",
    "episode/reward",
    "episode/turn_rewards",
)
"""Columns of an episode that are shown in words of their own."""


@app.command(
    cls=completion.WithFlags,
    context_settings=EXTRA,
    short_help="Be the policy of a recipe at the terminal.",
    epilog=examples(
        "hf-rlhf play second_chance",
        "hf-rlhf play second_chance --row 7 environment.0.attempts=3    # what a change does",
        "printf '113\\n' | hf-rlhf play quickstart    # a line for each turn",
        "hf-rlhf play grpo --model Qwen/Qwen3-0.6B --dataset problems.jsonl --held-out --episodes 3",
    ),
)
def play(
    context: typer.Context,
    recipe: RecipeName = None,
    words: Words = None,
    model: Model = None,
    dataset: Data = None,
    row: Annotated[int, typer.Option("--row", min=1, help="Row of the dataset to begin with, from 1.")] = 1,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Rows to play, one after the other.")] = 1,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Play held-out rows, in place of those that are trained on.")
    ] = False,
    seed: Seed = None,
    config: Config = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", "--trust_remote_code", help="Run code that comes with the model.")
    ] = False,
    plugin: PluginOptions = None,
) -> None:
    """Play a recipe's episodes in the policy's place: see what it sees and say what it would say; no model is loaded.

    What is asked is the text of the chat template. A line is a turn, and the end-of-sequence token is added; \\n in it is a
    line end. Then the row is shown as training has it, tokens with mask 1 and 0, and its rewards. Lines may come from a pipe.
    """
    with output_to_stderr():
        from hf_rlhf.config.recipe import Recipe

        chosen = read(recipe, config, [*(words or []), *context.args], model, dataset, seed, None, loads=True)
    if not isinstance(chosen, Recipe):
        raise UserError(
            f"the recipe {chosen.name} trains on a dataset, and its policy says nothing. Play one with rewards"
        )
    from hf_rlhf.training.typed_policy import opened

    out = sys.stdout  # while an environment plays, what is printed goes to stderr

    def say(added: str, agent: str | None) -> str:
        with redirect_stdout(out):
            if agent:
                print(f"[{agent}]")
            return _typed(added)

    with opened(chosen, say, held_out, trust_remote_code) as table:
        last = row + episodes - 1
        if last > len(table.prompts):
            raise UserError(f"--row must be up to {len(table.prompts)}, the last row that can be played, got {last}")
        for number in range(row, last + 1):
            print(f"row {number} of {len(table.prompts):,}, {_setting(table)}")
            try:
                found = table.play(number - 1)
            except EOFError:
                print()
                raise UserError("the input ended in the middle of an episode. Give a line for each turn") from None
            for played in found:
                _show(played, len(found) > 1)


def _setting(table: Table) -> str:
    bound = f"up to {table.turns.max_new_tokens} tokens a turn"
    named = [
        f"{environment.name} ({environment.max_turns} turns, {environment.max_tokens} tokens)"
        for environment in table.algorithm.environment
    ]
    return f"{bound}, environment {', '.join(named) or 'none'}"


def _typed(added: str) -> str:
    """Print what the policy reads, and return what is typed."""
    print(escaped(added, "\n"), flush=True)
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys in `input`
        said = input(ASK)
    else:
        said = sys.stdin.readline()
        if not said:
            raise EOFError
        said = said.rstrip("\n")
        print(f"{ASK}{escaped(said)}")
    return said.replace("\\n", "\n")


def _show(found: PlayedRow, named: bool) -> None:
    """Print a row: its tokens by their masks, how it ended, and its rewards. `named`: it is one of several agents."""
    columns = found.columns
    print("\nthe row in training" + (f" of the agent {columns[AGENT]}" if named else ""))
    for title, span in found.parts:
        first, *others = escaped(span.text, "\n").split("\n")
        print(f"  {title:6} {span.tokens:5} tokens | {first}")
        for line in others:
            print(f"{'|':>23} {line}")
    ended = _ended(columns, found.reason)
    print(f"ended with {found.finish_reason}{ended}")
    why = "" if ended or not found.reason else f": {escaped(found.reason)}"
    print(f"reward     {'none' if found.total is None else f'{found.total:g}'}{why}")
    for label, (weight, score) in found.rewards.items():
        print(f"  {label}: {'none' if score is None else f'{score:g}'}{'' if weight == 1 else f', weight {weight:g}'}")
    if columns.get("episode/turn_rewards"):
        print(f"of its turns: {', '.join(f'{reward:g}' for reward in columns['episode/turn_rewards'])}")
    for name, value in columns.items():
        if name not in SHOWN and value is not None:
            print(f"{name}: {escaped(_short(value))}")


def _ended(columns: dict[str, Any], reason: str) -> str:
    words = {"over": "no turns or tokens were left", "error": reason, "timeout": reason}
    return f": {escaped(words[end])}" if (end := columns.get("episode/end")) in words else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
