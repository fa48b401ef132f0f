"""The run doctor on logs: since when, once for each finding, and what is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.axes import Finding, History, Pattern
from hf_rlhf.metrics.doctor import Doctor, as_dict, diagnose, installed
from hf_rlhf.registry.host import Host, use_host

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


@pytest.mark.proves("doctor.no_spread", how="closed form", tolerance="exact")
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
