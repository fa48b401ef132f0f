"""Writes the pages of docs/ that are made from the code; with `--check` writes nothing and exits 1 where one is stale."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for commands.py and proofs.py, where this file is imported and not run
import commands
import proofs

from hf_rlhf.axes import AXES, LISTS, NESTED
from hf_rlhf.config.offline_sections import OfflineDataset
from hf_rlhf.config.pipeline import is_pipeline, load_pipeline
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.config.recipe_yaml import DEFAULTS as AXIS_DEFAULTS
from hf_rlhf.config.recipe_yaml import OFFLINE
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.contract.model_settings import Lora
from hf_rlhf.metrics import declared_by
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.registry.settings_schema import default_text, describe, nested, plain_text, setting_types, settings_of

DOCS = Path(__file__).parent
PACKAGE = "hf_rlhf"
MADE = "<!-- Made by `python docs/generate.py`. Change the code, not this page. -->"

MEANING: dict[str, str] = {
    "output_dir": "On the command line it is `--output-dir`, or `outputs/RECIPE`; one in a recipe is an error.",
    "per_device_train_batch_size": "Most rows of a micro-batch on a process, in the update and in forwards without "
    "gradient. It does not change the result. `update.max_tokens_per_micro_batch` bounds it further.",
    "max_steps": "Optimizer steps. A rollout feeds `update.mini_batches` x `update.epochs` of them.",
    "num_train_epochs": "Passes over the prompts, each of rows // `rollout.prompts` whole rollouts (at least one). The "
    "rest of the prompts is not lost: the next pass begins with it. Prompts that a resampling filter draws do not count.",
    "learning_rate": "Of the policy; of the critic too unless `critic.learning_rate` is set.",
    "lr_scheduler_type": "Its steps are optimizer steps. It scales the critic's learning rate as well.",
    "warmup_steps": "Optimizer steps in which the learning rate rises; below 1 a share of all steps. The critic's own "
    "`warmup_steps`, in which only it learns, are another thing.",
    "optim": "Used while `optimizer.use` is `trainer`; it gets the critic in parameter groups of its own.",
    "weight_decay": "Of policy and critic, by Trainer's rule which parameters decay.",
    "max_grad_norm": "Policy and critic are clipped each by its own norm. 0 turns clipping off.",
    "bf16": "Autocast, the same in rollout, forwards without gradient and update; the weights keep `model.dtype`.",
    "gradient_checkpointing": "As in Trainer; for the policy. A separate critic keeps its activations.",
    "activation_checkpointing": "As in Trainer; for the policy. A separate critic keeps its activations.",
    "torch_empty_cache_steps": "Optimizer steps; the cache is emptied after each of that step's micro-batches.",
    "seed": "Of rollouts, evaluation, mini-batches and a critic's new weights; of the order of prompts without "
    "`data_seed`. A checkpoint resumes under its own seed only.",
    "data_seed": "Of the order of prompts.",
    "logging_steps": "Optimizer steps. What lies between two entries is averaged; `health/` counts are summed.",
    "report_to": "`metrics.jsonl` and `completions/` are written besides, whatever it says. `wandb` without an account "
    "logs offline. A tracker that fails is dropped with a warning.",
    "run_name": "On the command line the recipe's name when left out.",
    "eval_strategy": "Evaluation rolls out the held-out prompts as `evaluation` says. `hf-rlhf train` evaluates before "
    "and after training in any case.",
    "metric_for_best_model": "Any metric of the evaluation, for instance `accuracy` or `reward/total/mean`.",
    "load_best_model_at_end": "Loads the policy of the best checkpoint; the critic stays as it is.",
    "save_only_model": "Such a checkpoint holds no optimizer and cannot be resumed.",
    "save_total_limit": "Older checkpoints are deleted after the new one is whole.",
    "hub_token": "`hf-rlhf train` refuses it, since it would be written into the run's record: set HF_TOKEN.",
    "ddp_find_unused_parameters": "False when left out: every parameter takes part in every backward.",
    "disable_tqdm": "True on the command line, which has a display of its own.",
}
"""Honoured arguments whose meaning here needs a sentence."""

AS_IN_TRAINER = """
lr_scheduler_kwargs optim_args adam_beta1 adam_beta2 adam_epsilon optim_target_modules tf32
activation_checkpointing_kwargs gradient_checkpointing_kwargs logging_strategy logging_first_step log_on_each_node
log_level log_level_replica project trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps eval_delay
eval_on_start save_strategy save_steps save_on_each_node push_to_hub hub_private_repo hub_model_id hub_strategy
hub_always_push hub_revision greater_is_better restore_callback_states_from_checkpoint full_determinism use_cpu
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout skip_memory_metrics local_rank
"""
"""Arguments that mean what Trainer's own documentation says, separated by white space."""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""
    lines = [list(header), ["---" for _ in header], *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def settings_table(cls: type) -> str:
    """Setting, type, default and meaning of a plugin or a section."""
    rows = [[code(s.name), s.type, code(s.default), s.doc] for s in describe(cls)]
    return table(["setting", "type", "default", "meaning"], rows) if rows else "No settings."


def own_host() -> Host:
    """A host on which nothing is turned off."""
    return Host(disable="")


def plugins_page() -> Iterator[str]:
    """One entry per plugin of this package, by axis."""
    host = own_host()
    yield "# Plugins\n\n" + MADE
    yield (
        "Every plugin of this package, axis by axis in the order of a step. `hf-rlhf show AXIS NAME` prints one entry, "
        "`hf-rlhf show AXIS` a complete example for an axis, `hf-rlhf plugins` what is installed, other packages' plugins "
        "included. The letters of shapes (N, B, T, G) are those of [hf_rlhf/batch.py](../hf_rlhf/batch.py)."
    )
    for axis in AXES:
        summary = (getattr(hookspecs, axis).__doc__ or "").partition("\n")[0]
        default = AXIS_DEFAULTS.get(axis)
        left_out = "" if default is None or axis in LISTS else f" Left out, it is `{default}`."
        place = f"A recipe has {'any number' if axis in LISTS else 'one'}."
        if axis in NESTED:
            place, left_out = inside(host, axis)
        if axis == OFFLINE:
            place = "See [reward_models.md](reward_models.md)."
        if axis == "reference":
            left_out = " Left out, it is `none` where no KL is measured, `adapter_off` with LoRA, else `frozen`."
        yield f"## {axis}\n\n{summary} {place}{left_out}"
        for offer in host.offers(axis):
            if offer.package == PACKAGE:
                yield from plugin_entry(host, axis, offer.name)


def inside(host: Host, axis: str) -> tuple[str, str]:
    """Of an axis whose plugins stand inside others: where, and which is meant there by leaving it out."""
    places: dict[str, str] = {}
    for offer in host.offers():
        if offer.package == PACKAGE and not offer.problem:
            cls = host.get(offer.axis, f"{PACKAGE}/{offer.name}")
            for setting in settings_of(cls):
                held = nested(setting_types(cls)[setting.name])
                if held and held.axis == axis and not held.many:
                    places[f"{offer.axis}.{offer.name}"] = setting.metadata.get("use", "")
    named: dict[str, list[str]] = {}
    for place, default in places.items():
        named.setdefault(default, []).append(code(place))
    if list(named) == [""]:
        left_out = " It cannot be left out."
    elif len(named) == 1:
        left_out = f" Left out, it is `{next(iter(named))}`."
    else:
        said = [f"{code(default)} in {', '.join(where)}" for default, where in named.items() if default]
        left_out = f" Left out, it is {'; '.join(said)}."
    return f"One stands inside {', '.join(map(code, places))}.", left_out


def plugin_entry(host: Host, axis: str, name: str) -> Iterator[str]:
    """What a plugin computes, its paper, what it needs, its settings and its file."""
    cls = host.get(axis, name)
    offer = host.find(axis, name)
    yield f"### {axis}.{name}\n\n{inspect.getdoc(cls)}"
    yield inspect.getdoc(sys.modules[cls.__module__]) or ""
    said = [
        f"{title}: {', '.join(code(x) for x in sorted(names))}."
        if isinstance(names, frozenset)
        else f"{title}: {names}"
        for title, names in (("Needs", _names(cls, "needs")), ("Provides", _names(cls, "provides")))
        if names
    ]
    if said:
        yield " ".join(said)
    yield settings_table(cls)
    if cls.metrics:
        logged = [[code(each), metric.unit, metric.meaning] for each, metric in declared_by(cls, axis).items()]
        yield table(["metric", "unit", "meaning"], logged)
    file = offer.module.replace("hf_rlhf_plugins", "plugins").replace(".", "/") + ".py"
    yield f"From package `{offer.package}`, module `{offer.module}`: [{file}](../{file})."


def _names(cls: type, attribute: str) -> frozenset[str] | str:
    """What a plugin needs or provides; where that depends on its settings, in the words of the property."""
    names: Any = getattr(cls, attribute)
    return " ".join((names.__doc__ or "").split()) if isinstance(names, property) else names


def proofs_page() -> Iterator[str]:
    """Every plugin of this package with the tests that prove it."""
    yield "# Proofs\n\n" + MADE
    yield (
        "Every plugin of this package with the tests that show that it computes what it says, how, and how exactly. A test "
        "says so itself, by `@pytest.mark.proves`; a plugin without one fails the suite. Besides, every plugin passes the "
        "[conformance kit](writing_plugins.md#the-conformance-kit), runs the same however its rows are split and on two "
        "processes, and resumes with equal bits (`tests/contract/test_conformance.py`, `tests/contract/test_every_plugin.py`)."
    )
    yield table(["how", "means"], [[how, f"{means[0].upper()}{means[1:]}."] for how, means in proofs.HOW.items()])
    found = proofs.read(DOCS.parent / "tests")
    for axis in AXES:
        rows = [
            [code(offer.name), f"[{proof.file}](../tests/{proof.file}): {code(proof.test)}", proof.how, proof.tolerance]
            for offer in own_host().offers(axis)
            if offer.package == PACKAGE
            for proof in found
            if proof.plugin == f"{axis}.{offer.name}"
        ]
        yield f"## {axis}\n\n" + table(["plugin", "test", "how", "tolerance"], rows)


def recipes_page() -> Iterator[str]:
    """One entry per recipe of this package."""
    from hf_rlhf.config.plan import make_plan
    from hf_rlhf.config.training_arguments import DEFAULTS

    host = own_host()
    yield "# Recipes\n\n" + MADE
    yield (
        "`hf-rlhf train NAME --model ... --dataset ...` runs one, `hf-rlhf check NAME` prints its whole plan with the "
        "batch arithmetic, `hf-rlhf recipes show NAME > mine.yaml` begins one of your own. The plans below are for one "
        "process."
    )
    with use_host(host):
        for offer in host.recipes():
            if offer.package != PACKAGE:
                continue
            text = offer.file.read_text(encoding="utf-8")
            lines = text.splitlines()
            comment = [line.lstrip("# ") for line in lines if line.startswith("#")]
            if is_pipeline(offer.name):
                yield f"## {offer.name}\n\n" + "\n".join(comment)
                stages = (
                    f"`{stage.name}` ([{stage.source}](#{stage.source}))" for stage in load_pipeline(offer.name).stages
                )
                yield f"**Stages.** {', '.join(stages)}: [pipelines.md](pipelines.md)."
                yield from recipe_text(offer.file.name, lines)
                continue
            recipe = load_recipe(offer.name)
            if isinstance(recipe, OfflineRecipe):
                yield f"## {offer.name}\n\n" + "\n".join(comment)
                yield f"**Trainer.** `{recipe.trainer().name}`: [plugins.md](plugins.md#trainer{recipe.trainer().name})."
                yield from recipe_text(offer.file.name, lines)
                continue
            algorithm = recipe.algorithm()
            rows = {**DEFAULTS, **recipe.training}["per_device_train_batch_size"]
            plan = make_plan(algorithm, [], rows_per_micro_batch=rows)
            yield f"## {offer.name}\n\n" + "\n".join(comment)
            chosen = ", ".join(f"`{path}={plugin.name}`" for path, plugin in algorithm.plugins())
            yield f"**Plugins.** {chosen}."
            for title, said in (
                ("Models", plan.models),
                ("Forward passes per rollout", plan.forwards),
                ("Skipped", plan.skipped),
                ("Remarks", plan.remarks),
            ):
                if said:
                    yield f"**{title}.**\n\n" + "\n".join(f"- {line}" for line in said)
            yield from recipe_text(offer.file.name, lines)


def recipe_text(file: str, lines: list[str]) -> Iterator[str]:
    """A recipe as it is written, without its comment."""
    yield "```yaml\n" + "\n".join(line for line in lines if not line.startswith("#")) + "\n```"
    yield f"File: [recipes/{file}](../recipes/{file})."


def arguments_page() -> Iterator[str]:
    """Every field of TrainingArguments under honoured, forced, refused or without effect."""
    from transformers import TrainingArguments

    from hf_rlhf.config.training_arguments import DEFAULTS, FORCED, OFFLINE_REFUSED, REFUSED, WITHOUT_EFFECT

    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    as_in_trainer = AS_IN_TRAINER.split()
    parts = [MEANING, as_in_trainer, FORCED, REFUSED, WITHOUT_EFFECT]
    placed = [name for part in parts for name in part]
    wrong = [name for name in [*fields, *placed] if placed.count(name) != 1 or name not in fields]
    if wrong:
        raise SystemExit(
            f"not in exactly one list of docs/generate.py and hf_rlhf/config/training_arguments.py: {', '.join(wrong)}"
        )

    def rows(part: dict[str, str]) -> list[list[str]]:
        return [[code(name), code(default_text(fields[name])), part[name]] for name in fields if name in part]

    yield "# TrainingArguments\n\n" + MADE
    yield (
        "A recipe's `training` holds keywords of `transformers.TrainingArguments`, and each is a flag of the command line "
        "(`--learning_rate 1e-6`). Below every field stands in exactly one table. Refused fields end the run before a model "
        "is loaded, unless they have their default."
    )
    yield "## Honoured, with something to know\n\n" + table(["argument", "default", "here"], rows(MEANING))
    kept = ", ".join(f"`{name}` ({code(default_text(fields[name]))})" for name in fields if name in as_in_trainer)
    yield f"## Honoured as in Trainer\n\nWith their defaults: {kept}."
    forced = [[code(name), code(plain_text(value)), why] for name, (value, why) in FORCED.items()]
    yield "## Forced\n\n" + table(["argument", "set to", "why"], forced)
    yield "## Refused\n\n" + table(["argument", "default", "why, and what to do"], rows(REFUSED))
    yield "## Without effect\n\nNothing reads these here; setting one changes nothing.\n\n" + table(
        ["argument", "default", "why"], rows(WITHOUT_EFFECT)
    )
    started = [[code(name), code(plain_text(value))] for name, value in DEFAULTS.items()]
    yield (
        "## Defaults\n\n`hf-rlhf train` and `recipe.training_arguments(output_dir, **own)` start from these where "
        "TrainingArguments would choose otherwise; a recipe's `training`, flags and `own` come after them. `RLHFTrainer` "
        "without `args` uses them too. TrainingArguments that are passed to it are taken verbatim, and one remark lists "
        "where they differ from the recipe's.\n\n" + table(["argument", "default"], started)
    )
    yield (
        "More than one GPU in one process is refused, as it would mean `nn.DataParallel`: start one process per GPU. "
        "Custom `optimizers=(optimizer, scheduler)` are passed to Trainer."
    )
    yield (
        "## Recipes without rollouts\n\nA recipe with a `trainer` hands its `training` to Trainer, and everything is as there "
        "but for this. `logging_nan_inf_filter` is off. Refused, unless they have their default:\n\n"
        + table(["argument", "why, and what to do"], [[code(name), why] for name, why in OFFLINE_REFUSED.items()])
    )


def settings_page() -> Iterator[str]:
    """Sections of a recipe."""
    yield "# Settings\n\n" + MADE
    yield (
        "A recipe is one flat YAML file. Its keys are the axes of [plugins.md](plugins.md), the sections below, and "
        "`training`, which is handed to TrainingArguments ([training_arguments.md](training_arguments.md)). An unknown key "
        "is an error that names what is near it. YAML is read strictly: no anchors, no tags, no key twice; `1e-6` is a "
        "number. Overrides, flags, and what wins over what: [commands.md](commands.md)."
    )
    for name, cls in SECTIONS.items():
        yield f"## {name}\n\n{inspect.getdoc(cls)}\n\n{settings_table(cls)}"
    yield f"### model.lora\n\n{inspect.getdoc(Lora)} Needs `hf_rlhf[peft]`.\n\n{settings_table(Lora)}"
    yield (
        "### Without rollouts\n\nA recipe with a `trainer` has `trainer`, `model`, `dataset` and `training`, and its `dataset` "
        f"is another. {inspect.getdoc(OfflineDataset)}\n\n{settings_table(OfflineDataset)}"
    )


def commands_page() -> Iterator[str]:
    """Every command, what wins over what, flags, environment variables, exit codes."""
    yield from commands.commands_page(MADE, table)


def metrics_page() -> Iterator[str]:
    """Every metric that is logged."""
    from metrics_page import metrics_page as below_the_title

    yield "# Metrics\n\n" + MADE
    yield from below_the_title(table, own_host(), PACKAGE)


def hooks_page() -> Iterator[str]:
    """Every hook, and every field of what plugins see."""
    from pages_hooks import hooks_page as below_the_title

    yield "# Hooks\n\n" + MADE
    yield from below_the_title(table)


def dashboard_page() -> Iterator[str]:
    """Every metric with what an unhealthy value means."""
    from pages_dashboard import dashboard_page as below_the_title

    yield "# Reading the dashboard\n\n" + MADE
    yield from below_the_title(table, own_host(), PACKAGE)


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "metrics.md": metrics_page,
    "plugins.md": plugins_page,
    "recipes.md": recipes_page,
    "training_arguments.md": arguments_page,
    "settings.md": settings_page,
    "commands.md": commands_page,
    "proofs.md": proofs_page,
    "hooks.md": hooks_page,
    "guides/reading_the_dashboard.md": dashboard_page,
}


def pages() -> dict[str, str]:
    """File name -> text of each page, as the code has it now."""
    return {name: "\n\n".join(page()).rstrip() + "\n" for name, page in PAGES.items()}


def main() -> int:
    """Writes the pages, or names the stale ones."""
    made = pages()
    stale = [
        name
        for name, text in made.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"docs/{name} is stale: run `python docs/generate.py`", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(made[name], encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
