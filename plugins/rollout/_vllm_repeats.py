"""Trial of a vLLM server: the same requests in another batch order, which give the same tokens and log-probs or do not.

A resumed run asks again for rows that it had, in other company and with another cache of prefixes.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import chain
from typing import Any

from .._http import together
from ._vllm_checks import PROBE_TOKENS
from ._vllm_server import GENERATE, Row, Server, wait_for

TRIAL = "hf_rlhf-trial"
PROMPTS, ROWS = 6, 2


def trial(servers: Sequence[Server], vocabulary: int, context: int) -> str:
    """Return the plan's remark on resumed runs: some prompts are asked for at once, and again one by one in another order.

    A run that was killed may have left the scheduler held.
    """
    tokens = min(PROBE_TOKENS, context // 2)
    asked = [
        ([(7919 * i + 104729 * k + 1) % vocabulary for i in range(max(1, tokens - k))], 1000 * k)
        for k in range(PROMPTS)
    ]
    texts, worst = True, 0.0
    for server in servers:
        wait_for(server.post("/resume"))
        first = wait_for(together(_ask(server, ids, seed, tokens) for ids, seed in asked))
        again = [wait_for(_ask(server, ids, seed, tokens)) for ids, seed in reversed(asked)]
        for one, other in zip(chain(*first), chain(*again[::-1]), strict=True):
            texts &= one.ids == other.ids
            worst = max([worst, *(abs(a - b) for a, b in zip(one.logps or (), other.logps or (), strict=False))])
    if not texts:
        return "the servers sample other tokens in another batch: a resumed run need not be the uninterrupted one"
    if worst:
        return (
            f"the servers' log-probs differ by up to {worst:.1e} with what else is in a batch: a resumed run samples the tokens "
            "of the uninterrupted one unless a draw is that close, and its parameters differ by rounding where log-probs are used"
        )
    return "the servers give equal tokens and log-probs in every batch that was tried: a resumed run is bit-identical"


async def _ask(server: Server, ids: list[int], seed: int, tokens: int) -> list[Row]:
    sampling: dict[str, Any] = {"n": ROWS, "temperature": 1.0, "seed": seed, "max_tokens": tokens, "logprobs": 0}
    sampling |= {"stop_token_ids": [], "detokenize": False}
    named = f"{TRIAL}-{uuid.uuid4()}"
    answer = await server.post(GENERATE, request_id=named, token_ids=ids, sampling_params=sampling)
    return server.rows(answer, sampling)[0]
