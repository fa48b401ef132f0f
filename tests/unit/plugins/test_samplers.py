"""Samplers: which prompts come next, by closed forms and by frequencies."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from hf_rlhf import load_plugin
from hf_rlhf.batch import Prompt
from hf_rlhf.data.prompt_stream import PromptStream
from hf_rlhf.runtime import checkpoint_manifest
from tests.helpers import runs

PROMPTS = [Prompt(ids=[i], prompt=str(i)) for i in range(10)]


def stream(sampler: Any, seed: int = 3, prompts: Any = PROMPTS, shuffle: bool = True) -> PromptStream:
    return PromptStream(prompts, seed=seed, sampler=sampler, shuffle=shuffle)


def drawn(given: PromptStream, *counts: int) -> list[int]:
    return [prompt.ids[0] for count in counts for prompt in given.next(count)]


def difficulty(**settings: Any) -> Any:
    return load_plugin("sampler", "difficulty", **{"warmup": 0, **settings})


@pytest.mark.proves("sampler.shuffled", how="closed form", tolerance="exact")
def test_shuffled_draws_the_permutation_of_each_epochs_seed():
    """The bits of runs before there were samplers."""
    want = []
    for epoch in range(3):
        order = list(range(10))
        random.Random(f"3-{epoch}").shuffle(order)
        want += order
    assert drawn(stream(load_plugin("sampler", "shuffled")), 4, 4, 4, 4, 4, 4, 4, 2) == want
    assert drawn(stream(None), 30) == want


@pytest.mark.parametrize("position", [0, 3, 10, 14, 20])
def test_a_checkpoint_from_before_samplers_continues_with_the_very_next_prompt(position):
    old, given = stream(None), stream(load_plugin("sampler", "shuffled"))
    old.next(position)
    state = old.state_dict()
    assert "sampler" not in state
    given.next(6)
    given.load_state_dict(state)
    assert drawn(given, 15) == drawn(old, 15)
    manifest = {"use": "shuffled"}
    assert checkpoint_manifest.differences({}, {"sampler": manifest}) == []
    assert checkpoint_manifest.differences({}, {"sampler": {**manifest, "use": "difficulty"}}) != []


def test_pass_rates_are_those_of_the_last_draws_of_a_prompt():
    plugin = difficulty(window=2, passes=0.5)
    plugin.observe([0, 0, 1, 1], [1.0, 0.0, 0.5, 0.49])
    plugin.observe([0, 0, 0, 2], [1.0, 1.0, 1.0, float("nan")])
    assert plugin.rates() == {0: 4 / 5, 1: 1 / 2}
    plugin.observe([0], [0.0])
    assert plugin.rates() == {0: 3 / 4, 1: 1 / 2}, "the first draw has left the window"
    assert plugin.report() == {"pass_rate": 0.625, "seen": 2, "always_frac": 0.0, "never_frac": 0.0}


@pytest.mark.proves("sampler.difficulty", how="closed form", tolerance="1e-12")
@pytest.mark.parametrize("floor", [0.05, 0.5])
def test_a_prompt_is_drawn_with_its_weight(floor):
    plugin = difficulty(floor=floor, window=1)
    plugin.observe([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, [1.0] * 4 + [0.0] * 4 + [1, 0, 1, 0] + [1, 0, 0, 0])
    weights = [floor, floor, 1.0, floor + (1 - floor) * 0.75, 1.0]  # row 4 has not been seen
    assert plugin.weights(5) == pytest.approx(weights, abs=1e-12)
    n, counts = 20_000, Counter[int]()
    for seed in range(n):
        counts.update(plugin.next(1, 5, random.Random(seed)))
        plugin._open.clear()
    for row, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(counts[row] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_without_pass_rates_and_during_the_warm_up_every_prompt_has_the_same_weight():
    counts = Counter[int]()
    plugin = difficulty(warmup=2, floor=1e-9)
    plugin.observe([0, 0], [1.0, 1.0])
    for seed in range(2000):
        counts.update(plugin.next(1, 4, random.Random(seed)))
        plugin._open.clear()
    assert min(counts.values()) > 400
    plugin.observe([], [])
    rows = [plugin.next(1, 4, random.Random(seed))[0] for seed in range(3)]
    assert 0 not in rows, "the warm-up is over"


def test_what_is_drawn_and_not_observed_is_not_drawn_again():
    plugin = difficulty()
    first = plugin.next(4, 10, random.Random(0))
    second = plugin.next(4, 10, random.Random(0))
    assert len({*first, *second}) == 8
    assert len(set(plugin.next(4, 10, random.Random(1)))) == 4, "two are left, and two come again"
    plugin.observe(first, [0.0] * 4)
    assert set(plugin._open).isdisjoint(first) or len(plugin._open) < 12


@pytest.mark.parametrize("position", [0, 1, 3, 7])
def test_difficulty_resumes_with_the_very_next_prompt(position):
    def rollouts(given: PromptStream, count: int) -> list[list[int]]:
        found = []
        for _ in range(count):
            given.begin_rollout()
            found.append(drawn(given, 4))
            given.observe([0, 0, 1, 1, 2, 2, 3, 3], [float(row % 3 == 0) for row in found[-1] for _ in range(2)])
        return found

    straight = stream(difficulty())
    rollouts(straight, position)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = stream(difficulty())
    rollouts(resumed, 2)
    resumed.load_state_dict(state)
    assert rollouts(resumed, 8) == rollouts(straight, 8)


def test_a_dataset_without_random_access_takes_shuffled_alone():
    endless = iter(PROMPTS)
    with pytest.raises(
        ValueError, match=r"sampler=difficulty chooses rows and a stream has no random access.*shuffled"
    ):
        stream(difficulty(), prompts=endless)
    with pytest.raises(ValueError, match=r"dataset.shuffle=false keeps the order.*Set dataset.shuffle=true"):
        stream(difficulty(), shuffle=False)
    assert drawn(stream(load_plugin("sampler", "shuffled"), shuffle=False), 12) == [*range(10), 0, 1]
    assert sorted(drawn(stream(load_plugin("sampler", "shuffled"), prompts=endless), 10)) == list(range(10))


@pytest.mark.parametrize(("key", "value"), [("streaming", True), ("shuffle", False)])
def test_a_recipe_with_a_sampler_and_no_random_access_is_refused_before_anything_loads(tmp_path, key, value):
    with pytest.raises(ValueError, match="sampler=difficulty chooses rows"):
        runs.trainer(tmp_path, sampler="difficulty", dataset={key: value}, training={"max_steps": 1})


def test_a_stream_given_in_python_is_refused_too(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(runs.problems()).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"pass a datasets\.Dataset or a list"):
        runs.trainer(tmp_path, sampler="difficulty", data=rows, training={"max_steps": 1})


def test_row_numbers_out_of_range_are_refused_by_name():
    class Beyond(type(load_plugin("sampler", "shuffled"))):  # type: ignore[misc]
        name = "beyond"

        def next(self, count: int, rows: int, rng: random.Random) -> list[int]:
            return [rows] * count

    with pytest.raises(ValueError, match="sampler=beyond must return 2 row numbers from 0 to 9, got"):
        stream(Beyond()).next(2)


def test_a_run_observes_every_completion_once_per_rollout_also_those_that_filters_drop(tmp_path):
    seen = []

    class Watching(type(load_plugin("sampler", "shuffled"))):  # type: ignore[misc]
        name = "watching"
        metrics = ()

        def observe(self, rows: Any, scores: Any) -> None:
            seen.append((list(rows), list(scores)))

    drops = {"use": "too_short", "min_tokens": 99}
    reward = {"use": "length", "target": 1, "maximum": 9, "clip": [-0.2, 0.0], "weight": 2.0}
    made = runs.trained(tmp_path, sampler=Watching(), filters=[drops], rewards=[reward], training={"max_steps": 4})
    prompts, group = made.algorithm.rollout.prompts, made.algorithm.rollout.num_generations
    assert len(seen) == 2
    numbers = stream(load_plugin("sampler", "shuffled"), seed=made.args.seed, prompts=[*range(made.stream.rows)])
    for rows, scores in seen:
        assert rows == [row for row in numbers.next(prompts) for _ in range(group)]
        assert min(scores) < -0.4, "before clipping"
    assert made.state.log_history
