"""What a process holds of the rows of a rollout, from 2 to 64 processes: threads of this one that gather from each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from hf_rlhf.config.plan import make_plan
from hf_rlhf.metrics.rollout_statistics import report_credit
from hf_rlhf.training.rollout_buffer import Collected
from hf_rlhf.training.rollout_table import RolloutTable
from tests.helpers import runs

GROUPS, SIZE, T = 2, 4, 16
"""Groups of a process, rows of a group, tokens of a row."""
NARROW = ("group_ids", "episode_ids", "agents", "finished", "total", "score:early")


class Ranks:
    """Processes that gather; `received` counts the bytes that one of them gets from the others."""

    def __init__(self, count):
        self.count, self.meet, self.sent, self.received = count, threading.Barrier(count), {}, 0

    def accelerator(self, rank):
        def gather(x):
            self.sent[rank] = x
            self.meet.wait(60)
            found = torch.cat([self.sent[i] for i in range(self.count)])
            self.meet.wait(60)
            self.received += (found.nbytes - x.nbytes) * (rank == 0)
            return found

        return SimpleNamespace(num_processes=self.count, device=torch.device("cpu"), gather=gather)


def rows_of(groups):
    """The rows of some groups; their numbers depend on the group alone."""
    columns = []
    for group in groups:
        draw = torch.Generator().manual_seed(group)
        lengths = torch.randint(1, T + 1, (SIZE, 1), generator=draw)
        mask = (torch.arange(T) < lengths).double()
        scores = torch.randint(0, 2, (SIZE,), generator=draw).double()
        last = torch.zeros(SIZE, T, dtype=torch.float64).scatter(1, lengths - 1, scores.unsqueeze(1))
        ids = torch.full((SIZE,), group)
        columns.append(
            {"mask": mask, "token_rewards": last, "old_logps": -mask, "score:early": scores, "total": scores}
        )
        columns[-1] |= {"group_ids": ids, "episode_ids": ids, "agents": ids * 0, "finished": ids >= 0}
    return {name: torch.cat([x[name] for x in columns]) for name in columns[0]}


class Step:
    """The rows that plugins got, and advantages and numbers of one process."""

    def __init__(self, algorithm, accelerator, groups):
        known, self.logged = rows_of(groups), {}
        table = RolloutTable(algorithm, accelerator)
        narrow = {name: known[name] for name in NARROW}
        wide = {name: x for name, x in known.items() if name not in narrow}
        rows, columns, places = table.gather({"mask": known["mask"], "old_logps": known["old_logps"]}, wide, narrow)
        ids = [[0]] * len(places)
        self.collected = Collected(
            prompt_ids=ids, completion_ids=ids, texts={}, rows=rows, table=columns, places=places
        )
        for chosen in algorithm.filters:
            self.collected = self.collected.select(table.keep(self.collected, chosen))
        scored, credit, over = table.credit(self.collected)
        self.asked = len(scored.mask)
        report_credit(self.logged.__setitem__, scored, credit, over)
        table.share(self.collected, "advantages", credit.advantages, over.accelerator is not None)
        self.advantages = self.collected.rows["advantages"]
        self.held = sum(x.nbytes for x in self.collected.table.values() if x.is_floating_point())


def on(processes, **parts):
    algorithm = runs.recipe(filters=["zero_variance"], **parts).algorithm()
    ranks = Ranks(processes)
    shares = [range(rank, GROUPS * processes, processes) for rank in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        steps = list(pool.map(lambda i: Step(algorithm, ranks.accelerator(i), shares[i]), range(processes)))
    whole = Step(algorithm, SimpleNamespace(num_processes=1, device=torch.device("cpu")), range(GROUPS * processes))
    for rank, step in enumerate(steps):
        mine = torch.isin(whole.collected.table["group_ids"], torch.tensor(list(shares[rank])))
        assert torch.equal(step.advantages, whole.advantages[mine])
        assert step.logged == pytest.approx(whole.logged, rel=1e-12)
    return steps, ranks.received


@pytest.mark.parametrize("processes", [2, 64])
def test_rows_of_a_process_stay_as_many_whatever_the_number_of_processes(processes):
    """Of another process's row come one byte a token for the mask and 8 for each number of the row: 20 times less than all."""
    steps, received = on(processes)
    assert max(step.asked for step in steps) <= GROUPS * SIZE
    others = (processes - 1) * GROUPS * SIZE
    assert received < others * (T + 8 * len(NARROW) + 8 * 6) + 2000 * processes
    assert max(step.held for step in steps) == 2 * 8 * len(steps[0].collected.table["total"]), "total and score"


def test_an_estimator_across_groups_gets_all_rows_and_the_filter_its_own():
    steps, _ = on(3, advantages="reinforce_plus_plus")
    assert {step.asked for step in steps} == {len(steps[0].collected.table["total"])}
    assert steps[0].asked > GROUPS * SIZE / 2


@pytest.mark.parametrize(
    ("advantages", "told"),
    [
        ("group_norm", "masks and scores alone, up to"),
        ("reinforce_plus_plus", "advantages=reinforce_plus_plus looks across groups"),
    ],
)
def test_the_plan_says_what_each_process_gets_of_the_others(advantages, told):
    algorithm = runs.recipe(advantages=advantages, rollout=runs.SAMPLED).algorithm()
    lines = {name: value for name, value, _ in make_plan(algorithm, [], processes=2).arithmetic}
    assert told in lines["rows of other processes"]
    assert "MiB" in lines["rows of other processes"]
    assert "rows of other processes" not in {name for name, *_ in make_plan(algorithm, []).arithmetic}
