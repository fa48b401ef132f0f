"""Numbers, trends and phases of the live view; what it costs; completions that would garble a terminal."""

from __future__ import annotations

import io
import json
import math
import random
import threading
import time

import pytest
from rich.console import Console

from hf_rlhf.metrics.console import show_sample
from hf_rlhf.metrics.live_view import SHOWN, LiveView, Numbers, arrow, console, duration, sparkline, table
from hf_rlhf.runtime.activity import current, doing


def names() -> list[str]:
    return [activity.name for activity in current()]


def test_the_innermost_activity_of_each_thread_is_current() -> None:
    assert names() == []
    with doing("outer"):
        with doing("inner"):
            assert names() == ["inner"]
        assert names() == ["outer"]
        seen: list[list[str]] = []

        def beside() -> None:
            with doing("beside"):
                seen.append(names())

        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        assert seen == [["outer", "beside"]]
    with doing("of parts", whole=True):
        assert names() == ["of parts"]
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        assert seen[1] == ["beside"]
    assert names() == []


def test_an_activity_ends_with_an_error_and_decorates_functions() -> None:
    @doing("decorated")
    def fails() -> None:
        assert names() == ["decorated"]
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
    assert names() == []


def test_an_activity_costs_microseconds() -> None:
    def each(count: int = 2000) -> float:
        started = time.perf_counter()
        for _ in range(count):
            with doing("x"):
                pass
        return (time.perf_counter() - started) / count

    assert min(each() for _ in range(5)) < 1e-4


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 2, 3, 4, 5], ""),
        ([1, 2, 3, 4, 5, 6], "↑"),
        ([6, 5, 4, 3, 2, 1], "↓"),
        ([1] * 20, "→"),
        ([1] * 36 + [2] * 4, "↑"),
        ([0, 1] * 20, "→"),
    ],
)
def test_arrows_follow_the_newest_values(values: list[float], shown: str) -> None:
    assert arrow(values) == shown


def test_noise_seldom_has_a_direction() -> None:
    drawn = random.Random(0)
    wrong = sum(arrow([drawn.gauss(0, 1) for _ in range(60)]) != "→" for _ in range(400))
    assert wrong < 40  # two standard errors: 5 % of the time, a little more with 12 values


def test_sparklines_span_the_history_from_its_lowest_to_its_highest_value() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(list(range(80)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 3.0, 3.0], 8) == "▁▁▁"
    assert sparkline([1.0], 8) == ""
    assert sparkline([1.0, 2.0], 0) == ""
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert set(sparkline([math.sin(x) for x in range(500)], 40)) <= set("▁▂▃▄▅▆▇█")


def test_held_out_accuracy_replaces_the_held_out_reward() -> None:
    numbers = Numbers(SHOWN)
    numbers.add({"eval_accuracy": 0.5, "eval_reward/total/mean": 0.7})
    assert [row[:2] for row in numbers.rows(0)] == [("held-out accuracy", "0.5")]
    numbers.add({"reward/total/mean": 1.0, "loss": 0.0})
    numbers.restart()
    assert [row[0] for row in numbers.rows(0)] == ["held-out accuracy"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (17.9, "17 s"), (125, "2:05"), (3725, "1:02:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def on_terminal(width: int, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    return Console(file=file, width=width, force_terminal=True, highlight=False, _environ={"TERM": "xterm"})


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_picture_is_within_the_width_and_redraws_in_milliseconds(width: int) -> None:
    view = LiveView(on_terminal(width))
    view.begin(1000, 0)
    for step in range(1000):
        view.numbers.add({metric: float(step % 7) for metric in SHOWN.values()})
    view.advance(1000)

    def drawn() -> float:
        started = time.process_time()
        lines = view.out.render_lines(view.picture(), view.out.options)
        assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
        return time.process_time() - started

    assert min(drawn() for _ in range(5)) < 0.02


def test_an_encoding_without_bars_gets_none() -> None:
    out = on_terminal(60, encoding="ascii")
    out.print(table(Rows, ascii_only=out.options.ascii_only))
    assert out.file.buffer.getvalue()  # type: ignore[attr-defined]


Rows = [("reward", "0.5", "↑", "▁█")]


def test_whoever_prints_meanwhile_gets_the_console_of_the_view() -> None:
    view = LiveView(on_terminal(60))
    with view:
        assert console() is view.out
    assert console() is not view.out
    view.stop()  # a second time


def test_a_view_that_cannot_be_drawn_changes_nothing() -> None:
    out = Console(file=io.StringIO(), width=80)
    with LiveView(out) as view:
        view.begin(3, 0)
        view.advance(1)
        assert view.live is None
    assert out.file.getvalue() == ""  # type: ignore[attr-defined]


def test_other_processes_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not LiveView(on_terminal(60)).draws


def sample(width: int, **row: object) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    show_sample({"prompt": "1+1=", "completion": "2", **row}, 7, out)
    return str(out.file.getvalue())  # type: ignore[attr-defined]


def test_a_completion_is_shown_with_its_prompt_reference_and_rewards() -> None:
    said = sample(80, reference="2", **{"reward/total": 1.5, "reward/math": 1.0, "reward/length": 0.5})
    assert said.splitlines()[0] == "completion at step 7, reward 1.5 (math 1, length 0.5)"
    assert [line.split() for line in said.splitlines()[1:]] == [
        ["prompt", "1+1="],
        ["reference", "2"],
        ["completion", "2"],
    ]
    assert "reference" not in sample(80)
    assert "reward" not in sample(80, reference="")


def test_a_conversation_is_shown_in_place_of_the_completion_with_masked_text_dim() -> None:
    spans = [{"mask": 1, "text": "5<eos>"}, {"mask": 0, "text": "no\n" + "again\n" * 20}, {"mask": 1, "text": "2<eos>"}]
    row = {"prompt": "1+1=", "completion": "5no2", "conversation": json.dumps(spans)}
    out = Console(file=io.StringIO(), width=60, highlight=False, force_terminal=True, color_system="standard")
    show_sample(row, 7, out)
    said = str(out.file.getvalue())  # type: ignore[attr-defined]
    assert "5<eos>\x1b[2mno" in said
    assert "completion  " not in said
    assert "more characters" in said
    assert "2<eos>" not in said
    assert "5<eos>no" in sample(60, conversation=json.dumps(spans))


def test_a_completion_cannot_garble_the_terminal() -> None:
    said = sample(60, completion="\x1b[2Jgone\r\x07 \u202e right to left\n" + "x" * 5000, **{"reward/total": None})
    assert "\x1b" not in said
    assert "\r" not in said
    assert "\u202e" not in said
    assert "\\x1b[2Jgone" in said
    assert "more characters" in said
    assert max(map(len, said.splitlines())) <= 60
    assert len(sample(60, completion="line\n" * 500).splitlines()) < 20
