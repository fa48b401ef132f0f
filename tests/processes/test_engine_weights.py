"""An engine with a copy of the weights, on two processes: one sends the weights, both sample; an error is one of both."""

from __future__ import annotations

from typing import Any

from tests.helpers.processes import run_ranks
from tests.helpers.vllm_stub import GENERATE, Stub

RANKS = """
import sys
from pathlib import Path
from tests.helpers import runs
from tests.helpers.runs import parameters
from hf_rlhf_plugins import _http
_http.FIRST_WAIT = 0.01
rollout = {{**runs.SAMPLED, "use": "vllm", "url": {url!r}, "request_retries": 1}}
made = runs.trainer(Path({folder!r}), rollout=rollout, training={{"max_steps": 4, "learning_rate": 2.0}})
try:
    made.train()
    gaps = [x["rollout/sampler_gap/max"] for x in made.state.log_history if "rollout/sampler_gap/max" in x]
    print("gap", max(gaps), "sum", parameters(made).double().sum().item())
except Exception as error:
    print("ended:", error)
made.close()
"""


def test_one_process_sends_the_weights_and_both_sample_from_them(tmp_path):
    with Stub(tmp_path / "model") as server:
        said = run_ranks(RANKS.format(url=server.url, folder=str(tmp_path / "run")))
        loads = [body for body in server.sent("/collective_rpc") if "args" in body]
        prompts = [tuple(body["token_ids"]) for body in server.sent(GENERATE)]
    found = [text.partition("gap ")[2].split() for text in said]
    assert found[0] == found[1], "equal parameters on both"
    assert float(found[0][0]) < 1e-5
    assert len(loads) == 2, "one for each rollout, not for each process"
    assert len(prompts) == 2 * (4 + 1), "four prompts and a probe for each rollout"


def test_weights_that_one_process_cannot_send_end_the_run_on_both(tmp_path):
    def refuses(route: str, body: Any, number: int) -> Any:
        return {"results": [{"error": "no"}]} if route == "/collective_rpc" and "args" in body else None

    with Stub(tmp_path / "model", refuses) as server:
        first, second = run_ranks(RANKS.format(url=server.url, folder=str(tmp_path / "run")))
    assert "ended:" in first
    assert "cannot load the weights" in first
    assert "ended: rollout=vllm did not take the weights on process 0" in second
