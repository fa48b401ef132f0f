"""The run doctor on logs: since when, once for each finding, and what is left out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.axes import Finding, History, Pattern
from hf_rlhf.contract.metric import Metric
from hf_rlhf.metrics.doctor import Doctor, as_dict, diagnose, installed, ranges_of
from hf_rlhf.metrics.names import Named
from hf_rlhf.registry.host import Host, use_host
from tests.helpers.ill_logs import LOGS, findings

FLAT = {"reward/zero_std_frac": 0.95, "reward/total/mean": 0.02, "reward/exact_match/mean": 0.02}
SPREAD = {"reward/zero_std_frac": 0.1, "reward/total/mean": 0.5, "reward/exact_match/mean": 0.5}


def written(folder: Path, entries: list[dict[str, Any]], **recipe: Any) -> Path:
    """A run's folder with these entries in its log, one a step."""
    lines = [json.dumps({"step": step, **numbers}) for step, numbers in enumerate(entries, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def named(findings: Iterable[Finding]) -> list[tuple[str, int]]:
    return [(finding.pattern, finding.step) for finding in findings]


def test_a_pattern_is_found_once_with_the_step_since_when(tmp_path):
    found = diagnose(written(tmp_path, [SPREAD] * 3 + [FLAT] * 9))
    assert named(found) == [("no_spread", 4)]
    assert "95%" in found[0].text


def test_one_bad_step_is_none_and_four_are_none(tmp_path):
    assert diagnose(written(tmp_path, [SPREAD, FLAT, SPREAD, *[FLAT] * 4, SPREAD])) == []


def test_the_log_is_read_without_torch_or_a_model(tmp_path):
    written(tmp_path, [FLAT] * 5)
    code = "import sys; from pathlib import Path; from hf_rlhf.metrics.doctor import diagnose\n"
    code += f"print(len(diagnose(Path({str(tmp_path)!r}))), sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"


def test_a_line_that_was_cut_off_and_a_folder_without_files_are_no_error(tmp_path):
    assert diagnose(tmp_path) == []
    with (written(tmp_path, [FLAT] * 5) / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "rew')
    assert named(diagnose(tmp_path)) == [("no_spread", 1)]


def test_what_the_run_found_itself_is_kept(tmp_path):
    written(tmp_path, [FLAT] * 5)
    own = Finding("no_spread", 1, "older words", (), "policy/clip_frac/high")
    gone = Finding("not_installed", 1, "words")
    (tmp_path / "summary.json").write_text(json.dumps({"findings": [as_dict(own), as_dict(gone)]}))
    assert [x.text for x in diagnose(tmp_path) if x.metric == own.metric] == ["older words"]
    assert {x.pattern for x in diagnose(tmp_path)} == {"no_spread"}


def test_a_pattern_that_is_turned_off_is_not_looked_for_and_leaves_its_metric_to_its_range(tmp_path):
    host, folder = Host(disable=""), written(tmp_path, [FLAT] * 9)
    host.turn_off("doctor.no_spread")
    with use_host(host):
        assert "no_spread" not in {pattern.name for pattern in installed()}
        assert [(x.pattern, x.metric) for x in diagnose(folder)] == [("out_of_range", "reward/zero_std_frac")]
        host.turn_off("doctor.out_of_range")
        assert diagnose(folder) == []


@dataclass(kw_only=True)
class Broken(Pattern):
    """Raises."""

    name = "broken"
    calls = 0

    def find(self, history: History) -> Iterable[Finding]:
        Broken.calls += 1
        raise KeyError("reward")


def test_a_pattern_that_raises_is_left_out_with_a_warning(caplog):
    doctor = Doctor({}, {}, [Broken()])
    assert [doctor.add(step, FLAT) for step in (1, 2)] == [[], []]
    assert Broken.calls == 1
    (said,) = caplog.messages
    assert "doctor.broken failed and is left out" in said


@dataclass(kw_only=True)
class Counting(Pattern):
    """Finds, at each step that it is looked for, that number of entries."""

    name = "counting"

    def find(self, history: History) -> Iterable[Finding]:
        yield Finding(self.name, history.step, "", (), f"{len(history.values('learning_rate'))}")


def test_patterns_are_looked_for_in_every_entry_at_first_then_in_every_fifth_and_in_those_of_no_step():
    doctor = Doctor({}, {}, [Counting()])
    for step in range(1, 64):
        doctor.add(step, {"learning_rate": 0.1})
    doctor.add(63, {"eval_accuracy": 0.5})
    assert [(x.step, x.metric) for x in doctor.findings] == [(i, str(i)) for i in (*range(1, 51), 55, 60, 63)]


def test_a_log_of_many_entries_is_read_later_as_it_was_live(tmp_path):
    entries = [{**numbers, "learning_rate": 0.1} for numbers in [SPREAD] * 58 + [FLAT] * 8]
    live = Doctor({}, {}, installed())
    for step, entry in enumerate(entries, 1):
        live.add(step, entry)
    assert named(live.findings) == [("no_spread", 59)]
    assert diagnose(written(tmp_path, entries)) == live.findings
    written(tmp_path, entries[:63])  # killed before the next look
    assert named(diagnose(tmp_path)) == [("no_spread", 59)]


def test_numbers_that_are_none_or_not_finite_are_passed_over():
    doctor = Doctor({}, {}, [])
    doctor.add(1, {"loss": float("nan"), "note": "text", "kl/ref": 1.0})
    assert set(doctor.history.series) == {"kl/ref"}


# What patterns read


def history(spr: int = 1, **series: list[float]) -> History:
    made = History(recipe={"update": {"mini_batches": spr, "epochs": 1}})
    for name, values in series.items():
        for step, value in enumerate(values, 1):
            made.add(step, {name: value})
    return made


@pytest.mark.parametrize(
    ("values", "step"),
    [([1, 1, 1], 1), ([0, 1, 1, 1], 2), ([1, 1], None), ([1, 1, 1, 0], None), ([1, 0, 1, 1], None), ([], None)],
)
def test_since_is_the_first_step_of_the_last_bad_ones(values, step):
    assert history(x=values).since("x", lambda x: x > 0.5, 3) == step


def test_the_steps_on_one_rollout_count_as_their_mean():
    assert history(2, x=[0, 2, 0, 2, 0, 2]).since("x", lambda x: x > 0.5, 3) == 1
    assert history(2, x=[0, 2, 0, 0, 0, 2, 0, 2]).since("x", lambda x: x > 0.5, 3) is None
    assert history(1, x=[0, 2, 0, 2, 0, 2]).since("x", lambda x: x > 0.5, 3) is None


def test_a_task_is_learned_where_a_score_has_risen_to_the_top():
    assert history(**{"reward/a/mean": [0.4] * 5 + [0.95] * 5}).learned()
    assert not history(**{"reward/a/mean": [0.95] * 10}).learned()
    assert not history(**{"reward/a/mean": [0.4] * 10}).learned()
    assert not history(**{"reward/a/mean": [-3.0] * 5 + [0.95] * 5}).learned()
    assert not history(**{"reward/total/mean": [0.4] * 5 + [0.95] * 5}).learned()


def test_a_long_run_keeps_a_bounded_history():
    made = history(x=[float(i) for i in range(1000)])
    assert len(made.values("x")) == 200
    assert (made.first("x"), made.mean("x"), made.series["x"].low) == (2.0, 997.0, 0.0)


# Boundaries of the built-in patterns

RECIPE: dict[str, Any] = {
    "rollout": {"use": "generate", "num_generations": 8, "max_new_tokens": 64, "decode_dtype": "bfloat16"},
    "rewards": [
        {"use": "exact_match", "weight": 1.0, "label": None, "column": "answer"},
        {"use": "format", "weight": 0.5, "label": "form"},
        {"use": "length", "weight": 0.5, "label": None},
    ],
    "kl": [{"use": "in_loss", "beta": 0.04}],
    "critic": {"use": "separate", "learning_rate": 1e-5, "warmup_steps": 0},
    "rollout_correction": {"use": "none"},
    "update": {"mini_batches": 1, "epochs": 1},
    "training": {"learning_rate": 1e-6},
}


@pytest.mark.proves(
    "doctor.dead_reward",
    "doctor.entropy_collapse",
    "doctor.kl_explodes",
    "doctor.length_explodes",
    "doctor.no_answer",
    "doctor.no_spread",
    "doctor.nothing_moves",
    "doctor.out_of_range",
    "doctor.overfits",
    "doctor.ratio_explodes",
    "doctor.rewards_at_war",
    "doctor.sampler_apart",
    "doctor.cut_off",
    "doctor.useless_critic",
    how="closed form",
    tolerance="exact",
)
@pytest.mark.parametrize("pattern", LOGS)
def test_a_pattern_is_found_with_its_last_entry_and_not_before(pattern):
    entries = LOGS[pattern](RECIPE)
    (finding, *_) = findings(RECIPE, entries, pattern)
    assert findings(RECIPE, entries[:-1], pattern) == []
    assert 1 <= finding.step <= len(entries)
    assert re.search(r"\d", finding.text)
    assert findings(RECIPE, entries * 3, pattern)[0].step == finding.step


MILD = {
    "no_spread": {"reward/zero_std_frac": 0.8, "reward/total/mean": 0.1},
    "cut_off": {"rollout/truncated_frac": 0.2},
    "kl_explodes": {"kl/ref": 29.0, "rollout/length/mean": 20.0},
    "ratio_explodes": {"policy/approx_kl": 0.1, "policy/ratio": 1.25},
    "entropy_collapse": {"policy/entropy": 0.02, "reward/total/mean": 0.1, "reward/total/std": 0.3},
    "length_explodes": {"rollout/length/mean": 30.0, "reward/total/mean": 0.9, "reward/total/std": 0.3},
    "dead_reward": {"reward/form/mean": 0.5, "reward/form/std": 0.01},
    "rewards_at_war": {"reward/exact_match/corr/form": -0.5},
    "useless_critic": {"value/explained_var": 0.0},
    "sampler_apart": {"rollout/sampler_gap/mean": 0.05, "rollout/is_ratio/mean": 1.25},
    "nothing_moves": {"kl/ref": 1e-4, "learning_rate": 1e-8},
    "no_answer": {"reward/exact_match/mean": 1e-3},
    "out_of_range": {"value/clip_frac": 0.5},
    "overfits": {"eval_loss": 1.0, "loss": 0.1},
}


@pytest.mark.parametrize("pattern", LOGS)
def test_values_on_the_threshold_are_healthy_however_long_they_last(pattern):
    assert findings(RECIPE, [MILD[pattern]] * 40, pattern) == []


START = {"reward/exact_match/mean": 0.4, "reward/total/mean": 0.4, "reward/total/std": 0.5}
LEARNED = {"reward/exact_match/mean": 0.95, "reward/total/mean": 0.95, "reward/total/std": 0.2}
EXCUSED: dict[str, list[dict[str, float]]] = {
    "no_spread: learned": [START] * 5 + [{**LEARNED, "reward/zero_std_frac": 0.95}] * 9,
    "entropy_collapse: learned": [START] * 5 + [{**LEARNED, "policy/entropy": 0.001}] * 9,
    "entropy_collapse: gained": [START] * 5 + [{"reward/total/mean": 1.0, "policy/entropy": 0.001}] * 9,
    "useless_critic: learned": [START] * 5 + [{**LEARNED, "value/explained_var": -0.5}] * 20,
    "kl_explodes: long completions": [{"kl/ref": 60.0, "rollout/length/mean": 4000.0}] * 9,
    "length_explodes: the reward does not rise": [
        {"rollout/length/mean": 10.0 * 1.2**i, "reward/total/mean": 0.4, "reward/total/std": 0.5} for i in range(20)
    ],
    "length_explodes: slowly": [
        {"rollout/length/mean": 10.0 * 1.02**i, "reward/total/mean": 0.1 * i, "reward/total/std": 0.5}
        for i in range(100)
    ],
    "dead_reward: a penalty that nothing incurs": [{"reward/length/mean": 0.0, "reward/length/std": 0.0}] * 20,
    "dead_reward: learned": [{"reward/form/mean": 0.1 * i, "reward/form/std": 0.1} for i in range(10)]
    + [{"reward/form/mean": 1.0, "reward/form/std": 0.0}] * 12,
    "dead_reward: a verifier that no_answer sees": [{"reward/exact_match/mean": 0.0, "reward/exact_match/std": 0.0}]
    * 20,
    "nothing_moves: there is no gradient": [{"kl/ref": 0.0, "learning_rate": 1e-6, "policy/grad_norm": 0.0}] * 40,
    "nothing_moves: in the warm-up": [{"kl/ref": 0.0, "learning_rate": 1e-10 * i} for i in range(20)],
    "nothing_moves: at the end of the schedule": [{"kl/ref": 0.1 * i, "learning_rate": 1e-6 / 2**i} for i in range(40)],
    "out_of_range: one step in three": [{"value/clip_frac": 0.9 * (i % 3 == 0)} for i in range(40)],
    "out_of_range: the evaluation before training alone": [{"eval_pairs/calibration_error": 0.9}],
    "overfits: the loss does not fall": [{"eval_loss": x, "loss": 2.0} for x in (1.0, 1.2, 1.3, 1.4)],
}


@pytest.mark.parametrize("case", EXCUSED)
def test_what_looks_like_a_pattern_and_is_none(case):
    assert findings(RECIPE, EXCUSED[case], case.partition(":")[0]) == []


def test_a_source_that_scores_nothing_is_dead():
    entries = [{"rollout/rows": 8.0, "reward/exact_match/mean": 0.4, "reward/exact_match/std": 0.5}] * 10
    assert [x.metric for x in findings(RECIPE, entries, "dead_reward")] == ["reward/form/mean", "reward/length/mean"]


def test_a_reward_for_length_that_never_pays_is_dead():
    paying = {**RECIPE, "rewards": [*RECIPE["rewards"][:2], {"use": "length", "weight": -0.5, "label": None}]}
    entries = [{"reward/length/mean": 0.0, "reward/length/std": 0.0}] * 10
    assert [x.metric for x in findings(paying, entries, "dead_reward")] == ["reward/length/mean"]


NO_OVERRIDE: dict[str, tuple[dict[str, Any], list[dict[str, float]], str]] = {
    "cut_off": ({"rollout": {}}, [{"rollout/truncated_frac": 0.5}] * 5, "has no `rollout.max_new_tokens`"),
    "dead_reward": (
        {"rewards": [{"use": "format", "pattern": "x"}]},
        [{"reward/format/mean": 0.5, "reward/format/std": 0.0}] * 10,
        "the only source that pays",
    ),
    "out_of_range": ({}, [{"health/reward_error": 2.0}] * 5, "depends on the cause"),
    "no_answer": (
        {"rewards": [{"use": "exact_match", "column": None}], "dataset": {"prompt_template": "{prompt}"}},
        [{"reward/exact_match/mean": 0.0, "reward/exact_match/answered_frac": 1.0}] * 10,
        "a template of yours",
    ),
    "rewards_at_war": ({"rewards": []}, [{"reward/a/corr/b": -0.9}] * 5, "the recipe is not known"),
}
"""Pattern -> recipe, entries, and why no override mends it."""


@pytest.mark.parametrize("pattern", NO_OVERRIDE)
def test_a_finding_without_an_override_says_why(pattern):
    changed, entries, why = NO_OVERRIDE[pattern]
    (found,) = findings({**RECIPE, **changed}, entries, pattern)
    assert found.overrides == ()
    assert "There is no override to type: " in found.text
    assert why in found.text


@pytest.mark.parametrize("pattern", LOGS)
def test_a_finding_has_an_override_or_says_why_there_is_none(pattern):
    for found in findings(RECIPE, LOGS[pattern](RECIPE), pattern):
        assert bool(found.overrides) != ("There is no override" in found.text)


def test_rows_learned_by_heart_from_the_start_need_smaller_steps():
    entries = [{"eval_loss": x, "loss": 0.1} for x in (1.0, 1.1, 1.2, 1.3)]
    doctor = Doctor(RECIPE, {})
    for step, entry in enumerate(entries):
        doctor.add(step, entry)
    (found,) = (x for x in doctor.findings if x.pattern == "overfits")
    assert found.overrides == ("training.learning_rate=3.3e-07",)


def test_a_source_of_weight_0_is_only_looked_at():
    silent = {**RECIPE, "rewards": [{**source, "weight": 0.0} for source in RECIPE["rewards"]]}
    assert findings(silent, LOGS["dead_reward"](RECIPE), "dead_reward") == []


def test_every_metric_out_of_its_range_is_a_finding_of_its_own():
    entries = [{"value/clip_frac": 0.9}] * 3 + [{"value/clip_frac": 0.9, "health/reward_error": 2.0}] * 5
    found = findings(RECIPE, entries, "out_of_range")
    assert [(x.metric, x.step) for x in found] == [("value/clip_frac", 1), ("health/reward_error", 4)]
    assert "above 0.5. The critic may not move as far as it should" in found[0].text


def test_two_bad_evaluations_are_a_finding():
    declared = [
        Named("eval_x", Metric("x", "share", "x", healthy=(None, 0.1), unhealthy="Train less.", when="evaluation"), "")
    ]
    doctor = Doctor({}, ranges_of(declared))
    assert doctor.add(0, {"eval_x": 0.9}) == []
    doctor.add(10, {"eval_x": 0.9})
    assert [x.step for x in doctor.findings] == [0]


def test_the_recipe_of_several_steps_a_rollout_counts_rollouts():
    recipe = {**RECIPE, "update": {"mini_batches": 2, "epochs": 2}}
    steps = [{"policy/approx_kl": x} for x in (0.0, 0.2, 0.4, 0.6)]
    doctor = Doctor(recipe, {})
    for step, entry in enumerate(steps * 5, 1):
        found = doctor.add(step, entry)
        assert bool(found) == (step == 19)
    assert doctor.findings[0].overrides == ("training.learning_rate=3.3e-07", "update.epochs=1")
