"""What becomes of scores before they are weighted: bounds, running normalisation, penalties, and what is logged of them."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_rlhf import load_plugin
from hf_rlhf.batch import Spans, TokenScores
from hf_rlhf.scoring.normalization import RewardNormalizer, RunningMoments
from hf_rlhf.scoring.scorer import RewardError
from hf_rlhf.testing import rollouts
from hf_rlhf.training.setup import AlgorithmError
from tests.helpers import runs
from tests.helpers.flaky_rewards import ByWord


def normalizer(**settings: Any) -> RewardNormalizer:
    return RewardNormalizer([("mine", load_plugin("rewards", "length", **settings))])


def shaped(made: RewardNormalizer, answers: list[Any], learn: bool = True) -> list[Any]:
    return made({"mine": answers}, Accelerator(cpu=True) if learn else None)["mine"]


def test_running_statistics_are_those_of_all_numbers_at_once():
    draw = random.Random(0)
    parts = [[1e6 + draw.gauss(0, 1e-3) for _ in range(n)] for n in (1, 7, 0, 30, 2)]
    running = RunningMoments()
    for part in parts:
        mean = math.fsum(part) / max(1, len(part))
        running.add(len(part), mean, math.fsum((x - mean) ** 2 for x in part))
    whole = torch.tensor([x for part in parts for x in part], dtype=torch.float64)
    assert running.mean == pytest.approx(whole.mean().item(), rel=1e-12)
    assert running.std == pytest.approx(whole.std(correction=0).item(), rel=1e-5)


def test_one_number_or_equal_ones_are_divided_by_one():
    assert shaped(normalizer(normalize="std"), [3.0]) == [3.0]
    assert shaped(normalizer(normalize="mean_std"), [3.0, 3.0]) == [0.0, 0.0]
    assert shaped(normalizer(normalize="std"), [0.1, 0.1, 0.1]) == [0.1, 0.1, 0.1]  # whose mean is not 0.1 in binary


def test_numbers_steps_and_tokens_are_bounded_and_missing_ones_stay_missing():
    made = normalizer(clip=(-1.0, 2.0))
    steps, tokens = Spans([(1, 5.0), (2, -3.0)]), TokenScores([0.5, 9.0])
    found = shaped(made, [7.0, -7.0, math.nan, steps, tokens])
    assert found[:2] == [2.0, -1.0]
    assert math.isnan(found[2])
    assert found[3:] == [Spans([(1, 2.0), (2, -1.0)]), TokenScores([0.5, 2.0])]


def test_numbers_are_normalised_by_all_that_came_so_far():
    made = normalizer(normalize="mean_std", clip=(0.0, 10.0))
    first = shaped(made, [0.0, 2.0, math.nan])
    assert first[:2] == [-1.0, 1.0]
    assert math.isnan(first[2])
    second = shaped(made, [4.0, 99.0])  # 0, 2, 4 and 10 so far
    assert second == pytest.approx([0.0, 6 / math.sqrt(14)])
    assert shaped(made, [4.0], learn=False) == [0.0]
    again = normalizer(normalize="mean_std")
    again.load_state_dict(made.state_dict())
    assert shaped(again, [10.0], learn=False) == pytest.approx([6 / math.sqrt(14)])


def test_a_run_logs_scores_as_they_were_given_and_learns_from_them_as_they_are_weighted(tmp_path):
    source = {"use": "length", "target": 1, "maximum": 9, "clip": [-0.5, 0.0], "weight": 2.0}
    plain = runs.trainer(tmp_path / "a", rewards=[{**source, "clip": None}])
    bounded = runs.trainer(tmp_path / "b", rewards=[source])
    one, other = plain.collector.collect(0), bounded.collector.collect(0)
    logs = [made.meters.read(made.accelerator) for made in (plain, bounded)]
    assert logs[0]["reward/length/mean"] == logs[1]["reward/length/mean"]
    assert torch.equal(other.total_score, one.total_score.clamp(min=-1.0))
    assert logs[1]["reward/total/mean"] == pytest.approx(other.total_score.mean().item())


def test_a_penalty_on_a_missing_end_is_a_source_of_its_own():
    given = rollouts(["a", "b"])
    given.finish_reasons = ["stop", "length"]
    assert load_plugin("rewards", "missing_eos")(given) == [0.0, -1.0]


@pytest.mark.proves("rewards.missing_eos", how="closed form", tolerance="0")
def test_a_run_without_an_end_pays_the_penalty(tmp_path):
    sources = [{"use": "length", "target": 1, "maximum": 9}, {"use": "missing_eos", "weight": 3.0}]
    data = [{"prompt": f"{i}+1=", "completions": [[40, 41, 1], [40, 42, 43]] * 4} for i in range(6)]
    made = runs.trainer(tmp_path, rewards=sources, data=data, rollout={**runs.BASE["rollout"], "mask_column": None})
    buffer = made.collector.collect(0)
    numbers = buffer.extra["numbers"]
    logged = made.meters.read(made.accelerator)
    assert 0 < logged["rollout/truncated_frac"] < 1
    assert logged["reward/missing_eos/mean"] == pytest.approx(-logged["rollout/truncated_frac"])
    total = numbers["reward/length"] + 3 * numbers["reward/missing_eos"]
    assert torch.equal(buffer.total_score, total)


def test_failures_are_counted_and_their_rows_are_left_out(tmp_path, caplog):
    def score(completions: list[str]) -> list[float]:
        if len(completions[0]) % 3 == 0:
            raise ValueError("a third")
        return [float(len(completions[0]))]

    source = {"use": "function", "function": score, "rowwise": True, "failure_budget": 1.0, "label": "mine"}
    made = runs.trainer(tmp_path, rewards=[source])
    with caplog.at_level(logging.WARNING):
        buffer = made.collector.collect(0)
    logged = made.meters.read(made.accelerator)
    lost = logged["health/reward_error"]
    assert lost > 0
    assert logged["health/reward_missing"] == lost
    assert len(buffer.mask) == logged["rollout/rows"]
    assert len(buffer.mask) + lost == made.algorithm.rollout.prompts * made.algorithm.rollout.num_generations
    assert "ValueError: a third" in caplog.text
    assert "Traceback" in caplog.text


def test_every_entry_counts_failures_even_if_there_are_none(tmp_path):
    for entry in runs.entries(runs.trained(tmp_path)):
        assert entry["health/reward_error"] == entry["health/reward_timeout"] == 0


def test_a_source_that_fails_for_all_rows_at_first_ends_training(tmp_path):
    made = runs.trainer(tmp_path, rewards=[{"use": "function", "function": lambda completions: 1 / 0}])
    with pytest.raises(RewardError, match=r"ZeroDivisionError.*as for every row so far"):
        made.train()
    made.close()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clip": [1.0, -1.0]}, r"clip=\[1.0, -1.0\] is \[lowest, highest\]"),
        ({"when": {}}, "when is empty"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, says, tmp_path):
    with pytest.raises(AlgorithmError, match=says):
        runs.trainer(tmp_path, rewards=[{"use": "length", **settings}])


def test_a_model_is_not_loaded_in_every_process(tmp_path):
    model = runs.save_classifier(tmp_path / "classifier")
    with pytest.raises(AlgorithmError, match="would load it again in every worker"):
        runs.trainer(tmp_path, rewards=[{"use": "reward_model", "model": model, "workers": "processes"}])
    in_an_actor = runs.recipe(rewards=[{"use": "reward_model", "model": model, "workers": "ray"}])
    assert not list(in_an_actor.algorithm().problems())


def test_a_column_that_decides_where_a_source_applies_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"rewards\.length\.when reads task"):
        runs.trainer(tmp_path, rewards=[{"use": "length", "when": {"task": "maths"}}])


def test_rows_go_to_the_source_that_their_column_names(tmp_path):
    data = [{**row, "task": ["maths", "prose"][i % 2]} for i, row in enumerate(runs.problems())]
    sources = [
        {"use": "length", "label": "maths", "target": 1, "maximum": 9, "when": {"task": "maths"}},
        {"use": "format", "label": "prose", "pattern": ".*", "when": {"task": ["prose", "other"]}},
    ]
    made = runs.trainer(tmp_path, rewards=sources, data=data)
    numbers = made.collector.collect(0).extra["numbers"]
    maths, prose = ~numbers["reward/maths"].isnan(), ~numbers["reward/prose"].isnan()
    assert torch.equal(maths, ~prose)
    assert maths.any()
    assert prose.any()


def test_a_run_with_workers_gives_the_bits_of_one_without(tmp_path):
    found = [
        runs.parameters(runs.trained(tmp_path / workers, rewards=[ByWord(workers=workers, num_workers=2)]))
        for workers in ("inline", "threads", "processes")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
