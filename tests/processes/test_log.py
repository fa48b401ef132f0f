"""What a run leaves in its folder when its process ends early."""

from __future__ import annotations

import subprocess

from tests.helpers.processes import warm
from tests.helpers.waits import scaled
from tests.unit.runtime.test_overlap import rows


def test_a_process_that_ends_writes_its_last_tables(tmp_path):
    program = f"""
from types import SimpleNamespace
from hf_rlhf.metrics.jsonl_log import RunLog
log = RunLog({str(tmp_path)!r}, {{}})
for step in (5, 6):
    log.completions = {rows()!r}
    log.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=9), None, logs={{}})
raise SystemExit(3)
"""
    assert subprocess.run([*warm("-c"), program], timeout=scaled(120)).returncode == 3
    assert sorted(path.stem for path in tmp_path.glob("completions/*")) == ["step_000005", "step_000006"]
