"""Comparison of vLLM servers with a policy: before the first rollout by what they say, after each load by one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_rlhf.axes import Context, WeightSync

from .._http import HttpError, together
from ._vllm_server import DEVELOPMENT, EXTENSION, GENERATE, LOAD_ADAPTER, Sent, Server, wait_for

if TYPE_CHECKING:
    from hf_rlhf.axes import Policy

TRIED = "0.32"
"""Versions of vLLM that begin so were tried (docs/vllm.md)."""
PROBE_TOKENS = 16
"""Tokens of the probe's prompt and of its completion, where the servers' context holds both."""


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""
NO_ADAPTER = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")
"""Settings of peft's `LoraConfig` that vLLM does not know; without one it is empty or False."""


def computed_in(context: Context) -> str:
    """Return the dtype in which the trainer computes, as vLLM names it."""
    device = context.device.type
    if torch.is_autocast_enabled(device):
        return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    return str(next(context.policy.parameters()).dtype).removeprefix("torch.")  # type: ignore[union-attr]


def check_servers(
    servers: Sequence[Server], context: Context, max_new_tokens: int, sync: WeightSync
) -> tuple[int, list[str]]:
    """Return the shortest context of the servers, in tokens, and remarks. Raises `ValueError` with all that does not fit."""
    found, remarks, lengths = list(_adapter_problems(context.policy, sync)), [], []
    if computed_in(context) == "float64":
        found.append("the policy computes in float64, which vLLM does not know: set model.dtype=float32")
    for server in servers:
        found += [f"{server.url} {problem}" for problem in _problems(server, context, max_new_tokens)]
        config = {} if "facts" not in vars(server) else server.facts["config"]
        lengths.append(config.get("model_config", {}).get("max_model_len", 0))
        version = "" if "facts" not in vars(server) else server.facts["version"]
        if version and not version.startswith(TRIED):
            remarks.append(f"{server.url} is vLLM {version}, which was not tried with this version: {TRIED} was")
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        raise ValueError(f"rollout=vllm:\n{lines}\n`hf-rlhf serve-engine RECIPE` prints a command that fits")
    return min(lengths), remarks


def _adapter_problems(policy: Any, sync: WeightSync) -> Iterator[str]:
    for config in getattr(policy, "peft_config", {}).values():
        if not sync.adapters:
            yield f"the policy has an adapter, which rollout.sync={sync.name} does not send: set rollout.sync.use=folder"
        for setting in (name for name in NO_ADAPTER if getattr(config, name, None)):
            yield f"the policy's adapter has {setting}, which vLLM does not know: leave it out, or set rollout.use=generate"


def _adapter_settings(facts: dict[str, Any], policy: Any) -> Iterator[str]:
    rank = max((config.r for config in getattr(policy, "peft_config", {}).values()), default=0)
    served = (facts["config"].get("lora_config") or {}).get("max_lora_rank", 0)
    if served < rank:
        most = next((x for x in LORA_RANKS if x >= rank), rank)
        yield f"loads adapters up to rank {served}: start it with --enable-lora --max-lora-rank {most}"
    elif rank and LOAD_ADAPTER not in facts["routes"]:
        yield f"has no {LOAD_ADAPTER}: start it with the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


def _problems(server: Server, context: Context, max_new_tokens: int) -> Iterator[str]:
    """Yield what does not fit, to be read after the server's URL."""
    import httpx

    try:
        facts = server.facts
    except (httpx.HTTPError, ValueError, KeyError) as error:
        yield f"does not answer as vLLM does ({type(error).__name__}: {error}): start it, and wait until it answers"
        return
    if GENERATE not in facts["routes"]:
        yield f"has no {GENERATE}: start it with --enable-scale-out"
    if missing := [route for route in DEVELOPMENT if route not in facts["routes"]]:
        yield f"has no {', '.join(missing)}: start it with the environment variable VLLM_SERVER_DEV_MODE=1"
    if not facts["config"]:
        return
    yield from _settings(facts["config"], context, max_new_tokens)
    yield from _adapter_settings(facts, context.policy)
    if facts["config"]["parallel_config"].get("worker_extension_cls") != EXTENSION:
        yield f"cannot take weights: start it with --worker-extension-cls {EXTENSION}, and its folder on PYTHONPATH"
        return
    try:
        model = wait_for(server.describe())
    except HttpError as error:
        yield f"does not describe its model: {error}"
        return
    own: Any = context.policy.config.get_text_config()  # type: ignore[union-attr]
    for what, mine in (("model_type", own.model_type), ("vocabulary", own.vocab_size)):
        if model[what] != mine:
            yield f"serves a model with {what}={model[what]}, and the policy has {mine}: start it with the policy's model"


def _settings(config: dict[str, Any], context: Context, max_new_tokens: int) -> Iterator[str]:
    model, dtype = config["model_config"], computed_in(context)
    length, prompt = model.get("max_model_len") or 0, context.prompt_tokens or 1
    if length < prompt + max_new_tokens:
        yield (
            f"has a context of {length} tokens, and the longest prompt and rollout.max_new_tokens take {prompt} + "
            f"{max_new_tokens}: start it with --max-model-len {prompt + max_new_tokens}, or lower them"
        )
    if model.get("logprobs_mode") != "processed_logprobs":
        yield "reports log-probs before the temperature: start it with --logprobs-mode processed_logprobs"
    if model.get("quantization"):
        yield f"serves a model that is quantized ({model['quantization']}), into which weights are not loaded: start it without"
    if str(model.get("dtype")).removeprefix("torch.") != dtype:
        yield f"computes in {model.get('dtype')}, and the trainer in {dtype}: start it with --dtype {dtype}"


def probe(servers: Sequence[Server], policy: Policy, sent: Sent) -> float:
    """Return by how much the log-probs of the worst server differ from the policy's, as a mean over a few sampled tokens."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    contexts = [server.facts["config"].get("model_config", {}).get("max_model_len", 0) for server in servers]
    tokens = min(PROBE_TOKENS, min(contexts) // 2)
    prompt = [(7919 * i + 1) % vocabulary for i in range(tokens)]
    sampling: dict[str, Any] = {"n": 1, "temperature": 1.0, "seed": 0, "max_tokens": tokens}
    sampling |= {"logprobs": 0, "stop_token_ids": [], "detokenize": False}
    found = wait_for(together(server.complete(prompt, sampling, sent) for server in servers))
    gaps = []
    for (row,) in found:
        ids = torch.tensor([[*prompt, *row.ids]], device=policy.device)
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps.append((own - torch.tensor(row.logps, device=policy.device)).abs().mean().item())
    return max(gaps)
