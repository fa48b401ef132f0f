"""Rows of rollouts that a run keeps: a few groups of 16 rollouts for the report; with `logging.completions: all`, every row."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_rlhf.data.token_text import pieces_of, spans_of
from hf_rlhf.metrics.jsonl_log import RunLog, completion_rows
from hf_rlhf.metrics.row_file import as_text
from hf_rlhf.runtime.seeding import permutation
from hf_rlhf.scoring.scorer import reference_column

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hf_rlhf.batch import Fork, Rollouts
    from hf_rlhf.config.algorithm import Algorithm
    from hf_rlhf.training.rollout_buffer import Buffer, Collected

ROLLOUTS, GROUPS = 16, 4
"""Recorded rollouts of a run, and recorded groups of each."""
SHOWN = 16
"""Completions that trackers get of a rollout with `logging.completions: all`."""
ALL = "all"


def recorded(rollouts: int) -> list[int]:
    """Return which of a run's rollouts are recorded: up to 16, the first, the last, and between them at log-spaced steps."""
    found: list[int] = []
    for i in range(min(ROLLOUTS, rollouts)):
        place = round(rollouts ** (i / max(1, ROLLOUTS - 1))) - 1 if rollouts > ROLLOUTS else i
        found.append(max(place, found[-1] + 1 if found else 0))
    return found


@dataclass
class Row:
    """One completion of this process."""

    texts: dict[str, Any]
    rewards: dict[str, float | None]
    total: float | None
    ids: list[int]
    mask: list[int]
    group: int
    prompt: Any
    reference: Any
    forks: Sequence[Fork] = ()
    dropped: str | None = None
    """Reason why it was dropped, such as a filter."""
    place: int | None = None
    """Place among the rows of the buffer."""
    advantage: float | None = None
    tokens: dict[str, list[float]] = field(default_factory=dict)
    """Numbers by token: advantage, logp, ref."""


@dataclass
class Sample:
    """Recorded groups of one rollout, complete once the first optimizer step on it has been taken."""

    step: int
    """Optimizer steps of the policy that wrote them."""
    rows: list[Row]
    tokenizer: Any
    noted: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(place in the buffer, log-probs) of rows in the update, for a recipe that computes no log-probs before it."""

    def content(self) -> dict[str, Any]:
        """Return it as JSON."""
        for places, logps in self.noted:
            found = dict(zip(places.tolist(), logps.tolist(), strict=True))
            for row in self.rows:
                if row.place in found:
                    row.tokens["logp"] = found[row.place]
        self.noted = []
        pieces = pieces_of(self.tokenizer, [row.ids for row in self.rows])
        groups: dict[int, dict[str, Any]] = {}
        for row, texts in zip(self.rows, pieces, strict=True):
            reference = None if row.reference is None else as_text(row.reference)
            group = groups.setdefault(row.group, {"prompt": row.prompt, "reference": reference, "rows": []})
            group["rows"].append(_row_content(row, texts))
        return {"step": self.step, "groups": [groups[group] for group in sorted(groups)]}


def _row_content(row: Row, pieces: list[str]) -> dict[str, Any]:
    numbers, count = row.tokens, len(row.ids)
    kl = (
        [a - b for a, b in zip(numbers["logp"], numbers["ref"], strict=False)]
        if {"logp", "ref"} <= numbers.keys()
        else None
    )
    found = {"advantage": numbers.get("advantage"), "kl": kl, "logp": numbers.get("logp")}
    return {
        "pieces": pieces,
        **({} if all(row.mask) else {"mask": "".join("1" if m else "0" for m in row.mask)}),
        "finish": row.texts["finish_reason"],
        "rewards": row.rewards,
        "total": row.total,
        "dropped": row.dropped,
        **{name: quantized(x[:count]) for name, x in found.items() if x is not None},
    }


def quantized(values: Sequence[float]) -> dict[str, Any]:
    """Return numbers in 8 bits: `scale` x q / 127 with q from -127 to 127 in base64, -128 for what is not finite."""
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    scale = float(np.abs(x[known]).max(initial=0.0))
    q = np.where(known, np.round(np.where(known, x, 0.0) / (scale or 1.0) * 127), -128).astype(np.int8)
    return {"scale": float(f"{scale:.5g}"), "data": base64.b64encode(q.tobytes()).decode()}


class Recorder:
    """Follow the rows of a rollout that are kept, from the reward sources to the first optimizer step.

    Which ones these are depends on the seed and the number of optimizer steps alone, so that a resumed run keeps the same. It
    reads numbers where the completions table does, draws nothing, and changes nothing.
    """

    def __init__(
        self, algorithm: Algorithm, tokenizer: Any, accelerator: Accelerator, seed: int, completions: int | str
    ):
        self.algorithm, self.tokenizer, self.accelerator, self.seed = algorithm, tokenizer, accelerator, seed
        self.keeps_all = completions == ALL
        self.limit = SHOWN if isinstance(completions, str) else completions
        self._reference = reference_column(algorithm.rewards)
        self._chosen: set[int] = set()
        self._rows: dict[int, tuple[list[int], Row]] = {}
        """By the identity of the list of a row's tokens, which is kept so that no other list takes it on."""
        self._sample: Sample | None = None

    def begin(self, index: int, steps: int) -> None:
        """Choose the groups of rollout number `index`, in a run of so many optimizer steps."""
        self._rows, self._sample, self._chosen = {}, None, set()
        rollouts = -(-steps // self.algorithm.steps_per_rollout)
        if self.limit and self.accelerator.is_main_process and index in recorded(rollouts):
            processes, prompts = self.accelerator.num_processes, self.algorithm.rollout.prompts
            own = range(0, prompts, processes)  # the groups of the first process in the first round
            self._chosen = {own[i] for i in permutation(len(own), self.seed, "report", index)[:GROUPS]}

    def references(self, rollouts: Rollouts) -> dict[str, list[Any]]:
        """Return the reference answers as a column of texts, "" where there is none."""
        found = None if self._reference is None else rollouts.column(self._reference)
        return {} if found is None else {"reference": ["" if x is None else x for x in found]}

    def saw(self, rollouts: Rollouts, collected: Collected) -> None:
        """Take the rows of a round as they were scored, before any is dropped."""
        rows = [i for i, group in enumerate(rollouts.group_ids) if self.keeps_all or group in self._chosen]
        if not rows:
            return
        places = collected.places[torch.tensor(rows, device=collected.places.device)]
        labels = self.algorithm.labels()
        numbers = {label: collected.table[f"score:{label}"][places].tolist() for label in labels}
        totals = collected.table["total"][places].tolist() if labels else [None] * len(rows)
        references = None if self._reference is None else rollouts.column(self._reference)
        for k, i in enumerate(rows):
            ids = rollouts.completion_ids[i]
            row = Row(
                texts={name: values[i] for name, values in collected.texts.items()},
                rewards={label: _finite(x[k]) for label, x in numbers.items()},
                total=_finite(totals[k]),
                ids=ids,
                mask=rollouts.masks[i],
                group=rollouts.group_ids[i],
                prompt=rollouts.prompts[i],
                reference=None if references is None else references[i],
                forks=rollouts.forks[i] if rollouts.forks else [],
            )
            self._rows[id(ids)] = (ids, row)

    def select(self, collected: Collected, keep: Tensor, why: str) -> Collected:
        """Return the rows where `keep` is True, and note of the others why they were dropped."""
        kept = collected.select(keep)
        if self._rows and kept is not collected:
            left = set(map(id, kept.completion_ids))
            for ids in collected.completion_ids:
                if id(ids) not in left and id(ids) in self._rows:
                    self._rows[id(ids)][1].dropped = why
        return kept

    def credited(self, collected: Collected) -> None:
        """Take the advantages and log-probs of the rows that have some."""
        found = [(i, self._rows[id(ids)][1]) for i, ids in enumerate(collected.completion_ids) if id(ids) in self._rows]
        if not found:
            return
        rows = collected.rows
        advantages, mask = rows["advantages"], rows["mask"]
        mean = ((advantages * mask).sum(1) / mask.sum(1).clamp(min=1)).tolist()
        for i, row in found:
            row.advantage = _finite(mean[i])
        shown = [(i, row) for i, row in found if row.group in self._chosen]
        logps = rows.get("old_logps", rows.get("sampler_logps"))
        wanted = {"advantage": advantages, "logp": logps, "ref": rows.get("ref_logps")}
        index = torch.tensor([i for i, _ in shown], dtype=torch.long, device=mask.device)
        for name, x in wanted.items():
            for (_, row), values in zip(shown, [] if x is None else x[index].tolist(), strict=False):
                row.tokens[name] = values

    def keep(self, buffer: Buffer, step: int, log: RunLog, update: Buffer) -> None:
        """Give the completions of a rollout to the log, and start its sample. `step`: optimizer steps taken so far; `update`: the
        rows that this process updates on."""
        texts, numbers = buffer.extra.pop("texts"), buffer.extra.pop("numbers")
        if self.algorithm.environment:
            masks = buffer.rows["mask"][: self.limit].tolist()
            cuts = buffer.forks or [[]] * len(masks)
            parts = zip(buffer.completion_ids, masks, cuts, strict=False)
            texts |= {"conversation": [self._spans(*part) for part in parts]}
        log.completions = completion_rows(
            step, texts, numbers, buffer.rows["advantages"], buffer.rows["mask"], self.limit
        )
        if self.keeps_all:
            rows = self._gathered(step)
            log.write_rows(rows if self.accelerator.is_main_process else [], step + 1)
        shown = [row for _, row in self._rows.values() if row.group in self._chosen]
        if shown:
            place = {id(ids): i for i, ids in enumerate(update.completion_ids)}
            for row in shown:
                row.place = place.get(id(row.ids))
            self._sample = Sample(step=step, rows=shown, tokenizer=self.tokenizer)
        self._rows = {}

    def note(self, micro: dict[str, Any], logps: Tensor) -> None:
        """Take the log-probs of a micro-batch of the first optimizer step, where none are known before it."""
        if self._sample is not None and "row" in micro and not any("logp" in row.tokens for row in self._sample.rows):
            self._sample.noted.append((micro["row"], logps.detach()))

    def take(self) -> Sample | None:
        """Return the sample after the first optimizer step on its rollout."""
        sample, self._sample = self._sample, None
        return sample

    def _spans(self, ids: list[int], mask: Sequence[float], forks: Sequence[Fork]) -> list[dict[str, Any]]:
        """Return the runs of tokens that do and do not train, as the column `conversation` has them, each fork behind the
        context that it was asked with."""
        found: list[dict[str, Any]] = []
        starts = [0, *(start for start, _ in forks)]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
            if number:
                (context,) = pieces_of(self.tokenizer, [list(forks[number - 1][1])])
                found.append({"mask": 0, "fork": True, "text": "".join(context)})
            spans = spans_of(self.tokenizer, ids[start:end], mask[start:end])
            found += [{"mask": span.mask, "text": span.text} for span in spans]
        return found

    def _gathered(self, step: int) -> list[dict[str, Any]]:
        """Return every row of all processes, in the order of groups."""
        rows = [row for _, row in self._rows.values()]
        if self.algorithm.environment:
            for row in rows:
                row.texts["conversation"] = self._spans(row.ids, row.mask, row.forks)
        own = [_as_table_row(step, row) for row in rows]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            own = gather_object(own)
        return sorted(own, key=lambda row: row["group"])


def _as_table_row(step: int, row: Row) -> dict[str, Any]:
    reference = None if row.reference is None else as_text(row.reference)
    rewards = {f"reward/{label}": x for label, x in row.rewards.items()}
    return {
        "step": step,
        "group": row.group,
        **{name: as_text(x) for name, x in row.texts.items()},
        "reference": reference,
        **rewards,
        **({"reward/total": row.total} if rewards else {}),
        "advantage": row.advantage,
        "tokens": sum(row.mask),
        "dropped": row.dropped,
    }


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None
