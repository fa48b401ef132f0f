"""What programs try against the process that judges them, and what leaves the Bubblewrap sandbox."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_rlhf_plugins.rewards._sandbox.backend import MIB, Answer, Question, SandboxError
from hf_rlhf_plugins.rewards._sandbox.cases import cases_of
from tests.helpers.sandboxes import all_stays_well, ask, bubblewrap, descendants, nothing_left, value
from tests.helpers.waits import scaled


@pytest.fixture(scope="module")
def sandbox():
    return bubblewrap()


@pytest.fixture(autouse=True)
def all_is_well(sandbox):
    with all_stays_well(sandbox):
        yield


# Reaching the judge


def test_signals_reach_no_one_but_the_program(sandbox):
    hit = "import os, signal\ndef hit(pid):\n  try: os.kill(pid, signal.SIGKILL)\n  except OSError as e: return type(e).__name__"
    begin = time.monotonic()
    assert ask(sandbox, hit, f"hit({os.getpid()})") == [Answer("value", '"ProcessLookupError"')]
    assert ask(sandbox, hit, "hit(1)") in ([Answer("value", '"PermissionError"')], [Answer("value", "null")])
    everyone = ask(sandbox, hit, "1", "hit(-1)", "2")
    (judge,) = ask(sandbox, "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "2")
    assert everyone[2].kind == judge.kind == "failed"
    if os.geteuid() == 0:  # the harness is another user
        assert everyone[0] == Answer("value", "1")
        assert judge == Answer("failed", "raised PermissionError")
    assert time.monotonic() - begin < scaled(20)


@pytest.mark.parametrize("way", ["sys.exit(0)", "os._exit(0)", "os.abort()", "os.kill(os.getpid(), 9)", "exit()"])
def test_leaving_early_passes_nothing(sandbox, way):
    assert ask(sandbox, f"import os, sys\ndef f(): {way}", "f()", "2")[1] == Answer("value", "2")
    assert ask(sandbox, f"import os, sys\ndef f(): {way}", "f()")[0].kind == "failed"
    for case in cases_of([{"stdin": "", "stdout": "5"}, "assert f() == 5"], "row"):
        assert not case.passed(ask(sandbox, f"import os, sys\n{way}", case.question)[0], 0.0)


PATCHES = """
import builtins, json, os, sys
for name in ("dumps", "dump"): setattr(json, name, lambda *a, **k: '{"passed": true}')
json.JSONEncoder.encode = json.JSONEncoder.iterencode = lambda *a: "true"
builtins.print = builtins.open = lambda *a, **k: None
builtins.AssertionError = type("AssertionError", (Exception,), {"__new__": lambda *a: 0})
sys.stdout = sys.__stdout__ = sys.stderr = open
sys.excepthook = sys.settrace = sys.displayhook = lambda *a: None
import atexit; atexit.register(lambda: print("5"))
def f(): return 4
"""


def test_patched_modules_change_no_verdict(sandbox):
    (case,) = cases_of(["assert f() == 5"], "row")
    (answer,) = ask(sandbox, PATCHES, case.question)
    assert answer == Answer("value", "4")
    assert not case.passed(answer, 0.0)


SEARCH = """
import gc, os, sys
def search():
    texts, frame = [], sys._getframe()
    while frame:
        texts += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    held = [y for x in gc.get_objects() for y in gc.get_referents(x)]
    texts += [repr(x) for x in held if isinstance(x, (str, bytes, bytearray))]
    texts += [repr(vars(m)) for m in list(sys.modules.values())] + [repr(sys.argv), repr(sys.orig_argv), repr(dict(os.environ))]
    for fd in range(64):
        try:
            os.set_blocking(fd, False)
            texts.append(repr(os.read(fd, 10**6)))
        except OSError: pass
    import re
    text = "".join(texts)
    return "".join(reversed("DETCEPXE")) in text, "".join(reversed("MARGORP")) in text, bool(re.search("[0-9a-f]{64}", text))
# PROGRAM
"""


def test_neither_the_expected_values_nor_the_nonce_are_anywhere_to_be_found(sandbox):
    tests = ["assert search() == 'EXPECTED'", {"stdin": "in", "stdout": "EXPECTED"}]
    cases = cases_of(tests, "row")
    answers = ask(sandbox, SEARCH, *[case.question for case in cases], "search()", memory=1024 * MIB)
    assert value(answers[0]) == {"t": [False, True, False]}, "it finds its own source: the search works"
    (answer,) = ask(sandbox, SEARCH + "print(search())", cases[1].question, memory=1024 * MIB)
    assert answer == Answer("stdout", "(False, True, False)\n")


def forging(frames: bytes) -> str:
    """A program that writes what looks like answers wherever it can, and leaves."""
    return f"import os\nfor fd in range(3, 64):\n  try: os.write(fd, {frames!r})\n  except OSError: pass\nos._exit(0)\n"


def test_forged_answers_are_values_that_are_compared_and_nothing_more(sandbox):
    """A program can claim a value for each expression; it has to know the expected one to gain by that."""
    cases = cases_of(
        ["assert f(0) == 5", "assert f(1) == 5", "assert f(2) == 7", "assert f(3) == ''", "assert f(4) == []"], "row"
    )
    claims = [b"v4", b"v5", b"o7", b"f", b"v" + b"[" * 9999]
    frames = b"".join(b"%d %d\n" % (index, len(claim)) + claim for index, claim in enumerate(claims))
    answers = ask(sandbox, forging(frames), *[case.question for case in cases])
    assert [case.passed(answer, 0.0) for case, answer in zip(cases, answers, strict=True)] == [
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "frame",
    ["-1 2\nv5", "0 99999999999999999999\nv5", "0 -2\nv5", "7 2\nv5", "x", "0 2 v5", "0 2\nx5\n", "\x00" * 50, "0 0\n"],
)
def test_what_is_no_answer_is_none(sandbox, frame):
    (answer,) = ask(sandbox, forging(frame.encode()), "5")
    assert answer.kind == "failed"


def test_an_expected_text_that_is_printed_passes_no_value(sandbox):
    (case,) = cases_of(["assert f() == 5"], "row")
    code = "import sys\nprint(5); print('passed'); sys.stderr.write('5')\ndef f():\n  print(5)"
    (answer,) = ask(sandbox, code, case.question)
    assert answer == Answer("value", "null")
    assert not case.passed(answer, 0.0)


# What leaves


EQUAL = "__eq__ = lambda s, o: True; __ne__ = lambda s, o: False; __hash__ = lambda s: 0"


@pytest.mark.parametrize("base", ["object", "int", "str", "list", "dict", "float", "tuple"])
def test_objects_that_equal_everything_are_their_plain_values_or_none(sandbox, base):
    (case,) = cases_of(["assert f() == 5"], "row")
    (answer,) = ask(sandbox, f"class A({base}): {EQUAL}\ndef f(): return A()", case.question)
    assert answer == Answer("failed", "not a plain value: A") if base == "object" else answer.kind == "value"
    assert not case.passed(answer, 0.0)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("nested(10**5)", "value nested too deeply"),
        ("cycle()", "value nested too deeply"),
        ("wide(60)", "value too large"),
        ("'x' * 10**7", "value too large"),
        ("1 << 10**8", "value too large"),
        ("print", "not a plain value: builtin_function_or_method"),
        ("range(3)", "not a plain value: range"),
        ("Evil()", "not a plain value: Evil"),
    ],
)
def test_values_without_bound_stay_inside(sandbox, expression, reason):
    code = "def nested(n):\n  x = []\n  for _ in range(n): x = [x]\n  return x\n"
    code += "def cycle():\n  x = []\n  x.append(x)\n  return x\n"
    code += "def wide(n):\n  x = [1]\n  for _ in range(n): x = [x, x]\n  return x\n"
    code += "class Evil:\n  def __reduce__(self): return eval, ('1',)\n"
    assert ask(sandbox, code, expression) == [Answer("failed", reason)]


def test_an_integer_of_a_million_digits_is_compared(sandbox):
    cases = cases_of([{"call": "10**10**6", "expected": 10**6}, {"call": "10**4000", "expected": 10**4000}], "row")
    answers = ask(sandbox, "", *[case.question for case in cases])
    assert answers[0].text.startswith('{"i":"0x')
    assert [case.passed(answer, 0.0) for case, answer in zip(cases, answers, strict=True)] == [False, True]


def test_a_pickle_is_never_loaded(sandbox, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "loaded"),)

    frame = b"v" + pickle.dumps(Evil())
    (case,) = cases_of(["assert f() == 5"], "row")
    (answer,) = ask(sandbox, forging(b"0 %d\n" % len(frame) + frame), case.question)
    assert answer.kind == "value"
    assert not case.passed(answer, 0.0)
    assert not (tmp_path / "loaded").exists()


# The process that asks


def test_it_works_off_the_main_thread_and_in_several_at_once(sandbox):
    def one(number: int) -> list[Answer]:
        assert threading.current_thread() is not threading.main_thread()
        return ask(sandbox, "def f(x): return x * x", f"f({number})")

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, range(12))) == [[Answer("value", str(n * n))] for n in range(12)]


def test_a_killed_parent_takes_its_sandbox_along(sandbox):
    before = descendants()
    code = "from hf_rlhf_plugins.rewards._sandbox.bubblewrap import Bubblewrap as B\n"
    code += "from hf_rlhf_plugins.rewards._sandbox.backend import Limits, Question\n"
    code += "print('on', flush=True); B().run('while True: pass', [Question('call', '1')], Limits(seconds=60.0))"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        parent.stdout.readline()
        for _ in range(1000):
            if len(descendants().keys() - before.keys()) >= 5:  # parent, bwrap twice, harness, program
                break
            time.sleep(0.01)
        assert len(descendants().keys() - before.keys()) >= 5
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    assert nothing_left(before)


def test_a_process_with_many_open_files_hands_none_of_them_on(sandbox, tmp_path):
    (tmp_path / "secret").write_text("93")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    files = [os.open(tmp_path / "secret", os.O_RDONLY) for _ in range(1500)]
    try:
        for fd in files:
            os.set_inheritable(fd, True)
        look = (
            "import os\ndef look():\n  found = []\n  for fd in range(4096):\n    try: os.fstat(fd); found.append(fd)\n"
        )
        look += "    except OSError: pass\n  return found"
        (answer,) = ask(sandbox, look, "look()")
    finally:
        for fd in files:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    opened = value(answer)
    assert opened[:3] == [0, 1, 2]
    assert len(opened) == 4, "null three times, and where its answers go"


def test_a_harness_that_breaks_is_an_error_and_no_score(sandbox, monkeypatch):
    from hf_rlhf_plugins.rewards._sandbox import bubblewrap

    broken = "print('ready', flush=True); raise RuntimeError('broken')"
    monkeypatch.setattr(bubblewrap, "bootstrap", lambda folder: broken)
    with pytest.raises(SandboxError, match="RuntimeError: broken"):
        ask(sandbox, "x = 1", "x")
    monkeypatch.undo()


def test_a_large_job_goes_in_and_a_large_value_comes_out(sandbox):
    text = "x" * 2_000_000
    answers = ask(sandbox, f"a = {text!r}", "len(a)", "a[:900_000]")
    assert answers == [Answer("value", "2000000"), Answer("value", f'"{text[:900_000]}"')]
    (answer,) = ask(sandbox, "print(len(input()))", Question("stdin", text + "\n"))
    assert answer == Answer("stdout", "2000000\n")
