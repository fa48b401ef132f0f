"""`hf-rlhf doctor`: what it prints, its exit code, runs and pipelines, and patterns of files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_rlhf.cli import main
from hf_rlhf.config.recipe import load_recipe
from hf_rlhf.registry import hookspecs
from hf_rlhf.registry.host import Host, use_host
from tests.helpers.ill_logs import LOGS

RECIPE = load_recipe("quickstart").raw


def written(folder: Path, entries: list[dict[str, float]], recipe: Any = RECIPE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, **numbers}) for step, numbers in enumerate(entries, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def call(*words: str | Path) -> int:
    """The exit code of the command line."""
    with use_host(Host(disable="")), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["hf-rlhf", *map(str, words)])
        try:
            main.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def test_a_run_with_findings_ends_with_3_and_what_to_type_is_accepted(tmp_path, capsys):
    run = written(tmp_path / "it's a run", LOGS["no_spread"](RECIPE) + LOGS["cut_off"](RECIPE))
    assert call("doctor", run) == 3
    title, first, check, second, longer = capsys.readouterr().out.splitlines()
    assert title == f"{run}:"
    assert first.startswith("  no_spread, since step 1: 90% of the completions")
    assert second.startswith("  cut_off, since step 6: 50% of the completions are cut off at 4 tokens")
    for line in (check, longer):
        program, *words = shlex.split(line)
        assert (program, words[:2]) == ("hf-rlhf", ["check", str(run / "recipe.yaml")])
        assert call(*words) == 0


def test_a_run_without_findings_ends_with_0(tmp_path, capsys):
    assert call("doctor", written(tmp_path / "run", [{"policy/entropy": 1.0}] * 9)) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: nothing found\n"


def test_several_runs_and_the_stages_of_a_pipeline_as_json(tmp_path, capsys):
    ill = written(tmp_path / "ill", LOGS["cut_off"](RECIPE))
    stages = [written(tmp_path / "stages" / name, [{"loss": 1.0}]) for name in ("ppo", "sft")]
    assert call("doctor", ill, tmp_path / "stages", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [str(ill), *map(str, stages)]
    (row,) = found[str(ill)]
    assert row == {
        "pattern": "cut_off",
        "step": 1,
        "text": row["text"],
        "overrides": ["rollout.max_new_tokens=8"],
        "metric": "rollout/truncated_frac",
    }
    assert [found[str(stage)] for stage in stages] == [[], []]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert call("doctor", tmp_path) == 2
    assert "must be the output folder of a run" in capsys.readouterr().err


def test_a_pattern_is_turned_off_and_one_of_a_file_is_added(tmp_path, capsys):
    entries = [{"rollout/truncated_frac": 0.1, "rollout/length/min": 4.0, "rollout/length/max": 4.0}] * 6
    run = written(tmp_path / "run", entries)
    (tmp_path / "mine.py").write_text(hookspecs.example("doctor"))
    assert call("doctor", run) == 0
    assert call("doctor", run, "-p", tmp_path / "mine.py") == 3
    assert "one_length, since step 5: All completions have 4 tokens." in capsys.readouterr().out
    ill = written(tmp_path / "ill", LOGS["cut_off"](RECIPE))
    assert call("doctor", ill, "-p", tmp_path / "mine.py") == 3
    assert f"check {ill / 'recipe.yaml'} -p {tmp_path / 'mine.py'} " in capsys.readouterr().out
    assert call("doctor", ill, "-p", "no:doctor.cut_off", "-p", "no:doctor.out_of_range") == 0


def test_ranges_of_the_recipes_plugins_are_watched(tmp_path, capsys):
    assert call("doctor", written(tmp_path / "run", [{"policy/clip_frac/high": 0.9}] * 5)) == 3
    assert "out_of_range, since step 1: policy/clip_frac/high" in capsys.readouterr().out


def test_a_run_whose_recipe_cannot_be_made_here_is_read_all_the_same(tmp_path, capsys):
    foreign = {**RECIPE, "advantages": {"use": "of_another_package"}, "rewards": [{"use": "theirs", "label": None}]}
    assert call("doctor", written(tmp_path / "run", LOGS["cut_off"](RECIPE), foreign)) == 3
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert call("doctor", tmp_path / "run") == 3
    assert "cut off at the maximum number of tokens" in capsys.readouterr().out


def test_show_tells_when_a_pattern_is_found(capsys):
    assert call("show", "doctor", "cut_off") == 0
    said = capsys.readouterr().out
    assert "rule: `rollout/truncated_frac` above 0.2 in 5 rollouts in a row" in said
    assert call("show", "cut_off") == 0
    assert capsys.readouterr().out == said


def test_a_recipe_that_names_a_pattern_is_told_where_patterns_are_chosen(capsys):
    assert call("check", "quickstart", "doctor=no_spread") == 2
    assert "every run uses all of them, and `-p no:doctor.NAME` turns one off" in capsys.readouterr().err
