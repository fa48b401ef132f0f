"""`pipeline`, and `check` of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.flags import ShowCompletions, WithSamples
from hf_rlhf.cli.launch import importing
from hf_rlhf.cli.output import examples, output_to_stderr, print_json
from hf_rlhf.metrics.live_view import LiveView, console
from hf_rlhf.runtime.errors import UserError

Name = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe with stages: name, package/name, or YAML file.",
        autocompletion=completion.staged_names,
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STAGE.KEY=VALUE]...",
        help="Overrides such as ppo.kl.0.beta=0.1 or ppo.recipe=grpo.",
        autocompletion=completion.stage_overrides,
    ),
]


@app.command(
    cls=WithSamples,
    short_help="Run a recipe with stages, such as instructgpt.",
    epilog=examples(
        "hf-rlhf pipeline instructgpt",
        "hf-rlhf pipeline instructgpt ppo.kl.0.beta=0.1 --seed 1",
        "hf-rlhf pipeline instructgpt ppo.recipe=grpo --output-dir outputs/instructgpt-grpo",
        "hf-rlhf check instructgpt    # the plan of every stage, without training",
    ),
)
def pipeline(
    name: Name,
    words: Words = None,
    output_dir: Annotated[
        str | None,
        typer.Option("--output-dir", "--output_dir", help="Folder of the stages; outputs/RECIPE by default."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="training.seed of every stage.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Resume the run in the output folder, or start over.")
    ] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", "--trust_remote_code", help="Run code that comes with the models.")
    ] = False,
    show_completions: ShowCompletions = None,
    plugin: PluginOptions = None,
) -> None:
    """Run a recipe with stages, such as instructgpt: each stage starts from the output of earlier ones.

    An interrupted run continues where it stopped: finished stages are skipped, an unfinished one resumes.
    """
    with LiveView() as view:
        with importing():
            import hf_rlhf.training.trainer  # noqa: F401
            from hf_rlhf.cli.runs.pipeline_run import choose_root, run_stages
            from hf_rlhf.config.pipeline import load_pipeline

            staged = load_pipeline(name, words or (), seed)
        root = choose_root(output_dir, staged.name, resume)
        run_stages(staged, root, trust_remote_code, view, show_completions)


def check_staged(
    name: str, words: Sequence[str], output_dir: str | None, seed: int | None, as_json: bool = False
) -> None:
    """Print the plan of every stage, or why a stage is refused."""
    from pathlib import Path

    from rich.text import Text

    from hf_rlhf.cli.runs.pipeline_run import check_stages
    from hf_rlhf.config.pipeline import load_pipeline
    from hf_rlhf.metrics.console import show_plan

    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]}: {name} has stages; write STAGE.KEY=VALUE, for instance rl.model.path=FOLDER")
    with output_to_stderr(as_json):
        staged = load_pipeline(name, words, seed)
        plans = check_stages(staged, Path(output_dir or f"outputs/{staged.name}"))
    if as_json:
        stages = {stage.name: {"recipe": stage.source, **plans[stage.name].as_dict()} for stage in staged.stages}
        print_json({"recipe": staged.name, "stages": stages})
        return
    out = console()
    for stage in staged.stages:
        out.print(Text(f"\nstage {stage.name}: recipe {stage.source}", style="bold"), soft_wrap=True)
        for key, (source, place) in stage.reads.items():
            out.print(Text(f"  {key} is the output of {source}{f', {place}' if place else ''}"), soft_wrap=True)
        show_plan(plans[stage.name], out)
