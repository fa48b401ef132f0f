"""The speed benchmarks without their runs: floors are those counted by hand, both systems do the work that they are given,
and there is no ratio where they did not."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import floor, gate, micro, scaling, speed_page, systems, work
from benchmarks import trl as command
from benchmarks.engine import Ending
from benchmarks.peak import mib, peak
from benchmarks.work import EOS, FIRST_WORD, Line
from tests.helpers.paths import ROOT

SMALL = Line(name="small", vocabulary=10, hidden=8, layers=2, intermediate=4, heads=2, kv_heads=1)
TINY = Line(
    name="tiny",
    vocabulary=64,
    hidden=32,
    layers=2,
    intermediate=64,
    heads=4,
    kv_heads=2,
    prompts=2,
    longest=12,
    longest_prompt=20,
)
ONE = floor.Rates(forward=1, update=1, head_forward=1, head_update=1, decode=1, read=1)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Floors


def test_counts_are_those_of_a_hand_count():
    """A prompt of 3 tokens with completions of 2 and 4: 1 + 3 tokens predict another one."""
    assert floor.count([3], [[2, 4]]) == floor.Counts(
        prompts=3,
        groups=1,
        completions=6,
        fed=4,
        prompt_pairs=1 + 2 + 3,
        completion_pairs=4 + (4 + 5 + 6),
        rows_at=(2, 1, 1),
        cached=(3 + 2, 3 + 2, 3 + 3),
    )


def test_floors_are_those_of_a_hand_count():
    """Two layers of 64 + 32 + 32 + 64 + 3 x 32 numbers, a head of 80; 7 positions, 6 predictions, 25 pairs."""
    counts, line = floor.count([3], [[2, 4]]), replace(SMALL, beta=0.1)
    forward = 2 * 576 * 7 + 4 * 2 * 8 * 25 + 2 * 80 * 6
    found = floor.seconds(line, counts, counts, ONE)
    assert found["forward"] == forward
    assert found["update"] == 3 * forward
    assert found["optimizer"] == 7 * 4 * 656
    prefill = 2 * 576 * 3 + 4 * 2 * 8 * 6 + 2 * 80
    reads = [4 * (656 + 2 * 2 * 4 * cached) for cached in (5, 5, 6)]
    assert found["rollout"] == prefill + sum(max(2 * 656 * n, read) for n, read in zip((2, 1, 1), reads, strict=True))
    assert found["total"] == sum(found[name] for name in floor.PHASES)
    assert floor.seconds(SMALL, counts, counts, ONE)["forward"] == 0
    assert floor.seconds(replace(line, epochs=2), counts, counts, ONE)["update"] == 6 * forward


def test_a_counted_forward_has_the_products_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work.make_model(TINY)(torch.tensor([[5, 6, 7, 8, 9]]))
    products = {name: n for name, n in counter.get_flop_counts()["Global"].items() if "mm" in str(name)}
    assert sum(products.values()) == floor.trunk_flops(TINY, 5) + floor.head_flops(TINY, 5)


def test_groups_without_signal_are_not_counted_in_the_update_unless_a_kl_acts_on_them():
    prompts, lengths = [3, 5], [[2, 4], [1, 1]]
    assert floor.live(replace(SMALL, prompts=2, dead=0.5), prompts, lengths) == floor.count([5], [[1, 1]])
    assert floor.live(replace(SMALL, prompts=2, dead=0.5, beta=0.1), prompts, lengths) == floor.count(prompts, lengths)


def test_rates_are_finite_and_a_better_one_is_taken():
    rates = floor.measure(SMALL, positions=16)
    assert all(0 < x < math.inf for x in asdict(rates).values())
    assert rates.better(replace(ONE, read=1e30)) == replace(rates, read=1e30)


# The same work


def test_completions_end_once_and_at_their_length():
    lengths = work.forced_lengths(TINY, 3).tolist()
    assert [len(ids) for ids in work.script(TINY, 3)] == lengths
    assert all(ids.count(EOS) == 1 and ids[-1] == EOS for ids in work.script(TINY, 3))
    assert len(set(lengths)) > 3
    assert work.forced_lengths(TINY, 3).tolist() == lengths != work.forced_lengths(TINY, 4).tolist()
    assert work.forced_lengths(replace(TINY, lengths="full"), 0).tolist() == [12] * 16
    quantiles = work.forced_lengths(replace(TINY, lengths="quantiles", longest=128), 0)
    assert quantiles[:8].tolist() == quantiles[8:].tolist() == sorted(quantiles[:8].tolist())
    assert quantiles.float().mean() == pytest.approx(0.4 * 128, rel=0.1)


def test_prompts_have_the_lengths_asked_for_and_the_first_of_a_rollout_have_no_signal():
    rows = work.dataset(replace(TINY, prompts=4, dead=0.5), 2)
    assert [row["live"] for row in rows] == [0, 0, 1, 1] * 2
    assert all(16 <= len(row["prompt"].split()) <= 20 for row in rows)
    ids = work.make_tokenizer(64)([row["prompt"] for row in rows])["input_ids"]
    assert ids == [prompt for cycle in range(2) for prompt in work.prompt_ids(replace(TINY, prompts=4), cycle)]
    assert work.score([[3, 4], [5, 9]], [1, 0]) == [7 / 997, 0]


def test_rows_end_at_their_length_and_log_probs_stay_the_policy_s():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    log_probs = (logits / 0.7).log_softmax(-1)

    def own(logits, rows, step):
        tokens = torch.tensor([6, EOS, 7])
        chosen = log_probs.gather(1, tokens[:, None]).squeeze(1)
        logits.zero_()  # a sampler may overwrite them
        return tokens, chosen

    tokens, logps = Ending(own, torch.tensor([0, 9, 3, 0, 9]), 0.7)(logits, torch.tensor([2, 1, 4]), 2)
    assert tokens.tolist() == [EOS, FIRST_WORD, 7]
    torch.testing.assert_close(logps, log_probs.gather(1, tokens[:, None]).squeeze(1))


@pytest.mark.parametrize(
    "line",
    [replace(TINY, beta=0.04, epochs=2), replace(TINY, algorithm="rloo", beta=0.05), replace(TINY, dead=0.5)],
    ids=["grpo, KL, two epochs", "rloo, KL", "grpo, half of the groups without signal"],
)
def test_both_systems_make_completions_of_the_given_lengths_and_the_same_gradients(line, tmp_path, monkeypatch):
    for name, value in command.QUIET.items():
        monkeypatch.setenv(name, value)
    due = [work.forced_lengths(line, cycle).tolist() for cycle in range(2)]
    gradients = {}
    for system in command.SYSTEMS:
        found = systems.run(system, line, 2, tmp_path / system)
        assert found.lengths == due
        assert len(found.cycles) == 2
        assert found.peak_mib > 0
        phases = found.cycles[1].phases
        wanted = {"rollout", "reward", "update", "optimizer", "rest"} | ({"forward"} if line.beta else set())
        assert wanted <= set(phases)
        # processor time of the process: rewards and forwards that overlap hold each other's
        assert sum(phases.values()) == pytest.approx(found.cycles[1].seconds, rel=0.25)
        assert phases["rollout"] > 0
        assert phases["update"] > 0
        gradients[system] = torch.load(tmp_path / system)
    assert len(gradients["ours"]) == line.epochs
    assert systems.difference(gradients["ours"], gradients["trl"]) < command.TOLERANCE
    assert systems.difference([2 * x for x in gradients["ours"]], gradients["trl"]) == pytest.approx(1, rel=1e-3)
    assert systems.difference([], gradients["trl"]) == math.inf


def test_exact_entropy_is_measured_and_changes_nothing_else():
    made = systems.recipe(TINY, {"use": "scripted", "prompts": 2, "num_generations": 8}).algorithm()
    plain = type(made.policy_loss).__mro__[1](**vars(made.policy_loss))
    draw = torch.Generator().manual_seed(0)
    logps, old, advantages, entropy = (torch.randn(2, 3, generator=draw) for _ in range(4))
    mask = torch.ones(2, 3)
    value, metrics = made.policy_loss(logps, old, advantages, mask, entropy=entropy)
    due, others = plain(logps, old, advantages, mask)
    assert value.equal(due)
    assert metrics.pop("exact_entropy").equal(entropy)
    assert metrics.keys() == others.keys()
    assert "entropy" in made.needs


def test_peak_memory_is_what_came_on_top():
    before = torch.ones(2**24)
    with peak() as held:
        during = torch.ones(2**23)
        del during
    assert 30 < mib(held) < 60
    assert before.sum() == 2**24


# Ratios


def runs(line, ours=1.0, theirs=3.0, cycles=2):
    def of(seconds, peak_mib):
        phases = {"rollout": 0.4 * seconds, "update": 0.5 * seconds, "rest": 0.1 * seconds}
        cycle = {"seconds": seconds, "wall": 2 * seconds, "phases": phases}
        lengths = [work.forced_lengths(line, i).tolist() for i in range(cycles + 1)]
        return {"cycles": [cycle] * cycles, "peak_mib": peak_mib, "lengths": lengths}

    return {"ours": [of(ours, 100.0), of(2 * ours, 100.0)], "trl": [of(theirs, 250.0), of(2 * theirs, 250.0)]}


def test_a_row_has_ratios_of_what_ran_side_by_side():
    row = command.row_of(TINY, runs(TINY), 1e-6, ONE)
    assert row["exact"]
    assert (row["ratio"], row["ratio_range"], row["wall_ratio"], row["memory_ratio"]) == (3.0, [3.0, 3.0], 3.0, 0.4)
    assert row["ours"]["seconds"] == 1.5
    assert row["ours"]["range"] == [1.0, 2.0]
    assert row["floor_fraction"] == row["floor_seconds"]["total"] / 1.5
    tokens = sum(int(work.forced_lengths(TINY, cycle).sum()) for cycle in (1, 2)) / 2
    assert row["ours"]["tokens_per_second"] == tokens / 1.5


def test_there_is_no_ratio_where_the_systems_did_not_do_the_same():
    wrong = runs(TINY)
    wrong["trl"][1]["lengths"][2][0] += 1
    for row in (
        command.row_of(TINY, runs(TINY), 1e-3, ONE),
        command.row_of(TINY, runs(TINY), math.inf, ONE),
        command.row_of(TINY, runs(TINY), math.nan, ONE),
        command.row_of(TINY, wrong, 1e-6, ONE),
    ):
        assert not row["exact"]
        assert [row[name] for name in ("ratio", "ratio_range", "wall_ratio", "memory_ratio")] == [None] * 4
        assert command.result([row], "x", 1, 2)["geometric_mean"] is None
        assert "**not the same work**" in speed_page.times_table([row])


def test_the_command_fails_where_the_systems_did_not_do_the_same(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "trl.json"
    monkeypatch.setattr(command, "compare", lambda line, *rest: command.row_of(line, runs(line), 1e-3, ONE))
    monkeypatch.setattr(sys, "argv", ["trl", "--only", "grpo-wide", "--json", str(path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert "no ratio" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["ratio"] is None


def test_the_update_alone_is_compared_where_groups_have_no_signal_and_it_enters_no_mean():
    dead = replace(TINY, dead=0.5)
    rows = [command.row_of(TINY, runs(TINY), 0.0, ONE), command.row_of(dead, runs(dead, theirs=5.0), 0.0, ONE)]
    assert rows[1]["ours"]["seconds"] == 0.75
    assert rows[1]["ratio"] == pytest.approx(5)
    assert rows[1]["floor_fraction"] == rows[1]["floor_seconds"]["update"] / 0.75
    found = command.result(rows, "x", 2, 2)
    assert found["geometric_mean"] == pytest.approx(3)
    assert found["memory_geometric_mean"] == pytest.approx(0.4)
    assert command.geometric_mean([2.0, 8.0]) == pytest.approx(4)


def test_the_result_has_the_keys_that_others_read():
    found = command.result([command.row_of(TINY, runs(TINY), 0.0, ONE)], "x", 2, 2)
    assert {"geometric_mean", "memory_geometric_mean", "rows", "versions", "machine"} <= found.keys()
    assert {"work", "ratio", "memory_ratio", "floor_fraction", "exact", "ours", "trl"} <= found["rows"][0].keys()
    assert json.loads(json.dumps(found)) == found


def test_lines_are_found_by_name_and_come_back_from_json():
    assert len({line.name for line in command.LINES}) == len(command.LINES) == 12
    assert set(command.QUICK) <= {line.name for line in command.LINES}
    for line in command.LINES:
        assert command.read_line(line.name) == line == command.read_line(json.dumps(asdict(line)))
        assert line.rows % systems.THEIR_ROWS == 0


# Growth


def test_fits_find_powers_and_slopes():
    assert scaling.fit([1, 2, 4], [3, 12, 48], "log") == pytest.approx({"exponent": 2, "factor": 3})
    assert scaling.fit([1, 2, 4], [3, 5, 9], "linear") == pytest.approx({"slope": 2, "start": 1, "slope_error": 0})
    assert scaling.fit([0, 1, 2], [0, 0, 3], "linear")["slope_error"] == pytest.approx(math.sqrt(1.5 / 2))
    with pytest.raises(ValueError, match="two different places"):
        scaling.fit([2, 2], [1, 2], "linear")


def growth():
    sweep = scaling.sweeps()[0]
    points = [
        {"at": at, "lengths_met": True, "seconds": seconds, "peak_mib": {"ours": 1.0, "trl": 2.0}, "ratio": 2.0}
        for at, seconds in ((8, {"ours": 1.0, "trl": 4.0}), (16, {"ours": 2.0, "trl": 12.0}))
    ]
    return {"command": "x", "sweeps": [scaling.swept(sweep, points)]}


def test_a_further_completion_is_compared_with_trl_s():
    found = growth()["sweeps"][0]
    assert found["slope_ratio"] == pytest.approx(8)
    assert "TRL: 1000.0 ms for each further one; ours: 125.0 ms for each further one; TRL's over ours 8.0" in (
        speed_page.scaling_section(growth())
    )


def test_sweeps_change_one_thing_and_trl_takes_part_where_it_can():
    for sweep in scaling.sweeps():
        lines = [asdict(line) for _, line in sweep.points]
        changed = {name for name in lines[0] if len({line[name] for line in lines}) > 1}
        assert len(changed) == 1 or sweep.name == "model"
        assert len({at for at, _ in sweep.points}) == len(sweep.points) >= 3
        assert sweep.systems == (("ours",) if changed & {"kls", "filters"} else command.SYSTEMS)
        assert all(line.rows % systems.THEIR_ROWS == 0 for _, line in sweep.points)
    assert all(len(sweep.points) == 2 for sweep in scaling.sweeps(quick=True))


# Parts alone


def test_every_head_gives_the_same_gradients():
    found = micro.head(32, 5, 1)
    assert len(found["entries"]) == 4
    assert all(entry["apart by"] < 1e-5 for entry in found["entries"])
    assert found["base"] == "matrix product and log_softmax"


def test_packed_rows_pass_the_trunk_as_counted():
    found = {entry["variant"]: entry for entry in micro.packing(TINY, 1)["entries"]}
    lengths, prompts = work.forced_lengths(TINY, 0), [len(ids) for ids in work.prompt_ids(TINY, 0)]
    fed = int((lengths - 1).sum())
    assert found["packed, prompts shared"]["positions"] == sum(prompts) + fed
    assert found["packed, other prompts"]["positions"] == TINY.group * sum(prompts) + fed
    assert all(entry["apart by"] < 1e-5 for entry in found.values())


def test_samplers_report_log_probs_of_what_they_drew():
    found = {entry["variant"]: entry for entry in micro.sampling(50, 4, 1)["entries"]}
    assert found["ours with log-probs"]["apart by"] < 1e-5


def test_dispatch_is_timed_for_each_stage():
    found = micro.dispatch(10, 1)
    assert len(found["entries"]) == 6
    assert "times faster" not in speed_page.micro_section({"parts": [found]})


# The page


def test_the_page_has_what_was_measured_and_says_what_was_not():
    rows = [command.row_of(TINY, runs(TINY), 0.0, ONE)]
    found = {"trl": command.result(rows, "x", 2, 2), "scaling": growth()}
    text = speed_page.page(found)
    assert "TRL takes **3.00** times our time, our peak memory is **0.40** of TRL's" in text
    assert text.count("Not measured yet.") == 1
    assert "| tiny | 4.50 (3.00-6.00) | 1.50 (1.00-2.00) | **3.00** |" in text
    assert speed_page.trl_section(found["trl"]) in text


def test_the_picture_has_a_panel_per_axis_with_both_curves():
    (panel,) = [panel for panel in speed_page.picture(growth()).axes if panel.lines]
    assert panel.get_title() == "Completions"
    assert panel.get_xlabel() == "completions of one prompt"
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in panel.lines}
    assert curves == {"TRL": [[8, 4], [16, 12]], "ours": [[8, 1], [16, 2]]}


@pytest.mark.skipif(not (ROOT / "docs" / "benchmarks.md").is_file(), reason="the benchmarks have not run")
def test_the_page_is_made_from_the_results():
    found = speed_page.results()
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == speed_page.page(found), "run with --page"
    titles = [panel.get_title() for panel in speed_page.picture(found["scaling"]).axes if panel.lines]
    assert titles == [sweep["title"] for sweep in found["scaling"]["sweeps"]]
    assert (ROOT / "docs" / "scaling.png").is_file()


@pytest.mark.parametrize("slower", [1.0, 1.2])
def test_the_gate_tells_a_fifth_more_time_from_noise(slower):
    draw = random.Random(1)
    before, now = ([x * (1 + abs(draw.gauss(0, 0.03))) for _ in range(6)] for x in (1.0, slower))
    least, low, high = gate.ratio(now, before)
    assert low <= least <= high
    assert (low > gate.LIMIT) == (slower > 1)


def test_the_gate_refuses_a_baseline_that_is_no_commit(tmp_path):
    with pytest.raises(SystemExit, match="0000000 must be a commit"):
        gate.install("0000000", tmp_path)
