"""One rollout, ready for training, and the micro-batches of each optimizer step.

This process's rows are separate from the table of all N rows, which every process holds: weights and mini-batches come from
the table, forwards from the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments

from hf_rlhf.axes import TextTerm, check_output
from hf_rlhf.batch import Fork, Scored
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.references import BEHIND
from hf_rlhf.modeling.router import ROUTED
from hf_rlhf.runtime.seeding import permutation
from hf_rlhf.training.micro_batches import Batching

OPTIONAL = (
    *("values", "old_logps", "ref_logps", "sampler_logps", "old_entropy", "sum_sq_probs"),
    *("greedy", "kl_penalties", "completion_ids", "advantages"),
)
"""Fields of `Scored` that the table holds only if something needs them."""
OF_TURNS = ("turns", "states")
"""Fields of `Scored` for turns, which the table holds with any number off the mask."""
IN_TABLE_ALONE = ("token_rewards", "completion_ids", *OF_TURNS)
"""Numbers by token that the update does not read."""
SELECTS_BY = ("old_logps", "advantages", "old_entropy")
"""Columns of the table that policy losses select tokens by."""


@dataclass(kw_only=True)
class Collected:
    """Rows of this process and the table of all N rows.

    `rows` are (n, T) tensors, `table` (N, T') and (N,) tensors, `places` (n,) the index of each row in the table.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    texts: dict[str, list[Any]]
    rows: dict[str, Tensor]
    table: dict[str, Tensor]
    places: Tensor
    prompts: dict[str, list[list[int]]] = field(default_factory=dict)
    """Key of a reference -> the prompts that it reads in place of the rows' own."""
    forks: list[list[Fork]] = field(default_factory=list)
    """Forks of each row; empty if no row can have one."""

    def select(self, keep: Tensor) -> Collected:
        """Return the rows where `keep` (N,) is True, in table and rows."""
        if bool(keep.all()):
            return self
        kept, own = keep.nonzero().flatten(), keep[self.places].nonzero().flatten()
        index = own.tolist()
        return Collected(
            prompt_ids=[self.prompt_ids[i] for i in index],
            completion_ids=[self.completion_ids[i] for i in index],
            texts={name: [values[i] for i in index] for name, values in self.texts.items()},
            rows={name: x.index_select(0, own) for name, x in self.rows.items()},
            table={name: x.index_select(0, kept) for name, x in self.table.items()},
            places=(keep.cumsum(0) - 1)[self.places[own]],
            prompts={key: [ids[i] for i in index] for key, ids in self.prompts.items()},
            forks=[self.forks[i] for i in index] if self.forks else [],
        )

    @staticmethod
    def join(parts: Sequence[Collected]) -> Collected:
        """Concatenate the rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + len(part.table["mask"]))
        return Collected(
            prompt_ids=[x for part in parts for x in part.prompt_ids],
            completion_ids=[x for part in parts for x in part.completion_ids],
            texts={
                name: [x for part in parts for x in part.texts[name]]
                for name in parts[0].texts
                if all(name in part.texts for part in parts)
            },
            rows={name: joined([part.rows[name] for part in parts]) for name in parts[0].rows},
            table={name: joined([part.table[name] for part in parts]) for name in parts[0].table},
            places=torch.cat([part.places + offset for part, offset in zip(parts, offsets, strict=False)]),
            prompts={key: [x for part in parts for x in part.prompts[key]] for key in parts[0].prompts},
            forks=[x for part in parts for x in part.forks],
        )

    @staticmethod
    def scored(table: Mapping[str, Tensor], algorithm: Algorithm) -> Scored:
        """Return some rows with all their numbers as estimators and filters see them."""
        sources = dict(zip(algorithm.labels(), algorithm.rewards, strict=True))
        optional = {name: table[name] for name in OPTIONAL if name in table}
        optional |= {name: table[name].masked_fill(table["mask"] == 0, -1) for name in OF_TURNS if name in table}
        return Scored(
            mask=table["mask"],
            token_rewards=table["token_rewards"],
            group_ids=table["group_ids"],
            episode_ids=table["episode_ids"],
            agents=table["agents"],
            scores={label: table[f"score:{label}"] for label in sources},
            weights={label: source.weight for label, source in sources.items()},
            finished=table["finished"],
            **optional,
        )


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate rows; those of (n, T, ...) are padded to the widest."""
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(x.size(1) for x in tensors)
    wide = [functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, width - x.size(1))) for x in tensors]
    return torch.cat(wide)


@dataclass(kw_only=True)
class Buffer:
    """One rollout with its advantages.

    `rows` holds (n, T) tensors of this process: mask, advantages and, where they are needed, old_logps, ref_logps, values,
    returns, value_mask, correction, selected, and (n, T, k) of a reference's likeliest tokens. `mask` (N, T) bool, `group_ids`
    (N,) and `total_score` (N,) are of all rows, `places` as in `Collected`.
    """

    index: int
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rows: dict[str, Tensor]
    places: Tensor
    mask: Tensor
    group_ids: Tensor
    total_score: Tensor
    table: dict[str, Tensor] = field(default_factory=dict)
    """Columns of all rows that are read in each step: those of `kept_for_steps`."""
    prompts: dict[str, list[list[int]]] = field(default_factory=dict)
    forks: list[list[Fork]] = field(default_factory=list)
    """As in `Collected`."""
    prompt: Tensor | None = None
    """Number of the prompt of each row (N,); None: `group_ids`."""
    extra: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers and tensors, for a checkpoint."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Buffer:
        """Restore a buffer from `state_dict` on `device`."""
        moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in state.items()}
        for part in ("rows", "table"):
            moved[part] = {name: x.to(device) for name, x in state.get(part, {}).items()}
        return cls(**moved)

    def of_prompts(self) -> Tensor:
        """Return the number of the prompt of each row of the table (N,)."""
        return self.group_ids if self.prompt is None else self.prompt

    def learns(self, algorithm: Algorithm) -> Tensor:
        """Return which of this process's rows (n,) enter the update."""
        if algorithm.skips_rows_without_advantage:
            return ((self.rows["advantages"] * self.rows["mask"]) != 0).any(1)
        return torch.ones_like(self.places, dtype=torch.bool)

    def step_rows(self, position: int, algorithm: Algorithm, seed: int) -> Tensor:
        """Return the table rows (N_u,) of one optimizer step: all rows of some prompts, shuffled from the second epoch on."""
        epoch, mini_batch = divmod(position, algorithm.update.mini_batches)
        of_row = self.of_prompts()
        groups = of_row.unique()
        if epoch > 0:
            order = permutation(len(groups), seed, "epoch", self.index, epoch)
            groups = groups[torch.tensor(order, dtype=torch.long, device=groups.device)]
        chosen = groups.tensor_split(algorithm.update.mini_batches)[mini_batch]
        return torch.isin(of_row, chosen).nonzero().flatten()

    def slot(
        self, position: int, algorithm: Algorithm, seed: int, batching: Batching, most: Callable[[int], int] = int
    ) -> list[dict[str, Any]]:
        """Return the micro-batches of one optimizer step on this process, with the weights of the whole step.

        Empty if no process has a row; one row without weight if only this process has none, since every process takes part
        in the backward. `most` gives the number of micro-batches to fill up to, as that of `Parallel`.
        """
        step = self.step_rows(position, algorithm, seed)
        if len(step) == 0:
            return []
        mask = self.mask[step].to(self.rows["mask"].dtype)
        known = {name: x[step] for name, x in self.table.items()}
        of_values = known.get("value_mask", mask)
        available = {"group_ids": self.group_ids[step], "total_score": self.total_score[step].to(mask.dtype)}
        aggregation = algorithm.aggregation
        found = aggregation(mask, **algorithm.extras(aggregation, available, frozenset()))
        weights = {
            "weights": check_output("aggregation", aggregation, found, mask),
            "value_weights": of_values / of_values.sum().clamp(min=1),
        }
        if algorithm.policy_loss.selects_per_step:
            weights["selected"] = selection(algorithm.policy_loss, {**known, "mask": mask})
        for i, term in enumerate(algorithm.loss_terms):
            if not isinstance(term, TextTerm):
                extras = algorithm.extras(term, available, frozenset())
                found = term.weights(mask, **extras)
                weights[f"term_weights:{i}"] = check_output("loss_terms", term, found, mask, method="weights")
        where = torch.full((len(self.mask),), -1, dtype=torch.long, device=step.device)
        where[step] = torch.arange(len(step), device=step.device)
        mine = where[self.places]
        learned = (mine >= 0) & self.learns(algorithm)
        rows = [row for row, learns in enumerate(learned.tolist()) if learns]
        parts = batching.cut(rows, self.prompt_ids, self.completion_ids, self.forks) if rows else []
        micros = [self._micro_batch(part, mine, weights, batching) for part in parts] or [
            self._empty(weights, batching)
        ]
        micros += [self._empty(weights, batching) for _ in range(most(len(micros)) - len(micros))]
        if ROUTED in known:
            fractions = known[ROUTED].to(mask.dtype).sum(0) / mask.sum().clamp(min=1)
            for micro in micros:  # a view of the same numbers for each token
                micro["routing_fractions"] = fractions.expand(*micro["mask"].shape, *fractions.shape)
        return micros

    def _micro_batch(
        self, rows: list[int], mine: Tensor, weights: dict[str, Tensor], batching: Batching
    ) -> dict[str, Any]:
        completions = [self.completion_ids[i] for i in rows]
        width = max(map(len, completions))
        index = torch.tensor(rows, device=self.places.device)
        micro: dict[str, Any] = {name: x[index, :width] for name, x in self.rows.items()}
        micro |= {name: w[mine[index], :width] for name, w in weights.items()}
        micro["row"] = index
        micro["total_score"] = self.total_score[self.places[index]].to(micro["mask"].dtype)
        forks = [self.forks[i] for i in rows] if self.forks else None
        micro["batch"] = batching.batch([self.prompt_ids[i] for i in rows], completions, micro["mask"], forks)
        for key, prompts in self.prompts.items():
            micro[f"{BEHIND}{key}"] = micro["batch"].behind([prompts[i] for i in rows])
        return micro

    def _empty(self, weights: dict[str, Tensor], batching: Batching) -> dict[str, Any]:
        """Return a micro-batch of one row without a sampled token."""
        batch = batching.empty(self.rows["mask"])
        zeros = {name: x.new_zeros((1, 1, *x.shape[2:])) for name, x in (self.rows | weights).items()}
        return {**zeros, "total_score": batch.mask[0], "batch": batch}


def kept_for_steps(algorithm: Algorithm) -> tuple[str, ...]:
    """Return the columns of the table that the buffer keeps, for what is computed over the rows of each optimizer step."""
    return (*(SELECTS_BY if algorithm.policy_loss.selects_per_step else ()), ROUTED, "value_mask")


def selection(loss: Any, table: Mapping[str, Tensor]) -> Tensor:
    """Return what a policy loss selects of R rows, (R, T). `table` holds `mask` and those of `SELECTS_BY` that it reads."""
    inputs = {name: table[name] for name in ("old_logps", "advantages", "mask")}
    extras = {"old_entropy": table["old_entropy"]} if "old_entropy" in loss.needs else {}
    selected = loss.select(*inputs.values(), **extras)
    found: Tensor = check_output("policy_loss", loss, selected, table["mask"], method="select", inputs=inputs)
    return found


def text_micro_batches(
    algorithm: Algorithm, step: int, share: slice, like: Tensor, batching: Batching, most: Callable[[int], int] = int
) -> list[dict[str, Any]]:
    """Return the micro-batches of the texts of every `TextTerm` for optimizer step number `step`.

    `share` selects this process's texts; `like` has the device and dtype. Weights are over all texts of the step. `most` as in
    `Buffer.slot`.
    """
    found: list[dict[str, Any]] = []
    for i, term in enumerate(algorithm.loss_terms):
        if not isinstance(term, TextTerm):
            continue
        texts = term.texts(step)
        counts = torch.tensor([len(ids) - 1 for ids in texts], device=like.device)
        mask = (torch.arange(int(counts.max()), device=like.device) < counts[:, None]).to(like.dtype)
        weights = check_output("loss_terms", term, term.weights(mask), mask, method="weights")
        prompts, rest = [ids[:1] for ids in texts], [ids[1:] for ids in texts]
        parts = batching.cut(range(len(texts))[share], prompts, rest)
        for rows in parts:
            width = max(len(texts[row]) for row in rows) - 1
            part = mask[rows, :width]
            batch = batching.batch([prompts[row] for row in rows], [rest[row] for row in rows], part)
            found.append({"text_term": i, "mask": part, "weights": weights[rows, :width], "batch": batch})
        for _ in range(most(len(parts)) - len(parts)):
            batch = batching.empty(like)
            found.append({"text_term": i, "mask": batch.mask, "weights": batch.mask, "batch": batch})
    return found


def micro_batches_of_step(
    buffer: Buffer,
    position: int,
    step: int,
    algorithm: Algorithm,
    args: TrainingArguments,
    batching: Batching,
    most: Callable[[int], int],
) -> list[dict[str, Any]]:
    """Return the micro-batches of optimizer step number `step`, at `position` in its rollout: texts, then rows.

    Empty if no process has a row. `most` as in `Buffer.slot`.
    """
    rows = buffer.slot(position, algorithm, args.seed, batching, most)
    if not rows:
        return []
    share = slice(args.process_index, None, args.world_size)
    return text_micro_batches(algorithm, step, share, buffer.rows["mask"], batching, most) + rows
