"""A server that answers as vLLM 0.32 does where the reference `remote` asks it, with a model and tokenizer of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.servers import Raw, Server

COMPLETIONS, DETOKENIZE = "/v1/completions", "/detokenize"


class Teacher(Server):
    """`trouble`: (route, body, how many requests there were) -> an answer in place of its own, or None."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        trouble: Callable[[str, Any, int], Any] = lambda route, body, number: None,
        *,
        max_logprobs: int = 20,
        max_model_len: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.trouble, self.most = model.eval(), tokenizer, trouble, max_logprobs
        served = [{"id": name, "max_model_len": max_model_len} for name in ("teacher", "other")]
        super().__init__(self._reply, pages={"/v1/models": {"data": served}})

    def _reply(self, body: Any, number: int) -> Any:
        route = self.requests[number].path
        instead = self.trouble(route, body, number)
        if instead is not None:
            return instead
        if route == DETOKENIZE:
            return {"prompt": self.tokenizer.decode(body["tokens"])}
        assert body["temperature"] == 1
        assert body["max_tokens"] == 1
        if body["prompt_logprobs"] > self.most:
            return Raw(b'{"error": {"message": "Requested prompt logprobs of 30, greater than max allowed: 20"}}', 400)
        return self.scores(body["prompt"], body["prompt_logprobs"])

    @torch.no_grad()
    def scores(self, ids: list[int], k: int) -> Any:
        """The token and the k likeliest ones at each place but the first, in no order."""
        logps = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places: list[Any] = [None]
        for at, token in zip(logps, ids[1:], strict=False):
            best = at.topk(k).indices.tolist()
            places.append({str(t): {"logprob": at[t].item(), "decoded_token": "x"} for t in sorted({token, *best})})
        return {"choices": [{"prompt_logprobs": places}]}
