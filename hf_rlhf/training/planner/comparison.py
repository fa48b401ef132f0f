"""Compare the layouts of a recipe on several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hf_rlhf.config.recipe import OfflineRecipe, Recipe
from hf_rlhf.runtime.errors import UserError, did_you_mean
from hf_rlhf.training.planner.devices import DEVICES, Constants
from hf_rlhf.training.planner.layouts import Layout, Planner
from hf_rlhf.training.planner.measured import Measured, measure
from hf_rlhf.training.recipe_checks import checked


@dataclass(frozen=True)
class Comparison:
    """Layouts, the fastest first and those without room last, the best one that hf_rlhf has, and what they rest on."""

    title: str
    layouts: list[Layout]
    best: Layout
    notes: list[str]


def compare(
    read: Callable[[list[str]], Recipe], gpus: int, kind: str, gib: float | None, folders: Sequence[str]
) -> Comparison:
    """Compare layouts of the recipe that `read` returns for further overrides, on `gpus` devices of a kind with `gib` GiB each.

    `folders`: runs to whose seconds constants are fitted. Raises `UserError` where the recipe is refused, or nothing fits.
    """
    if kind not in DEVICES:
        raise UserError(f"--gpu must be one of {', '.join(DEVICES)}, got {kind!r}.{did_you_mean(kind, DEVICES)}")
    device, name = DEVICES[kind], "cpu" if kind == "cpu" else "cuda"
    gib = gib or device.memory
    recipe = read([])
    found = measure(folders, device, name) if folders else Measured(Constants(device, {}), 0.0, None)
    notes = list(_assumptions(recipe, kind, found, folders))
    layouts: list[Layout] = []
    for words, separate in _ways(recipe, gpus, kind):
        try:
            chosen = read(words)
            args = chosen.training_arguments()
            checked(chosen, args)
            planner = Planner(chosen, args, words, *found, gpus=gpus, gib=gib, device=name)
            layouts += planner.separate() if separate else planner.colocated()
        except UserError as error:
            if not words:
                raise
            notes.append(f"without {' '.join(words)}: {str(error).splitlines()[-1].strip(' -')}")
            continue
        notes += [note for note in planner.notes if note not in notes]
    layouts.sort(key=lambda x: (not x.fits, x.timing.step))
    best = next((x for x in layouts if x.fits and x.runs), None)
    if best is None:
        least = min((x for x in layouts if x.runs), key=lambda x: x.peak, default=None)
        why = (
            notes[-1]
            if least is None
            else f"{least.title} takes {least.peak:,.1f} GiB of each, of which a tenth is kept free"
        )
        raise UserError(
            f"{recipe.name} fits no layout on {gpus} x {kind} of {gib:g} GiB: {why}. docs/hardware.md says what needs less"
        )
    return Comparison(f"{recipe.name} on {gpus} x {kind} of {gib:g} GiB", layouts, best, notes)


def _ways(recipe: Recipe, gpus: int, kind: str) -> Iterator[tuple[list[str], bool]]:
    """Yield overrides, and whether completions are sampled on devices of their own."""
    if isinstance(recipe, OfflineRecipe):
        yield [], False
        return
    rollout = recipe.algorithm().rollout
    yield ([] if rollout.local else ["rollout.use=generate"]), False
    if not rollout.local:
        yield [], True
    elif rollout.name == "generate" and gpus > 1 and kind != "cpu":
        yield ["rollout.use=vllm"], True


def _assumptions(recipe: Recipe, kind: str, found: Measured, folders: Sequence[str]) -> Iterator[str]:
    if kind == "cpu" and folders:
        yield f"seconds: fitted to {', '.join(folders)}"
    elif folders:
        yield f"seconds: fitted to {', '.join(folders)}; those of vLLM and between devices are arithmetic, not measured"
    else:
        yield "seconds and memory are arithmetic on data sheets and shapes; nothing was measured. --measured RUN fits them"
    if isinstance(recipe, OfflineRecipe):
        return
    if found.mean is None:
        yield "every completion is as long as it may become, so that shorter ones take less"
    if not folders and any("reward_model" not in source.provides for source in recipe.algorithm().rewards):
        yield "rewards that run no model on the devices take 0.1 ms of each completion"
    if any(getattr(plugin, "device", None) not in (None, "auto") for _, plugin in recipe.algorithm().plugins()):
        yield "models with a device of their own are left out"
    yield "layouts that sample ahead of the policy are there to compare: hf_rlhf samples with the newest weights"
