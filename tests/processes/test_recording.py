"""Rows that a run of two processes keeps: those of both, in the order of prompts."""

from __future__ import annotations

import pyarrow.parquet as pq

from tests.helpers import runs
from tests.helpers.processes import run_ranks


def test_rows_of_two_processes_are_kept_in_the_order_of_prompts(tmp_path):
    code = f"""
from pathlib import Path
from hf_rlhf.training import held_out_rows
from tests.helpers import runs
held_out_rows.CHUNK = 2
parts = dict(logging={{"completions": "all"}}, update={{}}, evaluation={{"num_generations": 2}}, rollout=runs.SAMPLED)
made = runs.trainer(Path({str(tmp_path)!r}), data=runs.problems(20), eval_data=runs.problems(11, seed=1), **parts)
metrics = made.evaluate()
made.train()
made.close()
print(metrics["eval_reward/early/mean"], metrics["eval_rollout/length/mean"])
"""
    one, other = run_ranks(code)
    assert one == other
    rows = pq.read_table(tmp_path / "evaluation" / "step_000000.parquet").to_pylist()
    prompts = [each["prompt"] for each in runs.problems(11, seed=1) for _ in range(2)]
    assert [row["prompt"] for row in rows] == prompts
    reward, length = map(float, one.split())
    assert abs(sum(row["reward"] for row in rows) / len(rows) - reward) < 1e-6
    assert abs(sum(row["tokens"] for row in rows) / len(rows) - length) < 1e-6
    tables = [pq.read_table(path).to_pylist() for path in sorted((tmp_path / "completions").iterdir())]
    assert [len(rows) for rows in tables] == [16, 16]
    assert [row["group"] for row in tables[0]] == [i for i in range(4) for _ in range(4)]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step_000001.json", "step_000002.json"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []
