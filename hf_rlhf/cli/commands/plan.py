"""`plan`: where a recipe's models go on several devices, what each holds, and how long a step takes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_rlhf.cli import completion
from hf_rlhf.cli.app import PluginOptions, app
from hf_rlhf.cli.commands.train import EXTRA, Config, Data, Model, RecipeName, Words, read
from hf_rlhf.cli.output import Json, examples, output_to_stderr, print_json, table

if TYPE_CHECKING:
    from hf_rlhf.training.planner.comparison import Comparison
    from hf_rlhf.training.planner.layouts import Layout

SHOWN = 6
"""Layouts that are printed; JSON has all."""


@app.command(
    cls=completion.WithFlags,
    context_settings=EXTRA,
    short_help="Compare layouts of a recipe on several devices: memory, seconds of a step, launch command.",
    epilog=examples(
        "hf-rlhf plan quickstart --gpus 8 --gpu-memory 80 --bf16 true",
        "hf-rlhf plan quickstart --gpus 2 --gpu cpu --measured outputs/quickstart    # seconds fitted to a run",
    ),
)
def plan(
    context: typer.Context,
    recipe: RecipeName = None,
    words: Words = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of devices.")] = 8,
    gpu: Annotated[str, typer.Option("--gpu", help="Kind of device: a100, b200, cpu, h100 or h200.")] = "h100",
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=0.1, help="GiB of a device; those of its kind by default.")
    ] = None,
    measured: Annotated[
        list[str] | None,
        typer.Option(
            "--measured",
            metavar="RUN",
            help="Folder of a run on such devices, to whose seconds constants are fitted. Repeatable: best two sizes.",
        ),
    ] = None,
    model: Model = None,
    dataset: Data = None,
    config: Config = None,
    as_json: Json = False,
    plugin: PluginOptions = None,
) -> None:
    """Compare layouts of a recipe on several devices, without any of them; load no model.

    In colocated layouts every device trains and samples; in the others vLLM samples on devices of its own, while the trainers
    wait or, ahead of the policy, learn from an older rollout. Seconds are a roofline's unless runs are given.
    """
    given = [*(words or []), *context.args]
    with output_to_stderr(as_json):
        from hf_rlhf.training.planner.comparison import compare

        def chosen(more: list[str]) -> Any:
            return read(recipe, config, [*given, *more], model, dataset, None, None)

        found = compare(chosen, gpus, gpu, gpu_memory, measured or [])
    flags = [x for flag, value in (("--model", model), ("--dataset", dataset)) if value for x in (flag, value)]
    typed = [x for x in (config, recipe) if x] + given + flags
    launch = {layout.title: command(layout, typed) for layout in found.layouts if layout.runs and layout.fits}
    if as_json:
        rows = [{**layout.as_dict(), "command": launch.get(layout.title)} for layout in found.layouts]
        print_json({"title": found.title, "layouts": rows, "best": found.best.title, "notes": found.notes})
        return
    show(found)
    print(f"\n{launch[found.best.title]}")


def show(found: Comparison) -> None:
    """Print the fastest layouts, then where the models of the best lie, its phases, and notes."""
    fitting = [layout for layout in found.layouts if layout.fits]
    listed = fitting[:SHOWN] + [x for x in fitting[SHOWN:] if x is found.best]
    listed += [x for x in found.layouts if x.title.startswith("colocated") and x not in listed]
    print(found.title)
    table(["layout", "fits", "GiB to train", "GiB to sample", "seconds of a step", "idle"], [*map(_row, listed)])
    best = found.best
    print(f"\n{best.title}")
    places = [[part, where, how, number(gib)] for part, where, how, gib in best.places()]
    table(["what", "devices", "how", "GiB of each"], places)
    print()
    names = dict.fromkeys([*best.memory, *(name for name, seconds in best.seconds.items() if seconds)])
    cells = [[name, _gib(best.memory.get(name)), number(best.seconds.get(name, 0.0))] for name in names]
    table(["phase", "GiB to train", "seconds"], cells)
    print("", *(f"- {note}" for note in found.notes), sep="\n")


def command(layout: Layout, typed: list[str]) -> str:
    """Return the command line that trains in a layout."""
    numbers = ",".join(map(str, range(layout.trainers)))
    before = f"CUDA_VISIBLE_DEVICES={numbers} " if layout.servers else ""
    return before + shlex.join(["hf-rlhf", "train", *typed, *layout.words])


def number(x: float) -> str:
    """Return three digits of a number."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _gib(parts: dict[str, float] | None) -> str:
    return number(sum(parts.values())) if parts else ""


def _row(layout: Layout) -> list[str]:
    idle = ", ".join(f"{name} {share:.0%}" for name, share in layout.timing.idle.items())
    numbers = [number(layout.peak), _gib(layout.engine), number(layout.timing.step)]
    return [layout.title, "yes" if layout.fits else "no", *numbers, idle]
