"""The guides are true: every block runs as a reader would run it, and every name in their tables is one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_rlhf import load_recipe
from hf_rlhf.config.recipe import OfflineRecipe
from hf_rlhf.registry.host import Host, use_host
from tests.helpers.guides import GUIDES, blocks, follow
from tests.helpers.paths import ROOT
from tests.helpers.wheels import Environment, built, shared_folder

PAGES = sorted(GUIDES.glob("*.md"))
NOT_RUN = {
    "first_run": ["python3 -m venv .venv", "hf-rlhf train grpo --model Qwen/Qwen3-0.6B"],
    "first_plugin": ["pip install twine"],
}
"""Blocks that need a package index, a model from the Hub or an account, by the beginning of each."""
TRL_CONFIGS = {"GRPOConfig": "grpo", "RLOOConfig": "rloo", "DPOConfig": "dpo", "SFTConfig": "sft", "RewardConfig": "rm"}
"""Heading of from_trl.md -> the recipe whose keys stand in its table."""
EVERY_TIME = ("first_run",)
TABLES = [GUIDES / f"from_{name}.md" for name in ("trl", "verl", "openrlhf")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """hf_rlhf from its wheel, without the checkout."""
    pytest.importorskip("pip", reason="building a wheel needs pip")
    made = Environment.made(tmp_path_factory.mktemp("environment") / "venv")
    made.install(*built(shared_folder(tmp_path_factory), [ROOT]))
    return made


@pytest.mark.parametrize(
    "page",
    [page if page.stem in EVERY_TIME else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_a_guide_works_block_by_block_in_an_empty_folder(page, environment, tmp_path):
    folder = tmp_path / "reader"
    folder.mkdir()
    follow(page, environment, folder)


def test_what_no_test_runs_is_little_and_known():
    left_out = {page.stem: [b.text for b in blocks(page) if not b.runs] for page in PAGES}
    for name, texts in left_out.items():
        expected = NOT_RUN.get(name, [])
        assert len(texts) == len(expected)
        assert all(text.startswith(begin) for text, begin in zip(texts, expected, strict=True))


# Tables of settings


def rows(page: Path, heading: str = "") -> list[tuple[list[str], list[str]]]:
    """Names in the first column, and what stands in backticks in the second, of three-column tables."""
    text = page.read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else text
    found = []
    for line in re.findall(r"^\| (`.*)\|$", section, re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 3:
            found.append((re.findall(r"`([^`]+)`", cells[0]), re.findall(r"`([^`]+)`", cells[1])))
            assert cells[1] or cells[2], f"{page.name}: {cells[0]} leads nowhere and says nothing"
    return found


def resolves(override: str, recipe: str) -> str:
    """Why an override cannot stand in a recipe; empty where it can."""
    key = override.partition("=")[0]
    if key.startswith("training."):
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        return "" if key.removeprefix("training.") in known else "no field of TrainingArguments"
    try:
        loaded = load_recipe(recipe, [override])
        return "" if isinstance(loaded, OfflineRecipe) else "; ".join(loaded.algorithm().problems())
    except Exception as error:
        return str(error)


def options() -> set[str]:
    """The options and flags of `hf-rlhf train`."""
    import typer

    from hf_rlhf.cli.app import app
    from hf_rlhf.cli.flags import FLAGS
    from hf_rlhf.cli.main import add_commands

    add_commands()
    train = typer.main.get_command(app).commands["train"]
    flags = {f"--{name}" for name in FLAGS}
    return flags | {option for parameter in train.params for option in parameter.opts} | {"--resume"}


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_every_key_of_ours_in_a_table_can_be_typed_as_it_stands(page):
    known = options()
    headings = TRL_CONFIGS if page.stem == "from_trl" else {"": "grpo"}
    wrong = []
    with use_host(Host(disable="")):
        for heading, recipe in headings.items():
            found = [mine for _, theirs in rows(page, heading) for mine in theirs]
            assert len(found) >= 3, f"{page.name} has no table under {heading!r}"
            for word in found:
                if word.startswith("--"):
                    reason = "" if word in known else "no option of hf-rlhf train"
                else:
                    assert "=" in word, f"{page.name}: {word} has no value"
                    tried = [resolves(word, name) for name in (recipe, *([] if heading else ["ppo"]))]
                    reason = "" if "" in tried else " / ".join(tried)
                wrong += [f"{word}: {reason}"] if reason else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("heading", TRL_CONFIGS)
def test_every_field_of_a_config_of_trl_stands_in_its_table_once(heading):
    import trl

    def fields(name: str) -> set[str]:
        common = {field.name for field in dataclasses.fields(TrainingArguments)}
        return {field.name for field in dataclasses.fields(getattr(trl, name))} - common

    named = [name for theirs, _ in rows(GUIDES / "from_trl.md", heading) for name in theirs]
    assert len(named) == len(set(named))
    assert set(named) <= fields(heading), "no fields of TRL's"
    above = {name for theirs, _ in rows(GUIDES / "from_trl.md", "GRPOConfig") for name in theirs}
    assert fields(heading) <= set(named) | (above if heading == "RLOOConfig" else set())


# Reward functions


def test_the_reward_file_of_the_page_runs_in_trl_as_well(tmp_path, monkeypatch, tiny_model, tokenizer):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    (text,) = [block.text for block in blocks(GUIDES / "from_trl.md") if block.file == "trl_rewards.py"]
    namespace: dict = {}
    exec(text, namespace)
    monkeypatch.chdir(tmp_path)
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    args = GRPOConfig("run", report_to="none", use_cpu=True, bf16=False, **options)
    problems = datasets.Dataset.from_list([{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(8)])
    rewards = [namespace["right"], namespace["short"]]
    trainer = GRPOTrainer(tiny_model, rewards, args=args, train_dataset=problems, processing_class=tokenizer)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert logged >= {"rewards/right/mean", "rewards/short/mean", "share_right"}
