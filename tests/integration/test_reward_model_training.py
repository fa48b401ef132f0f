"""Training reward models: losses against their formulas, what is measured, splits and processes, and use as a reward."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from hf_rlhf import load_plugin
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.testing import rollouts
from hf_rlhf.training.offline.setup import make_trainer
from hf_rlhf_plugins.trainer._measures import calibration_error, of_labels, of_pairs, of_values, wilson
from tests.helpers import offline_runs as off
from tests.helpers import runs
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
WHOLE = "training.per_device_eval_batch_size=64"


def made(folder: Path, trainer: str, *words: str, given: Any = None) -> Any:
    """A trainer that has not trained, in float64, its head large enough to be seen."""
    recipe = off.recipe(folder, trainer, *words, given=given)
    trainer_ = make_trainer(recipe, str(folder / "out"))
    with torch.no_grad():
        trainer_.model.score.weight.mul_(30)
    return trainer_


def as_reward(trainer: Any, folder: Path, name: str, **settings: Any) -> Any:
    """The rewards plugin over the model as it is now, in float64."""
    trainer.model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    source = load_plugin("rewards", name, model=str(folder), dtype="float64", **settings)
    source.load_model(CPU)
    return source


def given_to(source: Any, prompts: list[Any], completions: list[str]) -> list[Any]:
    rows = rollouts(["?"] * len(completions), prompts=prompts)
    rows.completions = list(completions)
    return source(rows)


# The loss of pairs


@pytest.mark.proves("trainer.reward_model", how="closed form", tolerance="1e-9")
@pytest.mark.parametrize(
    ("words", "margins", "weight"),
    [
        ([], None, 0.01),
        (["trainer.center_rewards_coefficient=null"], None, 0.0),
        (["trainer.margin=0.5", "trainer.center_rewards_coefficient=0.25"], None, 0.25),
        (["trainer.center_rewards_coefficient=1.5"], [0.0, 0.5, 2.25], 1.5),
    ],
)
def test_the_loss_of_pairs_is_that_of_bradley_and_terry(words, margins, weight, tmp_path):
    given = off.rows("reward_model", count=12)
    if margins:
        given = [{**row, "margin": m} for row, m in zip(given, itertools.cycle(margins), strict=False)]
    trainer = made(tmp_path, "reward_model", *words, "dataset.held_out=0", given=given)
    source = as_reward(trainer, tmp_path / "reward", "reward_model")
    prompts = [row["prompt"] for row in given]
    chosen, rejected = (
        torch.tensor(given_to(source, prompts, [row[name] for row in given]), dtype=torch.float64)
        for name in ("chosen", "rejected")
    )
    margin = torch.tensor([row.get("margin", 0.5 if "trainer.margin=0.5" in words else 0.0) for row in given])
    losses = -logsigmoid(chosen - rejected - margin) + weight * (chosen + rejected) ** 2
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = trainer.compute_loss(trainer.model.eval(), batch)
    assert found.item() == pytest.approx(losses.mean().item(), rel=1e-9)
    assert losses.std() > 1e-3


@pytest.mark.parametrize("form", ["explicit", "implicit", "answers"])
def test_conversations_are_read_by_the_chat_template_as_the_reward_reads_them(form, tmp_path):
    user = [{"role": "user", "content": "7?"}]
    answers = {"chosen": "aa", "rejected": "zzz"}
    said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    row: dict[str, Any] = {
        "explicit": {"prompt": user, **said},
        "implicit": {name: [*user, *messages] for name, messages in said.items()},
        "answers": {"prompt": user, **answers},
    }[form]
    trainer = made(tmp_path, "reward_model", "dataset.held_out=0", given=[row] * 3)
    tokenizer = trainer.processing_class
    for name, text in answers.items():
        want = tokenizer(f"user: 7?\nassistant: {text}\n", add_special_tokens=False)["input_ids"]
        assert trainer.train_dataset[0][f"{name}_ids"] == want
    source = as_reward(trainer, tmp_path / "reward", "reward_model")
    scores = given_to(source, [user, user], list(answers.values()))
    assert scores[0] - scores[1] == pytest.approx(
        trainer.plugin.measure(trainer, trainer.train_dataset)["pairs/margin"]
    )


def test_conversations_without_a_chat_template_are_refused_before_the_model_loads(tmp_path):
    from transformers import AutoTokenizer

    off.save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    row = {"prompt": [{"role": "user", "content": "7?"}], "chosen": "a", "rejected": "z"}
    with pytest.raises(ValueError, match=r"row 1 .*Set model\.chat_template"):
        made(tmp_path, "reward_model", f"model.tokenizer={tmp_path / 'bare'}", given=[row] * 3)


# The losses of labels


@pytest.mark.proves("trainer.process_reward_model", how="closed form", tolerance="1e-9")
def test_the_loss_of_steps_is_the_cross_entropy_where_the_reward_reads_them(tmp_path):
    given = off.rows("process_reward_model", count=8)
    trainer = made(tmp_path, "process_reward_model", "dataset.held_out=0", given=given)
    source = as_reward(trainer, tmp_path / "reward", "process_reward_model", delimiter="\n", value="log_odds")
    found = given_to(source, [row["prompt"] for row in given], ["\n".join(row["completions"]) for row in given])
    losses = []
    for row, spans in zip(given, found, strict=True):
        for (_, log_odds), label in zip(spans.values, row["labels"], strict=True):
            losses.append(math.log1p(math.exp(-log_odds if label else log_odds)))
    assert len(losses) == sum(len(row["labels"]) for row in given)
    assert trainer.evaluate(trainer.train_dataset)["eval_steps/log_loss"] == pytest.approx(sum(losses) / len(losses))
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)


@pytest.mark.proves("trainer.token_reward_model", how="closed form", tolerance="1e-9")
@pytest.mark.parametrize("kind", ["binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("form", ["spans", "labels"])
def test_the_loss_of_tokens_is_that_of_the_rewards_that_they_get(form, kind, tmp_path):
    given = off.rows("token_reward_model", count=8)
    wanted = []
    for row in given:
        marks = {i: span["label"] for span in row["spans"] for i in range(span["start"], span["end"])}
        wanted.append([marks.get(i) for i in range(len(row["completion"]))])  # a token is a character
    if form == "labels":
        given = [{**row, "spans": None, "labels": marks} for row, marks in zip(given, wanted, strict=True)]
    words = ["dataset.held_out=0", f"trainer.loss={kind}"]
    trainer = made(tmp_path, "token_reward_model", *words, given=given)
    source = as_reward(trainer, tmp_path / "reward", "token_reward_model")
    found = given_to(source, [row["prompt"] for row in given], [row["completion"] for row in given])
    losses = []
    for marks, spans in zip(wanted, found, strict=True):
        for x, label in zip([value for _, value in spans.values], marks, strict=True):
            if label is not None:
                entropy = label * math.log1p(math.exp(-x)) + (1 - label) * math.log1p(math.exp(x))
                losses.append(entropy if kind == "binary_cross_entropy" else (x - label) ** 2)
    assert len(losses) < sum(map(len, wanted)), "the last character has no label"
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_a_token_that_is_several_characters_has_the_label_of_its_last_one():
    from tests.helpers.classifiers import merging_tokenizer

    plugin = load_plugin("trainer", "token_reward_model")
    row = {
        "prompt": "b",
        "completion": "12ab",
        "spans": [{"start": 1, "end": 3, "label": 1}, {"start": 3, "end": 4, "label": 0}],
    }
    example = plugin.encode(row, merging_tokenizer())
    assert merging_tokenizer().convert_ids_to_tokens(example["input_ids"]) == ["<bos>", "b", "12", "ab"]
    assert example["labels"] == [-100, -100, 1.0, 0.0]


def test_a_step_is_labelled_at_the_token_that_holds_the_end_of_its_delimiter():
    from tests.helpers.classifiers import merging_tokenizer

    plugin = load_plugin("trainer", "process_reward_model")
    row = {"prompt": "1", "completions": ["2", "ab"], "labels": [True, False]}
    example = plugin.encode(row, merging_tokenizer())
    assert merging_tokenizer().convert_ids_to_tokens(example["input_ids"]) == ["<bos>", "12", "ĊĊ", "ab", "ĊĊ"]
    assert example["labels"] == [-100, -100, 1, -100, 0]


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_an_evaluation_before_training_changes_nothing_of_it(bf16, tmp_path):
    after = []
    for evaluated in (False, True):
        trainer = made(tmp_path, "reward_model", f"training.bf16={bf16}", "model.dtype=float32")
        if evaluated:
            assert trainer.evaluate()["eval_pairs/count"] == 4
        trainer.train(overwrite=True)
        after.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*after)


# What is measured


@pytest.mark.parametrize(
    ("rate", "count", "low", "high"),
    [(0.0, 10, 0.0, 0.277533), (0.5, 10, 0.236593, 0.763407), (0.9, 100, 0.825634, 0.944771), (1.0, 1, 0.206549, 1.0)],
)
def test_the_interval_is_wilsons(rate, count, low, high):
    assert wilson(rate, count) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    for p in wilson(rate, count):  # its ends are where the rate lies 1.96 standard errors away
        if 0 < p < 1:
            assert abs(rate - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count), rel=1e-6)
    assert wilson(0.5, 0) == (0, 1)


def test_pairs_are_measured_next_to_what_length_alone_would_say():
    found = of_pairs([2.0, 0.0, -1.0, 3.0], [1.0, 0.0, 1.0, 0.0], [5, 2, 3, 4], [3, 3, 2, 4])
    assert found["pairs/accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (found["pairs/longer_wins"], found["pairs/shorter_wins"]) == (2.5 / 4, 1.5 / 4)
    assert found["pairs/margin"] == (1 + 0 - 2 + 3) / 4
    assert found["pairs/count"] == 4
    softplus = [math.log1p(math.exp(-m)) for m in (1, 0, -2, 3)]
    assert found["pairs/log_loss"] == pytest.approx(sum(softplus) / 4)
    assert found["pairs/score_mean"] == 6 / 8


def test_calibration_is_the_gap_between_what_is_said_and_what_happens():
    assert calibration_error([0.75] * 4, [1, 1, 1, 0], 0.5) == 0
    assert calibration_error([0.95] * 4, [1, 1, 1, 0], 0.5) == pytest.approx(0.2)
    assert calibration_error([0.1, 0.9], [0, 1], 0.0) == pytest.approx(0.1)
    assert calibration_error([1.0, 0.55], [1, 0], 0.5) == pytest.approx(0.275)


def test_labels_are_measured_next_to_what_one_answer_for_all_would_reach():
    found = of_labels("steps", [2.0, -1.0, 0.0, 3.0], [1, 0, 1, 0])
    assert found["steps/accuracy"] == (1 + 1 + 0.5 + 0) / 4
    assert (found["steps/all_good"], found["steps/all_bad"], found["steps/count"]) == (0.5, 0.5, 4)
    assert of_values("tokens", [1.0, 2.0], [1.0, 4.0]) == {
        "tokens/squared_error": 2.0,
        "tokens/explained_var": 1 - 2.0 / 2.25,
    }
    assert of_values("tokens", [1.0], [1.0]) == {"tokens/squared_error": 0.0}


@pytest.mark.proves("trainer.reward_model", how="end to end", tolerance="exact")
def test_what_was_measured_is_what_the_reward_says_of_the_held_out_pairs(tmp_path):
    from hf_rlhf.data.offline_rows import read_rows

    given = off.rows("reward_model", count=120)
    for row in given[::7]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    summary = off.run(tmp_path, "reward_model", given=given)
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    _, held_out = read_rows(recipe.rows, recipe.trainer())
    source = load_plugin("rewards", "reward_model", model=str(tmp_path / "out"), dtype="float64")
    source.load_model(CPU)
    chosen, rejected = (
        given_to(source, [row["prompt"] for row in held_out], [row[name] for row in held_out])
        for name in ("chosen", "rejected")
    )
    right = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    assert 0 < right < len(held_out) == 12
    assert summary["after"]["pairs/accuracy"] == right / 12
    assert (summary["after"]["pairs/accuracy_low"], summary["after"]["pairs/accuracy_high"]) == wilson(right / 12, 12)
    longer = [len(row["chosen"]) - len(row["rejected"]) for row in held_out]
    assert summary["after"]["pairs/longer_wins"] == sum((d > 0) + 0.5 * (d == 0) for d in longer) / 12


# Use


USES = {
    "reward_model": {},
    "process_reward_model": {"delimiter": "\n"},
    "token_reward_model": {},
}


@pytest.mark.proves("trainer.process_reward_model", "trainer.token_reward_model", how="end to end", tolerance="exact")
@pytest.mark.parametrize("trainer", list(USES))
def test_a_trained_model_prefers_what_is_good_and_is_the_reward_of_a_run(trainer, tmp_path):
    words = ["training.max_steps=40", "training.per_device_train_batch_size=16", "model.dtype=float32"]
    summary = off.run(tmp_path, trainer, *words, given=off.rows(trainer, count=300))
    (accuracy,) = (x for name, x in summary["after"].items() if name.endswith("/accuracy"))
    assert accuracy > 0.95
    source = {"use": trainer, "model": str(tmp_path / "out"), **USES[trainer]}
    reward = load_plugin("rewards", trainer, model=str(tmp_path / "out"), **USES[trainer])
    reward.load_model(CPU)
    good, bad = (
        answer if isinstance(answer, float) else sum(value for _, value in answer.values)
        for answer in given_to(reward, ["3?", "3?"], ["aaa", "zzz"])
    )
    assert good > bad
    policy = runs.trained(tmp_path / "policy", rewards=[source], rollout=runs.SAMPLED)
    assert math.isfinite(runs.entries(policy)[0][f"reward/{trainer}/mean"])


# The example's rows


@pytest.fixture(scope="module")
def gsm8k_rows() -> Any:
    """examples/gsm8k_pairs.py as a module."""
    import importlib.util

    file = ROOT / "examples" / "gsm8k_pairs.py"
    specification = importlib.util.spec_from_file_location("gsm8k_pairs", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


PROBLEM = {
    "question": "Two and 1,000?",
    "ground_truth": "It is <<2+1000=1002>>1002.\nA: 1002",
    "first": {"is_correct": True, "solution": "Add <<1000+2=1002.0>>1002\nA: 1002"},
    "second": {"is_correct": False, "solution": "Take <<1*1000=1,000>>1000.\nAdd <<1000+3=1003>>1003.\nSo.\nA: 1003"},
}


def test_correct_solutions_beat_incorrect_ones_and_lines_are_good_up_to_the_first_strange_result(gsm8k_rows):
    right, wrong, reference = (PROBLEM["first"], PROBLEM["second"], PROBLEM["ground_truth"])
    made = list(gsm8k_rows.pairs(PROBLEM, False))
    assert made == [{"prompt": "Two and 1,000?\n", "chosen": right["solution"], "rejected": wrong["solution"]}]  # type: ignore[index]
    assert [row["chosen"] for row in gsm8k_rows.pairs(PROBLEM, True)] == [right["solution"], reference]  # type: ignore[index]
    labels = [row["labels"] for row in gsm8k_rows.steps(PROBLEM)]
    assert labels == [[True, True], [True, True], [True, False, False, False]]


def test_no_problem_is_on_both_sides_and_the_trainers_take_every_row(gsm8k, gsm8k_rows, tmp_path):
    counts = gsm8k_rows.write(gsm8k / "example_model_solutions.jsonl", tmp_path, True, 0.2)
    read = {name: [off.json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in counts}
    assert {name: len(rows) for name, rows in read.items()} == counts
    for kind, trainer in (("pairs", "reward_model"), ("steps", "process_reward_model")):
        train, test = ({row["prompt"] for row in read[f"{kind}_{side}.jsonl"]} for side in ("train", "test"))
        assert train
        assert test
        assert not train & test
        plugin = load_plugin("trainer", trainer, **({"delimiter": "\n"} if kind == "steps" else {}))
        from tests.helpers.models import byte_tokenizer

        tokenizer = byte_tokenizer()
        rows = read[f"{kind}_test.jsonl"]
        assert all(plugin.encode(row, tokenizer) for row in rows)
