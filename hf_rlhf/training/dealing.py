"""Whole groups of a rollout moved between processes before the update, so that each has as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.runtime.distributed import exchange, gather_rows
from hf_rlhf.training.micro_batches import Batching
from hf_rlhf.training.rollout_buffer import Buffer, joined

if TYPE_CHECKING:
    from accelerate import Accelerator


def dealt(buffer: Buffer, algorithm: Algorithm, batching: Batching, accelerator: Accelerator) -> Buffer:
    """Return the buffer of this process with the rows that it updates on. All processes call this together."""
    if accelerator.num_processes == 1 or not len(buffer.group_ids):
        return buffer
    cost = torch.zeros(len(buffer.places), dtype=torch.float64, device=buffer.places.device)
    learns = buffer.learns(algorithm).nonzero().flatten()
    tokens = batching.tokens(learns.tolist(), buffer.prompt_ids, buffer.completion_ids, buffer.forks)
    cost[learns] = torch.tensor(tokens, dtype=cost.dtype, device=cost.device)
    found = gather_rows(accelerator, {"cost": cost.unsqueeze(1)}, {"places": buffer.places})
    costs = torch.empty_like(found["cost"]).index_copy(0, found["places"], found["cost"]).flatten()
    ranks = deal(buffer.of_prompts(), costs, algorithm.update.mini_batches, accelerator.num_processes)
    target, own, device = ranks[buffer.places], accelerator.process_index, buffer.places.device
    moved = [_share(buffer, (target == rank) & (target != own)) for rank in range(accelerator.num_processes)]
    came = exchange(accelerator, moved)
    parts = [part for part in [_share(buffer, target == own), *came] if len(part["places"])] or came[:1]
    places = torch.cat([part["places"].to(device) for part in parts])
    order = places.argsort()
    index = order.tolist()

    def column(columns: Sequence[list[Any]]) -> list[Any]:
        whole = [x for values in columns for x in values]
        return [whole[i] for i in index] if whole else []

    return replace(
        buffer,
        prompt_ids=column([part["prompt_ids"] for part in parts]),
        completion_ids=column([part["completion_ids"] for part in parts]),
        forks=column([part["forks"] for part in parts]),
        prompts={key: column([part["prompts"][key] for part in parts]) for key in buffer.prompts},
        rows={name: joined([part["rows"][name].to(device) for part in parts])[order] for name in buffer.rows},
        places=places[order],
        extra={},
    )


def deal(of_prompts: Tensor, costs: Tensor, mini_batches: int, processes: int) -> Tensor:
    """Return the process (N,) of each row: those of a prompt together, as many tokens for each process in every mini-batch of the
    first epoch."""
    prompts, at = of_prompts.unique(return_inverse=True)
    sums = torch.zeros(len(prompts), dtype=costs.dtype, device=costs.device).index_add(0, at, costs).tolist()
    ranks, of_all = [0] * len(prompts), [0.0] * processes
    for part in torch.arange(len(prompts)).tensor_split(mini_batches):
        shares = _balanced(part.tolist(), sums, processes)
        order = sorted(range(processes), key=of_all.__getitem__)  # who has the fewest so far gets the largest share
        for rank, share in zip(order, sorted(shares, key=lambda x: -sum(sums[i] for i in x)), strict=True):
            of_all[rank] += sum(sums[i] for i in share)
            for prompt in share:
                ranks[prompt] = rank
    return torch.tensor(ranks, device=at.device)[at]


def _balanced(prompts: Sequence[int], sums: Sequence[float], count: int) -> list[list[int]]:
    """Split prompts into `count` shares: the largest first into the smallest share, then what lowers the largest share moves to
    another or changes places, until it is 1% above the mean or nothing does."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for prompt in sorted(prompts, key=lambda i: -sums[i]):
        least = loads.index(min(loads))
        shares[least].append(prompt)
        loads[least] += sums[prompt]
    while max(loads) > 1.01 * sum(loads) / count:
        most = loads.index(max(loads))
        peak, other, out, back = min(
            (max(loads[most] - sums[i] + gained, loads[k] + sums[i] - gained), k, i, j)
            for k in range(count)
            if k != most
            for i in shares[most]
            for j, gained in [(-1, 0.0), *((j, sums[j]) for j in shares[k])]
        )
        if peak >= loads[most]:
            break
        for share, load, gone, come in ((shares[most], most, out, back), (shares[other], other, back, out)):
            share[:] = [i for i in share if i != gone] + [come] * (come >= 0)
            loads[load] = sum(sums[i] for i in share)
    return shares


def _share(buffer: Buffer, chosen: Tensor) -> dict[str, Any]:
    """Return some rows of a buffer in plain containers."""
    own = chosen.nonzero().flatten()
    index = own.tolist()
    width = max((len(buffer.completion_ids[i]) for i in index), default=0)
    return {
        "prompt_ids": [buffer.prompt_ids[i] for i in index],
        "completion_ids": [buffer.completion_ids[i] for i in index],
        "forks": [buffer.forks[i] for i in index] if buffer.forks else [],
        "prompts": {key: [ids[i] for i in index] for key, ids in buffer.prompts.items()},
        "rows": {name: x[own, :width] for name, x in buffer.rows.items()},
        "places": buffer.places[own],
    }
