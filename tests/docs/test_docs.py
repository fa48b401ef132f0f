"""The documentation is true: made pages are up to date, examples run, names that are logged are explained, links lead
somewhere."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_rlhf.axes import AXES, LISTS
from hf_rlhf.config.training_arguments import WITHOUT_EFFECT
from hf_rlhf.registry.host import Host, use_host
from hf_rlhf.testing import tiny_policy
from tests.helpers.documentation import generate, shown
from tests.helpers.paths import ROOT
from tests.helpers.runs import SAMPLED, parameters, problems, trained

PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md", "SECURITY.md")),
]
BY_HAND = ("commands.md", "data.md", "reward_models.md", "vllm.md", "vllm_placement.md", "writing_plugins.md")
WRITTEN_BY_HAND = [ROOT / "README.md", *(ROOT / "docs" / name for name in BY_HAND)]
TITLES = [page.name for page in WRITTEN_BY_HAND]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", shown(page), re.MULTILINE | re.DOTALL)


def first_columns(page: Path, heading: str = "") -> Iterator[str]:
    """What stands in backticks in the first column of the tables under a heading."""
    text = shown(page)
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else text
    assert section, f"{page.name} has no heading {heading!r}"
    for row in re.findall(r"^\| (`.*)$", section, re.MULTILINE):
        yield from re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", row)[0])


# Made pages


def test_made_parts_of_pages_are_up_to_date():
    stale = [page.name for page in generate.stale()]
    assert not stale, f"stale: {', '.join(stale)}; run `python docs/generate.py`"


PARTED = """# Page
<!-- made: commands.exit_codes -->
old
<!-- end -->
<!-- site: hooks.methods -->
`help(Plugin)` prints them.
<!-- end -->
Words.
"""


def test_generate_says_which_page_is_stale(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text(PARTED)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main(tmp_path) == 1
    assert "docs/page.md is stale" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == PARTED, "--check writes nothing"
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main(tmp_path) == 0
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main(tmp_path) == 0


def test_the_page_keeps_one_kind_of_part_and_the_site_shows_both(tmp_path):
    kept, site = generate.filled(PARTED), generate.filled(PARTED, site=True)
    assert "| code | meaning |" in kept
    assert "`help(Plugin)` prints them." in kept
    assert "old" not in kept
    assert "| code | meaning |" in site
    assert "| method | what it does |" in site
    assert "help(Plugin)" not in site
    assert "<!--" not in site
    assert kept.endswith("Words.\n")


def test_every_plugin_and_recipe_has_a_line_on_a_forge_and_an_entry_on_the_site():
    host = Host(disable="")
    plugins = [offer for offer in host.offers() if offer.package == "hf_rlhf"]
    recipes = [offer.name for offer in host.recipes() if offer.package == "hf_rlhf"]
    page = ROOT / "docs" / "plugins.md"
    text = page.read_text()
    listed = {axis: re.findall(r"^\| \[`(\w+)`\]", _section(text, axis), re.MULTILINE) for axis in AXES}
    assert listed == {axis: [offer.name for offer in plugins if offer.axis == axis] for axis in AXES}
    for axis in AXES:
        assert ("A recipe has any number." in _section(text, axis)) == (axis in LISTS)
    headings = re.findall(r"^### (\S+)$", shown(page), re.MULTILINE)
    assert headings == [f"{axis}.{offer.name}" for axis in AXES for offer in plugins if offer.axis == axis]
    page = ROOT / "docs" / "recipes.md"
    rows = re.findall(r"^\| (`[^|]*) \|", page.read_text(), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row)) == sorted(recipes)
    assert sorted(re.findall(r"^### (\S+)$", shown(page), re.MULTILINE)) == sorted(recipes)


def _section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_training_argument_stands_in_one_table():
    from dataclasses import fields

    from transformers import TrainingArguments

    text = shown(ROOT / "docs" / "training_arguments.md").partition("## Defaults\n")[0]
    for field in fields(TrainingArguments):
        places = len(re.findall(rf"^\| `{field.name}` \||(?:: |, )`{field.name}` \(`", text, re.MULTILINE))
        assert places == 1, f"{field.name} stands in {places} tables"


def test_arguments_listed_without_effect_change_no_number(tmp_path):
    odd: dict[str, Any] = {
        "per_device_eval_batch_size": 3,
        "prediction_loss_only": True,
        "eval_do_concat_batches": False,
        "eval_use_gather_object": True,
        "eval_accumulation_steps": 1,
        "label_names": ["answer"],
        "dataloader_drop_last": True,
        "dataloader_num_workers": 2,
        "dataloader_pin_memory": False,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "spawn",
        "dataloader_in_order": False,
        "length_column_name": "answer",
        "accelerator_config": {"split_batches": True, "even_batches": False},
        "use_cache": True,
        "liger_kernel_config": {"rope": False},
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "resume_from_checkpoint": "nowhere",
    }
    elsewhere = {"torch_compile_backend", "torch_compile_mode"}  # they come with what is refused
    assert odd.keys() | elsewhere == WITHOUT_EFFECT.keys()
    options: dict[str, Any] = {"rollout": SAMPLED, "eval_data": problems(4, seed=1)}
    plain = trained(tmp_path / "plain", training={"eval_strategy": "steps", "eval_steps": 1}, **options)
    other = trained(tmp_path / "odd", training={"eval_strategy": "steps", "eval_steps": 1, **odd}, **options)
    assert torch.equal(parameters(plain), parameters(other))
    for a, b in zip(plain.state.log_history, other.state.log_history, strict=True):
        names = {name for name in a if not re.search(r"time|^memory/|_s$|per_second|runtime", name)}
        assert {name: a[name] for name in names} == {name: b.get(name) for name in names}


# Examples


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the examples name: problems, a run that was made before, and every file that a page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        rows = [{"question": f"What is {i} + 1?", "answer": f"One more. #### {i + 1}"} for i in range(200)]
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(200)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    graded = [{**row, "completion": f"It is {i}.", "is_correct": i % 2 == 0} for i, row in enumerate(rows[:8])]
    graded = [{**row, "answer": str(i + i % 2)} for i, row in enumerate(graded)]
    (tmp_path / "graded.jsonl").write_text("\n".join(map(json.dumps, graded)))
    from hf_rlhf.config.recipe import load_recipe

    (tmp_path / "my_judges.yaml").write_text(load_recipe("grpo").dump())
    (tmp_path / "outputs" / "gsm8k").mkdir(parents=True)
    (tmp_path / "outputs" / "gsm8k" / "recipe.yaml").write_text(load_recipe("grpo").dump())
    for page in WRITTEN_BY_HAND:
        for text in blocks(page, "python"):
            if file := re.match(r"# (\w+\.py)\n", text):
                (tmp_path / file[1]).write_text(text)
    return tmp_path


def command_lines(page: Path) -> list[list[str]]:
    """The words after `hf-rlhf` of every command in a page's shell blocks, whatever launches it."""
    found = []
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            start = [i for i, word in enumerate(words) if word in ("hf-rlhf", "hf_rlhf")]
            if start:
                found.append(words[start[0] + 1 :])
            elif words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
            else:
                assert shlex.join(words) in PYTEST_LINES, f"no test runs {line!r}"
    return found


PYTEST_LINES = ["pytest --hf-rlhf-plugin ./group_median.py", "pytest --hf-rlhf-plugin ./brief.py"]
"""Commands of writing_plugins.md and the README that `test_the_plugin_example_conforms` runs."""


def without_training(words: list[str]) -> list[str]:
    """`check` in place of `train`, without the options that only `train` has and without data that is not here."""
    kept: list[str] = []
    rest = iter(["check", *words[1:]])
    for word in rest:
        if word in ("--output-dir", "--dataset"):
            value = next(rest)
            kept += [word, value] if word == "--dataset" and Path(value).exists() else []
        elif word not in ("--resume", "--trust-remote-code"):
            kept.append(word)
    return kept


def brief(words: list[str]) -> list[str]:
    """A command that ends soon: what trains is checked, and what a server would serve is checked too."""
    if words[0] == "train":
        return without_training(words)
    if words[0] in (
        "evaluate",
        "chat",
        "play",
        "plan",
        "serve-engine",
    ):  # tests/cli/test_evaluate.py, _chat.py and _play.py run them
        return [*words, "--help"]
    return ["check", words[1]] if words[0] in ("serve-reward", "pipeline") else words


@pytest.mark.parametrize("page", WRITTEN_BY_HAND, ids=TITLES)
def test_every_command_of_a_page_runs_or_passes_the_check(page, workplace):
    from hf_rlhf.cli.app import app
    from hf_rlhf.cli.main import add_commands

    add_commands()
    lines = command_lines(page)
    assert lines
    for words in lines:
        target = words[words.index(">") + 1] if ">" in words else None
        words = words[: words.index(">")] if target else words
        with use_host(Host()):
            result = CliRunner().invoke(app, brief(words))
        assert result.exit_code == 0, f"hf-rlhf {shlex.join(words)}: {result.exception} {result.output}"
        if target:
            Path(target).write_text(result.stdout)


def test_the_versions_that_go_together_are_those_that_are_installed_and_those_of_the_makefile():
    from hf_rlhf_plugins.rollout._vllm_checks import TRIED

    page = (ROOT / "docs" / "vllm_placement.md").read_text()
    training = dict(re.findall(r"^\| training \| (\S+) \| (\S+) \|", page, re.MULTILINE))
    assert training == {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
    ((vllm, tried),) = re.findall(r"^\| server, on a CPU \| (vllm\S*) \| (\S+) \|", page, re.MULTILINE)
    assert f"\nVLLM := {vllm}=={tried}\n" in (ROOT / "Makefile").read_text()
    assert tried.startswith(f"{TRIED}.")


def test_the_python_example_of_the_readme_runs(workplace, capsys):
    (text,) = [block for block in blocks(ROOT / "README.md", "python") if not block.startswith("# ")]
    assert len(text.splitlines()) <= 10
    model, tokenizer = tiny_policy()
    model.save_pretrained(workplace / "tiny")
    tokenizer.save_pretrained(workplace / "tiny")
    small = {"builtin:addition": "tiny", "max_steps=100": "max_steps=2", "problems[:500]": "problems[:20]"}
    for what, instead in small.items():
        assert what in text
        text = text.replace(what, instead)
    exec(compile(text, "README.md", "exec"), {})
    assert "eval_accuracy" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(workplace / "outputs" / "python")


def test_the_plugin_example_conforms(workplace):
    files = {re.match(r"# (\w+\.py)\n", text): text for text in blocks(ROOT / "docs" / "writing_plugins.md", "python")}
    assert all(files), "every Python block of writing_plugins.md names its file"
    plain = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
    assert pytest.main([*plain, str(workplace / "test_group_median.py")]) == 0
    for line in PYTEST_LINES:
        with use_host(Host(disable="")):
            assert pytest.main([*plain, *shlex.split(line)[1:]]) == 0


def test_the_page_for_authors_explains_every_axis_and_every_need():
    from hf_rlhf.config.algorithm import CORE_PROVIDES, FIXES

    page = ROOT / "docs" / "writing_plugins.md"
    rows = re.findall(r"^\| (\w+), `(\w+)` \|", page.read_text(), re.MULTILINE)
    bases = {axis: {base.__name__, *(cls.__name__ for cls in base.__subclasses__())} for axis, base in AXES.items()}
    assert [axis for axis, _ in rows] == list(AXES)
    assert all(base in bases[axis] for axis, base in rows)
    assert set(first_columns(page, "needs and provides")) == CORE_PROVIDES | FIXES.keys()


def test_the_packaging_example_is_that_of_the_example_package():
    import tomllib

    (text,) = blocks(ROOT / "docs" / "writing_plugins.md", "toml")
    shown = tomllib.loads(text)["project"]["entry-points"]
    real = tomllib.loads((ROOT / "examples" / "hf-rlhf-quantile" / "pyproject.toml").read_text())["project"]
    assert shown.keys() == real["entry-points"].keys()
    assert {name.split(".")[0] for name in shown["hf_rlhf"]} <= set(AXES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text() + shown(page)
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", shown(file), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_hook_stands_on_its_page_with_its_example():
    from hf_rlhf.registry.hookspecs import example

    page = ROOT / "docs" / "hooks.md"
    assert re.findall(r"^## (\w+)$", shown(page), re.MULTILINE) == list(AXES)
    assert [text.strip() for text in blocks(page, "python")] == [example(axis).strip() for axis in AXES]


def test_every_method_of_a_base_class_stands_on_the_page_of_hooks():
    from hf_rlhf.contract.base import Plugin

    page = ROOT / "docs" / "hooks.md"
    for heading, cls in {"Every plugin": Plugin, **AXES}.items():
        own = [name for name, value in vars(cls).items() if inspect.isfunction(value) and not name.startswith("_")]
        if own:
            assert {name.partition("(")[0] for name in first_columns(page, heading)} >= set(own)


@pytest.mark.parametrize(
    "name", ["Prompt", "Completions", "Spans", "TokenScores", "Rollouts", "Scored", "Credit", "Context"]
)
def test_every_field_that_plugins_see_stands_on_the_page_of_hooks(name):
    from hf_rlhf import batch

    text = shown(ROOT / "docs" / "hooks.md").partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    documented = re.findall(r"^\| `(\w+)` \| \S", text, re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(getattr(batch, name))]


def test_the_page_of_hooks_leaves_out_nothing_that_plugins_see():
    from hf_rlhf import batch

    own = {name for name, x in vars(batch).items() if dataclasses.is_dataclass(x) and x.__module__ == batch.__name__}
    assert own == set(re.findall(r"^### (\w+)$", shown(ROOT / "docs" / "hooks.md"), re.MULTILINE))


def test_every_setting_of_a_section_stands_on_the_page_of_settings():
    from hf_rlhf.config.offline_sections import OfflineDataset
    from hf_rlhf.config.sections import SECTIONS
    from hf_rlhf.contract.model_settings import Lora

    page = ROOT / "docs" / "settings.md"
    for section, cls in SECTIONS.items():
        assert {field.name for field in dataclasses.fields(cls)} <= set(first_columns(page, section))
    for cls in (Lora, OfflineDataset):
        assert {field.name for field in dataclasses.fields(cls)} <= set(first_columns(page))


@pytest.mark.parametrize("page", ["metrics.md", "guides/reading_the_dashboard.md"])
def test_every_metric_stands_on_both_pages_of_metrics(page):
    from hf_rlhf.metrics import CORE, EVAL, EVALUATION, declared_by, pattern

    host = Host(disable="")
    known = {metric.name for metric in CORE} | {f"{EVAL}{metric.name}" for metric in EVALUATION}
    for offer in host.offers():
        if offer.package == "hf_rlhf":
            known |= declared_by(host.get(offer.axis, f"hf_rlhf/{offer.name}"), offer.axis).keys()
    named = set(re.findall(r"`([^`\s]+)`", shown(ROOT / "docs" / page)))
    missing = {name for name in known - named if not any(pattern(name).fullmatch(other) for other in named)}
    assert not missing


def test_a_metric_with_a_range_says_what_lies_outside_of_it():
    from hf_rlhf.metrics import CORE, EVALUATION

    assert not [metric.name for metric in (*CORE, *EVALUATION) if metric.healthy and not metric.unhealthy]


def test_every_package_of_the_core_is_explained_and_every_module_that_is_named_exists():
    text = (ROOT / "docs" / "how_it_works.md").read_text().partition("## Where the code is")[2].partition("\n## ")[0]
    core = ROOT / "hf_rlhf"
    parts = {f"{file.parent.name}/" for file in core.glob("*/__init__.py")}
    parts |= {file.name for file in core.glob("*.py") if not file.name.startswith("_")}
    explained = {
        name for row in re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    assert explained == parts
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        assert name in ("plugins/", "recipes/") or list(core.rglob(name)), f"there is no {name}"


# Files of a run


def test_a_run_leaves_the_files_and_summary_keys_that_the_docs_name(workplace):
    from hf_rlhf.cli.runs.run import train
    from hf_rlhf.config.recipe import load_recipe

    model, tokenizer = tiny_policy()
    model.save_pretrained(workplace / "tiny")
    tokenizer.save_pretrained(workplace / "tiny")
    overrides = ["model.path=tiny", "training.max_steps=2", "training.save_strategy=steps", "training.save_steps=2"]
    overrides += ["reference={use: sync, every: 1}", "critic=value_head", "advantages=gae", "update.ema=0.9"]
    overrides += ["training.use_cpu=true", "evaluation.prompts=8"]
    train(load_recipe("quickstart", [*overrides, "rollout.prompts=4"]), output_dir="run")
    run, page = workplace / "run", ROOT / "docs" / "how_it_works.md"
    keys = json.loads((run / "summary.json").read_text()).keys()
    assert list(first_columns(ROOT / "docs" / "metrics.md", "summary.json")) == list(keys)
    for name in first_columns(page, "Files of a run"):
        assert list(run.glob(name.replace("-N", "-2").rstrip("/"))), f"{name} is documented and not there"
    for name in first_columns(page, "Checkpoints and exact resume"):
        assert (run / "checkpoint-2" / name.replace("RANK", "0")).is_file(), name
    import pyarrow.parquet as pq

    columns = pq.read_table(next((run / "completions").glob("*.parquet"))).column_names
    section = (ROOT / "docs" / "metrics.md").read_text().partition("## Completions")[2].partition("## ")[0]
    assert {re.sub("exact_match", "<label>", name) for name in columns} <= set(re.findall(r"`([^`]+)`", section))


QWEN = {  # hidden size, size of the MLP, layers, heads, heads of keys and values, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}


def test_forecasts_of_memory_are_those_of_the_command(tmp_path):
    from transformers import Qwen2Config

    from hf_rlhf.cli.app import app
    from hf_rlhf.cli.main import add_commands

    add_commands()
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["vocab_size", "tie_word_embeddings"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 200)
    rows = re.findall(
        r"^\| ([\d.]+B) \| (.*?) \| (\d+) \| (.*?) \|$", (ROOT / "docs" / "hardware.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 5
    for size, setting, gib, phase in rows:
        config = Qwen2Config(architectures=["Qwen2ForCausalLM"], **dict(zip(names, QWEN[size], strict=True)))
        config.save_pretrained(tmp_path / size)
        words = ["check", "grpo", "--model", str(tmp_path / size), "--dataset", str(tmp_path / "rows.jsonl")]
        done = CliRunner().invoke(app, [*words, *shlex.split(setting.strip("`").removeprefix("nothing"))])
        assert done.exit_code == 0, done.output
        assert f"about {gib} GiB per process at the peak, in {phase}" in done.output


def test_the_page_that_helps_to_choose_names_recipes():
    rows = re.findall(
        r"^\| (?!you have|---)[^|]*\|([^|]*)\|", (ROOT / "docs" / "which_recipe.md").read_text(), re.MULTILINE
    )
    named = set(re.findall(r"`([^`]+)`", "".join(rows))) - {"NAME@SYSTEM"}
    assert len(named) > 15
    assert named <= {recipe.name for recipe in Host(disable="").recipes()}
