"""Evaluation: pass@k and maj@k against enumeration, the metrics of real evaluations, and their random numbers."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch

from hf_rlhf.training.evaluation import evaluate, majority, pass_at_k, row_types
from tests.helpers import runs

EXACT = {"use": "exact_match", "label": "exact"}


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        rows = [1] * correct + [0] * (n - correct)
        subsets = list(itertools.combinations(rows, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_exact_for_many_completions():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(10_000, 0, 100) == 0
    assert pass_at_k(10_000, 9_901, 100) == 1


@pytest.mark.parametrize(
    ("votes", "correct", "grade"),
    [
        (["a", "a", "b"], [1, 1, 0], 1.0),
        (["a", "b", "b"], [1, 0, 0], 0.0),
        (["a", "b"], [1, 0], 0.5),
        (["a", "b", "c", None], [0, 1, 0, 0], pytest.approx(1 / 3)),
        (["a", None, None, None], [1, 0, 0, 0], 1.0),
        ([None, None], [0, 0], 0.0),
        (["1.0", "1", "1.0", "2", "2"], [1, 1, 1, 0, 0], 0.5),
    ],
)
def test_the_most_frequent_answer_decides_and_ties_share(votes, correct, grade):
    assert majority(votes, correct) == grade
    paired = list(zip(votes, correct, strict=True))
    random.Random(0).shuffle(paired)
    assert majority(*map(list, zip(*paired, strict=True))) == grade


# Evaluations of completions that are known


KNOWN = [
    {"prompt": "1+1=", "answer": "2", "completions": ["2", "2", "3", "no"]},
    {"prompt": "2+2=", "answer": "4", "completions": ["5", "5", "4", "4"]},
    {"prompt": "3+3=", "answer": "6", "completions": ["7", "7", "6", "8"]},
    {"prompt": "4+4=", "answer": None, "completions": ["8", "8", "8", "8"]},
]


def evaluated(folder, rows: Any = None, evaluation: dict[str, Any] | None = None, **options: Any) -> dict[str, float]:
    settings = {"num_generations": 4, **(evaluation or {})}
    made = runs.trainer(
        folder, eval_data=KNOWN if rows is None else rows, evaluation=settings, **{"rewards": [EXACT], **options}
    )
    return {name.removeprefix("eval_"): x for name, x in made.evaluate().items()}


def test_the_metrics_of_an_evaluation_have_their_closed_forms(tmp_path):
    found = evaluated(tmp_path, rewards=[EXACT, {"use": "length", "target": 1, "maximum": 3, "weight": 2.0}])
    assert found["accuracy"] == pytest.approx(5 / 12), "the row without an answer counts nowhere"
    assert found["pass@2"] == pytest.approx((5 / 6 + 5 / 6 + 1 / 2) / 3)
    assert found["pass@4"] == 1.0
    assert found["maj@4"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["reward/exact/mean"] == found["accuracy"]
    lengths = [2] * 15 + [3]  # the end-of-sequence token counts
    penalty = -sum((length - 1) / 2 for length in lengths)
    assert found["reward/length/mean"] == pytest.approx(penalty / 16)
    assert found["reward/total/mean"] == pytest.approx((5 + 2 * penalty) / 16)
    assert found["rollout/length/mean"] == pytest.approx(sum(lengths) / 16)
    assert found["rollout/truncated_frac"] == 0


def test_with_one_completion_there_is_accuracy_alone(tmp_path):
    found = evaluated(tmp_path, evaluation={"num_generations": 1})
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert not any("@" in name for name in found)


def test_only_the_first_prompts_are_taken_where_a_number_is_set(tmp_path):
    assert evaluated(tmp_path, evaluation={"prompts": 1})["accuracy"] == 0.5
    assert evaluated(tmp_path, evaluation={"prompts": 99})["accuracy"] == pytest.approx(5 / 12)


def test_further_verifiers_have_their_label_before_their_metrics(tmp_path):
    strict = {"use": "exact_match", "label": "other", "column": "prompt2"}
    rows = [{**row, "prompt2": "no"} for row in KNOWN]
    train = [{**row, "prompt2": "no"} for row in runs.problems()]
    found = evaluated(tmp_path, rows, rewards=[EXACT, strict], data=train)
    assert found["accuracy"] == pytest.approx(5 / 12)
    assert found["other/accuracy"] == pytest.approx(1 / 16)
    assert found["other/pass@4"] == pytest.approx(1 / 4)


def test_without_a_verifier_there_is_no_accuracy(tmp_path):
    found = evaluated(tmp_path, rewards=[runs.FORMAT])
    assert not any("accuracy" in name or "@" in name for name in found)
    assert "reward/early/mean" in found


def test_many_prompts_are_evaluated_in_several_batches_and_once_each(tmp_path):
    rows = [{"prompt": "x", "answer": "y", "completions": ["y"] if i < 20 else ["n"]} for i in range(50)]
    assert evaluated(tmp_path, rows, evaluation={"num_generations": 1})["accuracy"] == 0.4


def test_an_evaluation_dataset_may_be_given_to_the_call(tmp_path):
    made = runs.trainer(tmp_path, rewards=[EXACT], data=KNOWN, evaluation={"num_generations": 4})
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        made.evaluate()


# Evaluations of samples


def sampler(folder, **evaluation: Any) -> Any:
    return runs.trainer(
        folder,
        eval_data=runs.problems(6, seed=9),
        rollout=runs.SAMPLED,
        evaluation={"num_generations": 4, **evaluation},
        training={"learning_rate": 2.0},
    )


def metrics(made: Any) -> dict[str, float]:
    timings = ("runtime", "per_second")
    return {name: x for name, x in made.evaluate().items() if not name.endswith(timings)}


def test_two_evaluations_draw_the_same_numbers_and_leave_the_generators_alone(tmp_path):
    made = sampler(tmp_path)
    random.seed(5), torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state().tolist()
    first, samples = metrics(made), made.samples
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    torch.rand(100)
    assert metrics(made) == first
    assert made.samples == samples
    made.train(overwrite=True)
    assert metrics(made) != first


def test_evaluating_on_the_way_does_not_change_the_training(tmp_path):
    quiet, evaluating = sampler(tmp_path), sampler(tmp_path)
    evaluating.evaluate()
    quiet.train(overwrite=True)
    evaluating.train(overwrite=True)
    assert torch.equal(runs.parameters(quiet), runs.parameters(evaluating))


def test_temperature_0_is_greedy(tmp_path):
    made = sampler(tmp_path, temperature=0)
    assert made.parts.evaluation_settings.temperature == 0
    greedy = metrics(made)
    made.collector.seed = 77
    assert metrics(made) == greedy
    warm = sampler(tmp_path)
    first = metrics(warm)
    warm.collector.seed = 77
    assert metrics(warm) != first


def test_the_samples_of_an_evaluation_are_at_most_eight_rows(tmp_path):
    made = sampler(tmp_path)
    made.evaluate()
    assert 1 <= len(made.samples) <= 8
    assert set(made.samples[0]) == set(row_types(made.algorithm))
    assert all(math.isfinite(row["reward"]) for row in made.samples)


def test_rows_and_sums_of_an_evaluation_give_its_metrics(tmp_path):
    made = runs.trainer(tmp_path, eval_data=KNOWN, evaluation={"num_generations": 4}, rewards=[EXACT])
    kept: list[dict[str, Any]] = []
    found = evaluate(made.collector, list(made.eval_dataset), made.parts.evaluation_settings, kept.extend)
    assert len(kept) == 16
    types = row_types(made.algorithm)
    assert list(types) == ["prompt", "completion", "reference", "reward/exact", "reward", "tokens", "truncated"]
    for row in kept:
        assert list(row) == list(types)
        assert all(value is None or isinstance(value, types[name]) for name, value in row.items())
    scores = [row["reward/exact"] for row in kept if row["reference"] is not None]
    assert found.metrics["accuracy"] == sum(scores) / len(scores)
    assert found.metrics["rollout/length/mean"] == sum(row["tokens"] for row in kept) / 16
    assert all(row["reward"] is None for row in kept[12:]), "no source applies to the row without an answer"
    low, high = found.intervals["accuracy"]
    assert 0 <= low < found.metrics["accuracy"] < high <= 1
    assert "health/reward_error" not in found.intervals
