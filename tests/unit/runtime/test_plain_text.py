"""No text from outside can steer a terminal or pass for a message of its own."""

from __future__ import annotations

import io
import json
import logging
import sys
import unicodedata

import pytest

from hf_rlhf.cli import errors
from hf_rlhf.cli.output import print_json, table
from hf_rlhf.metrics.console import _short
from hf_rlhf.runtime.errors import UserError
from hf_rlhf.runtime.plain_text import PlainHandler, PlainStream, clean_all_logs, escaped, indented
from hf_rlhf.scoring.runners.reward_call import failed

HOSTILE = {
    "colour": "\x1b[2J\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://x.invalid\x1b\\click\x1b]8;;\x1b\\",
    "eight-bit sequence": "\x9b31m and \x90q\x9c",
    "line feed": "fine\nerror: forged",
    "carriage return": "fine\rerror: forged",
    "both": "fine\r\nerror: forged",
    "line separator": "fine\u2028error: forged",
    "paragraph separator": "fine\u2029error: forged",
    "next line": "fine\x85error: forged",
    "vertical tab": "fine\x0berror: forged\x0c",
    "NUL": "a\x00b",
    "backspace": "secure\b\b\b\b\b\bforged\x7f",
    "surrogate": "a\ud800b\udfff",
    "directions": "\u202eevil\u202c \u2066x\u2069 \u200f\u061c",
    "tags": "\U000e0041\U000e007f",
    "zero width": "pass\u200bword\ufeff\u2060",
}
GOOD = {
    "Chinese": "答案是\u3000四",
    "Persian": "می\u200cخواهم",
    "family": "👨\u200d👩\u200d👧",
    "French": "prix\u00a0: 3 €",
    "math": "∑ x² ≤ 4",
}
OBEYED = ("Cc", "Cs", "Zl", "Zp", "Cf")


def steers(text: str) -> list[str]:
    """Characters that a terminal or a reader might obey, apart from line feeds and the joiners of ordinary text."""
    return [c for c in text if unicodedata.category(c) in OBEYED and c not in "\n\u200c\u200d"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_might_be_obeyed_is_shown(name):
    for made in (escaped(HOSTILE[name]), indented(HOSTILE[name])):
        assert not steers(made)
        assert made.encode()
        assert escaped(made, "\n") == made, "a second time it changes nothing"
    assert "\n" not in escaped(HOSTILE[name])
    assert not any(line.startswith("error: forged") for line in indented(HOSTILE[name]).splitlines())


@pytest.mark.parametrize("name", GOOD)
def test_ordinary_text_is_left_alone(name):
    assert escaped(GOOD[name]) == GOOD[name] == indented(GOOD[name])


@pytest.fixture
def terminal():
    """What a handler of the program's own writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


def is_plain(text: str, forged: str = "error: forged") -> bool:
    lines = text.splitlines()
    return not steers(text) and not any(line.startswith(forged) for line in lines) and bool(lines)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("logger", ["hf_rlhf.scoring.scorer", "hf_rlhf_plugins.rewards.judge"])
def test_logs_are_plain_for_every_handler(name, logger, terminal):
    own = logging.getLogger(logger)
    own.warning("said %s", HOSTILE[name])
    own.warning(HOSTILE[name])
    own.warning("%(x)s", {"x": HOSTILE[name]})
    try:
        raise ValueError(HOSTILE[name])
    except ValueError:
        own.warning("failed", exc_info=True)
        own.exception("failed, with %s", HOSTILE[name])
    assert is_plain(terminal.getvalue())


def test_logs_without_a_handler_are_printed_once_and_plain(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    clean_all_logs()
    for name in ("hf_rlhf.x", "someone_else"):
        logging.getLogger(name).warning("said %s", HOSTILE["colour"] + HOSTILE["line feed"])
        logging.getLogger(name).info("not shown")
    shown = capsys.readouterr().err
    assert is_plain(shown)
    assert shown == 2 * "said \\x1b[2J\\x1b[31mredfine\n  error: forged\n"


def test_a_record_with_wrong_arguments_stops_nobody():
    record = logging.LogRecord("hf_rlhf.x", logging.WARNING, "x.py", 1, "%d rows", ("many",), None)
    PlainHandler().handle(record)
    assert (record.msg, record.args) == ("%d rows", ("many",)), "whichever handler prints it reports the mistake"


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [UserError, ValueError])
@pytest.mark.parametrize("traceback", ["", "1"])
def test_errors_are_printed_plain(name, kind, traceback, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_RLHF_TRACEBACK", traceback)
    monkeypatch.setenv("HF_RLHF_CACHE", str(tmp_path))
    error = kind(HOSTILE[name])
    error.add_note(HOSTILE[name])
    try:
        raise error
    except kind:
        errors.report(error)
    assert is_plain(capsys.readouterr().err)
    for file in tmp_path.iterdir():
        assert not steers(file.read_text())


@pytest.mark.parametrize("name", HOSTILE)
def test_reasons_of_failed_rewards_are_one_plain_line(name):
    class Odd(Exception):
        def __str__(self) -> str:
            return HOSTILE[name]

    found = failed(Odd())
    assert not steers(found.reason)
    assert "\n" not in found.reason
    assert is_plain(found.trace)


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_and_json_are_plain(name, capsys):
    table(["name", "value"], [[HOSTILE[name], "1"]])
    shown = capsys.readouterr().out
    assert not steers(shown)
    assert len(shown.splitlines()) == 2
    print_json({HOSTILE[name]: [HOSTILE[name]]})
    shown = capsys.readouterr().out
    assert not steers(shown)
    assert json.loads(shown) == {HOSTILE[name]: [HOSTILE[name]]}
    assert not steers(_short(HOSTILE[name]))
    assert "\n" not in _short(HOSTILE[name])


def test_a_stream_is_plain_and_stays_open(capsys):
    stream = PlainStream(sys.stderr)
    print("a\x1b[2Jb\ud800", file=stream)
    stream.writelines(["x\r", "y\n"])
    stream.close()
    print("still here", file=stream, flush=True)
    assert capsys.readouterr().err == "a\\x1b[2Jb\\ud800\nx\\ry\nstill here\n"
