"""A server that speaks as vLLM 0.32 does where the engine `vllm` asks it, and samples with transformers from what it loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed import ProcessGroupGloo, TCPStore
from transformers import AutoModelForCausalLM

from hf_rlhf.batch import Context
from hf_rlhf.testing import tiny_policy
from tests.helpers.servers import Raw, Server

GENERATE, LOAD_ADAPTER = "/inference/v1/generate", "/v1/load_lora_adapter"
ROUTES = (GENERATE, "/collective_rpc", "/server_info", "/pause", "/resume", "/update_weight_version", "/version")
ROUTES += ("/sleep", "/wake_up", LOAD_ADAPTER)
MODEL = {"max_model_len": 256, "logprobs_mode": "processed_logprobs", "quantization": None, "dtype": "torch.float32"}
EXTENSION = "hf_rlhf_vllm_worker.Worker"
TRIAL = "hf_rlhf-trial"
Trouble = Callable[[str, Any, int], Any]
"""(route, body, how many requests this route has had) -> an answer in place of the server's, or None."""


class Stub(Server):
    """vLLM with the model in `folder`. `model`: fields of its model_config that differ; `routes`: those it has."""

    def __init__(
        self,
        folder: Path,
        trouble: Trouble = lambda route, body, number: None,
        *,
        port: int = 0,
        routes: tuple[str, ...] = ROUTES,
        extension: str | None = EXTENSION,
        cache_dtype: str = "auto",
        lora_rank: int | None = None,
        unsteady: float = 0.0,
        **model: Any,
    ) -> None:
        if not (folder / "config.json").exists():
            policy, tokenizer = tiny_policy()
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        config = {"model_config": {**MODEL, **model}, "cache_config": {"cache_dtype": cache_dtype}}
        config |= {"parallel_config": {"worker_extension_cls": extension}}
        config |= {"lora_config": None if lora_rank is None else {"max_lora_rank": lora_rank}}
        pages = {
            "/openapi.json": {"paths": {route: {} for route in routes}},
            "/version": {"version": "0.32.0"},
            "/health": {},
        }
        pages |= {"/server_info": {"vllm_config": config}} if "/server_info" in routes else {}
        self.unsteady, self.trials = unsteady, 0
        self.folder, self.trouble, self.counts, self._lock = (
            folder,
            trouble,
            dict.fromkeys(ROUTES, 0),
            threading.RLock(),
        )
        self.restart()
        super().__init__(self._reply, port, pages)

    def restart(self) -> None:
        """Forget the weights that were loaded."""
        with self._lock:
            self.version, self.paused = "default", False
            self.model = AutoModelForCausalLM.from_pretrained(self.folder).eval()
            self.adapted, self.connection, self.group = None, None, None

    def sent(self, route: str) -> list[Any]:
        """The bodies of the requests to a route, those of the setup's trial left out."""
        return [
            request.body
            for request in self.requests
            if request.path.partition("?")[0] == route and not str(request.body.get("request_id")).startswith(TRIAL)
        ]

    def _reply(self, body: Any, number: int) -> Any:
        route = self.requests[number].path.partition("?")[0]
        if str(body.get("request_id")).startswith(TRIAL):
            with self._lock:
                self.trials += 1
                return self._tried(body["sampling_params"]["seed"], self.trials)
        with self._lock:
            self.counts[route] += 1
            count = self.counts[route] - 1
        instead = self.trouble(route, body, count)
        if instead is not None:
            return instead
        until = time.monotonic() + 5
        while route == GENERATE and self.paused and time.monotonic() < until:
            time.sleep(0.005)  # as vLLM lets requests wait
        with self._lock:
            match route:
                case "/pause" | "/resume":
                    self.paused = route == "/pause"
                case "/sleep" | "/wake_up":
                    pass
                case "/update_weight_version":
                    self.version = body["new_version"]
                case "/collective_rpc" if body["method"] == "hf_rlhf_describe":
                    config = self.model.config
                    own = {"vocabulary": config.vocab_size, "model_type": config.model_type}
                    return {"results": [{**own, "connection": self.connection, "workers": 1}]}
                case "/collective_rpc" if body["method"] == "hf_rlhf_connect":
                    self.connection, info = body["args"]
                    store = TCPStore(info["address"], info["port"], info["world"], is_master=False)
                    self.group = ProcessGroupGloo(store, 1, info["world"], timedelta(seconds=info["seconds"]))
                    return {"results": [{}]}
                case "/collective_rpc" if body["method"] == "hf_rlhf_receive":
                    return {"results": [self._receive(*body["args"])]}
                case "/collective_rpc":
                    assert self.paused, "weights are loaded while nothing is generated"
                    self.model = AutoModelForCausalLM.from_pretrained(body["args"][0]).eval()
                    return {"results": [{}]}
                case "/v1/load_lora_adapter":
                    assert self.paused, "weights are loaded while nothing is generated"
                    assert self.adapted is None or body["load_inplace"]
                    base = AutoModelForCausalLM.from_pretrained(self.folder)
                    self.adapted = (body["lora_name"], PeftModel.from_pretrained(base, body["lora_path"]).eval())
                    return Raw(b"Success: LoRA adapter added successfully.", 200)
                case _:
                    assert not self.paused, "a completion is asked for while the server is held"
                    name, model = self.adapted or (None, self.model)
                    if body.get("model") != name:
                        return Raw(b'{"error": {"message": "The model does not exist."}}', 404)
                    return self._generate(body["token_ids"], body["sampling_params"], model)
            return {}

    def _tried(self, seed: int, number: int) -> Any:
        """Two rows of a prompt of the trial, as equal ones have equal seeds."""
        choice = {"token_ids": [seed % 7], "finish_reason": "length", "weight_versions": [{"version": self.version}]}
        logps = {"logprobs": {"content": [{"logprob": -1.0 - self.unsteady * number}]}}
        return {"choices": [{**choice, **logps, "index": index} for index in (0, 1)]}

    def _receive(self, connection: str, update: dict[str, Any]) -> dict[str, str]:
        assert self.paused, "weights are loaded while nothing is generated"
        if connection != self.connection:
            return {"error": "another connection"}
        state = {}
        for name, dtype, shape in zip(update["names"], update["dtype_names"], update["shapes"], strict=True):
            state[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast([state[name]]).wait()
        unknown = self.model.load_state_dict(state, strict=False).unexpected_keys
        return {"error": f"unknown: {unknown}"} if unknown else {}

    @torch.no_grad()
    def _generate(self, prompt: list[int], sampling: dict[str, Any], model: Any = None) -> Any:
        if len(prompt) + sampling["max_tokens"] > 256:
            return Raw(b'{"error": {"message": "longer than the maximum model length"}}', 400)
        choices, model = [], model or self.model
        for index in range(sampling["n"]):
            draw, ids, logps = torch.Generator().manual_seed(sampling["seed"] + index), list(prompt), []
            for _ in range(sampling["max_tokens"]):
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                warm = (logits / (sampling["temperature"] or 1.0)).log_softmax(-1)
                token = int(
                    warm.argmax() if not sampling["temperature"] else torch.multinomial(warm.exp(), 1, generator=draw)
                )
                ids, logps = [*ids, token], [*logps, warm[token].item()]
                if token in sampling["stop_token_ids"]:
                    break
            new = ids[len(prompt) :]
            content = [{"token_id": i, "logprob": x} for i, x in zip(new, logps, strict=True)]
            choices.append(
                {
                    "index": index,
                    "token_ids": new,
                    "finish_reason": "stop" if new[-1] in sampling["stop_token_ids"] else "length",
                    "logprobs": {"content": content} if sampling.get("logprobs") is not None else None,
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(new)}],
                }
            )
        return {"choices": choices}


def context(**changes: Any) -> Context:
    """Where an engine is set up: with `tiny_policy`."""
    policy, tokenizer = tiny_policy()
    return Context(**{"device": torch.device("cpu"), "tokenizer": tokenizer, "policy": policy, **changes})
