"""`hf-rlhf score`: existing completions, scored without a policy and compared with labels."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hf_rlhf.cli import main
from hf_rlhf.scoring.agreement import agreement, ranks
from hf_rlhf.testing import tiny_policy
from tests.helpers import runs
from tests.helpers.environments import Duel, Forking
from tests.helpers.servers import Server

ROWS = [
    {"prompt": "2+3=", "completion": "5", "answer": "5", "human": 1},
    {"prompt": "2+4=", "completion": "six, I think", "answer": "6", "human": 1},
    {"prompt": "2+4=", "completion": "7", "answer": "6", "human": 0},
    {"prompt": "2+4=", "completion": "7", "answer": None, "human": 0},
    {"prompt": "1+1=", "completion": "2", "answer": "2", "human": None},
    {"prompt": "1+2=", "completion": "3", "answer": "3", "human": 0},
]
FUNCTIONS = """
import os
from hf_rlhf.batch import TokenScores

def lengths(completions, **kwargs):
    print("on stdout")
    os.system("echo from a child process")
    return [float(len(text)) for text in completions]

def own(rollouts):
    return [float(len(text)) for text in rollouts.completions]

def fails(rollouts):
    raise ValueError("not today")

def turns(rollouts):
    return [float(sum(m["role"] == "assistant" for m in conversation)) for conversation in rollouts.messages]

def by_token(rollouts):
    return [TokenScores([0.5] * (len(text) + 1)) for text in rollouts.completions]
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ROWS and FUNCTIONS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write("rows.jsonl", ROWS)
    Path("functions.py").write_text(FUNCTIONS)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> str:
    file = Path(name)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(rows), file)
    return name


class Run:
    """What `hf-rlhf score WORDS` printed, and its exit code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *words: str, code: int = 0) -> str:
        self.monkeypatch.setattr(sys, "argv", ["hf-rlhf", "score", *words])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        out, errors = self.capfd.readouterr()
        assert (stopped.value.code or 0) == code, errors
        assert "Traceback" not in out + errors
        assert errors.startswith("error: ") == (code == 2)
        return errors if code == 2 else out

    def json(self, *words: str, code: int = 0) -> Any:
        """The object that --json prints, which is all that it prints."""
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capfd)


DATA = ("--dataset", "rows.jsonl")


# What is scored


def test_json_holds_a_score_or_null_per_row(run):
    assert run.json("exact_match", *DATA) == {
        "scores": {"exact_match": [1.0, 0.0, 0.0, None, 1.0, 1.0]},
        "agreement": {},
        "errors": [],
    }


def test_settings_follow_the_name(run):
    settings = ("unit=characters", "target=1", "maximum=11", "label=brief", "when={prompt_kind: x}")
    write("kinds.jsonl", [{**row, "prompt_kind": "xy"[i % 2]} for i, row in enumerate(ROWS)])
    found = run.json("length", *settings, "--dataset", "kinds.jsonl")
    assert found["scores"] == {"brief": [0.0, None, 0.0, None, 0.0, None]}
    assert run.json("length", *settings[:3], *DATA)["scores"]["length"] == [0.0, -1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_every_kind_of_file_is_read(run, name):
    rows = [row for row in ROWS if row["answer"] is not None]
    found = run.json("exact_match", "--dataset", write(name, rows), "--against", "human")
    assert found["scores"] == {"exact_match": [1.0, 0.0, 0.0, 1.0, 1.0]}
    assert found["agreement"] == {"exact_match": 0.5}


def test_completions_may_be_messages(run):
    assistant = {"role": "assistant", "content": "5"}
    rows = [
        {"prompt": [{"role": "user", "content": "2+3="}], "completion": completion, "answer": answer}
        for completion, answer in (
            ([assistant], "5"),
            (assistant, "5"),
            ([{"role": "assistant", "content": [{"type": "text", "text": "5"}]}], "5"),
            ([{**assistant, "content": None}, {"role": "tool", "content": "9"}, assistant], "\n5"),
        )
    ]
    data = ("--dataset", write("chats.jsonl", rows))
    assert run.json("exact_match", "strip=false", *data)["scores"] == {"exact_match": [1.0] * 4}
    assert run.json("functions.py:turns", *data)["scores"] == {"turns": [1.0, 1.0, 1.0, 2.0]}


@pytest.mark.parametrize("environment", [Forking(), Duel()], ids=["forks", "agents"])
def test_rows_that_a_run_kept_of_episodes_get_the_scores_that_they_got(run, place, environment):
    own = {"use": "regex", "pattern": "^[^a-z]", "label": "own"}
    options = {"rollout": {**runs.SAMPLED, "max_new_tokens": 3}, "logging": {"completions": "all"}}
    runs.trained(place / "run", environment=[environment], rewards=["episode", own], **options)
    rows = [row for file in sorted(Path("run/completions").iterdir()) for row in pq.read_table(file).to_pylist()]
    if isinstance(environment, Forking):
        contexts = [sum("fork" in span for span in json.loads(row["conversation"])) for row in rows]
        assert contexts == [3] * len(rows)
    found = run.json("regex", "pattern=^[^a-z]", "--dataset", "run/completions")["scores"]["regex"]
    assert found == [row["reward/own"] for row in rows]
    assert len(set(found)) == 2


def test_columns_may_have_other_names(run):
    rows = [{"q": "2+3=", "response": "5", "answer": "5", "stop": "length"}]
    names = ("--prompt-column", "q", "--completion-column", "response", "--finish-reason-column", "stop")
    assert run.json("exact_match", "--dataset", write("names.jsonl", rows), *names)["scores"]["exact_match"] == [1.0]
    missing = run("exact_match", "--dataset", "names.jsonl", code=2)
    assert "no column 'prompt' (the prompt; set --prompt-column)" in missing
    assert "no column 'completion'" in missing
    assert "The dataset has: answer, q, response, stop" in missing


def test_all_sources_of_a_recipe_are_asked_with_its_settings_and_its_prompts(run):
    Path("mine.yaml").write_text(
        "rollout: generate\nadvantages: group_norm\ndataset: {prompt_template: 'Q: {question}'}\n"
        "rewards:\n- {use: exact_match, column: truth}\n"
        "- {use: function, function: 'functions.py:own', label: size, on_error: raise}\n"
        "- {use: function, function: 'prompts.py:seen', label: prompt}\n"
    )
    Path("prompts.py").write_text("def seen(rollouts):\n    return [float(p == 'Q: why?') for p in rollouts.prompts]\n")
    data = ("--dataset", write("q.jsonl", [{"question": "why?", "completion": "no", "truth": "no", "other": "x"}]))
    assert run.json("mine.yaml", *data)["scores"] == {"exact_match": [1.0], "size": [2.0], "prompt": [1.0]}
    found = run.json("mine.yaml", *data, "rewards.0.column=other", "--prompt-column", "truth")
    assert found["scores"] == {"exact_match": [0.0], "size": [2.0], "prompt": [0.0]}


def test_an_installed_recipe_is_known_by_its_name(run):
    words = ("rewards=[{use: exact_match}]",)
    assert run.json("grpo", *words, *DATA)["scores"] == {"exact_match": [1.0, 0.0, 0.0, None, 1.0, 1.0]}


def test_functions_are_asked_and_what_they_print_is_no_result(run):
    assert run.json("functions.py:lengths", *DATA)["scores"] == {"lengths": [1.0, 12.0, 1.0, 1.0, 1.0, 1.0]}
    assert run.json("functions.py:own", "label=size", *DATA)["scores"] == {"size": [1.0, 12.0, 1.0, 1.0, 1.0, 1.0]}


def test_plugins_of_a_file_are_known_by_their_name(run):
    Path("mine.py").write_text(
        "from dataclasses import dataclass\nfrom hf_rlhf import hookimpl\nfrom hf_rlhf.axes import RewardSource\n\n"
        '@dataclass(kw_only=True)\nclass Twice(RewardSource):\n    """Twice."""\n\n    name = "twice_the_length"\n\n'
        "    def __call__(self, rollouts):\n        return [2 * len(text) for text in rollouts.completions]\n\n"
        "@hookimpl\ndef rewards():\n    return [Twice]\n"
    )
    found = run.json("-p", "mine.py", "twice_the_length", *DATA)
    assert found["scores"] == {"twice_the_length": [2.0, 24.0, 2.0, 2.0, 2.0, 2.0]}


def test_a_served_source_is_asked_too(run):
    def reply(body: Any, i: int) -> Any:
        return {"version": 1, "scores": [len(text) for text in body["completions"]]}

    with Server(reply) as server:
        assert run.json("remote", f"url={server.url}/", *DATA)["scores"] == {"remote": [1.0, 12.0, 1.0, 1.0, 1.0, 1.0]}


# Tokens


def test_token_ids_come_from_the_tokenizer(run):
    tiny_policy()[1].save_pretrained("tokenizer")
    rows = [{**row, "finish_reason": "length" if i == 1 else "stop"} for i, row in enumerate(ROWS)]
    data = ("--dataset", write("reasons.jsonl", rows), "--tokenizer", "tokenizer")
    # 1 character and the end of sequence; 12 characters, cut off
    assert run.json("length", "target=1", "maximum=11", *data)["scores"]["length"] == [-0.1, -1, -0.1, -0.1, -0.1, -0.1]
    found = run.json("functions.py:by_token", "--dataset", "rows.jsonl", "--tokenizer", "tokenizer")
    assert found["scores"]["by_token"] == [1.0, 6.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("workers", ["inline", "threads", "processes"])
def test_without_a_tokenizer_a_source_that_counts_tokens_is_refused(run, workers):
    said = run("length", f"workers={workers}", "num_workers=1", *DATA, code=2)
    assert "reward 'length' reads token ids or masks" in said
    assert "--tokenizer" in said


def test_without_a_tokenizer_scores_by_token_are_refused(run):
    assert "reads token ids or masks" in run("functions.py:by_token", *DATA, code=2)


# What is printed


def test_the_table_counts_rows_and_sums_up(run):
    out = run("exact_match", *DATA).splitlines()
    assert out[0].split() == ["source", "rows", "scored", "missing", "failed", "mean", "std", "min", "max", "s/row"]
    assert out[1].split()[:9] == ["exact_match", "6", "5", "1", "0", "0.6", "0.4899", "0", "1"]
    assert len(out) == 2


def test_against_prints_agreement_confusion_and_disagreements(run):
    out = run("exact_match", *DATA, "--against", "human")
    assert "exact_match: equal to the label in 2 of 4 rows (0.5)" in out
    table = [line.split() for line in out.splitlines()]
    assert ["score", "1", "score", "0", "no", "score"] in table
    assert [line for line in table if line[:1] in (["label"], ["no"])] == [
        ["label", "1", "1", "1", "0"],
        ["label", "0", "1", "1", "1"],
        ["no", "label", "1", "0", "0"],
    ]
    assert "row 1: label 1, score 0: '2+4=' -> 'six, I think'" in out
    assert "row 5: label 0, score 1: '1+2=' -> '3'" in out
    assert "rows differ" not in out
    capped = run("exact_match", *DATA, "--against", "human", "--show", "1")
    assert "row 1:" in capped
    assert "row 5:" not in capped
    assert "2 rows differ; the first 1 are shown" in capped


def test_real_valued_scores_are_correlated(run):
    rows = [{"prompt": "p", "completion": "x" * n, "grade": grade} for n, grade in ((1, 0.1), (2, 0.3), (5, 0.2))]
    words = ("functions.py:own", "--dataset", write("grades.jsonl", rows), "--against", "grade")
    # lengths 1, 2, 5 and grades 1, 3, 2 (tenths): covariance 1/2, variances 13/3 and 1
    pearson = 0.5 / (13 / 3) ** 0.5
    assert run.json(*words)["agreement"]["own"] == pytest.approx(pearson)
    assert "own: Pearson 0.2402, Spearman 0.5 with the labels, over 3 rows" in run(*words)


def test_rows_that_fail_are_listed_and_the_exit_code_is_1(run, caplog):
    found = run.json("functions.py:fails", *DATA, code=1)
    assert found["scores"] == {"fails": [None] * 6}
    assert [error["row"] for error in found["errors"]] == list(range(6))
    assert found["errors"][0].keys() == {"source", "row", "kind", "reason"}
    assert (found["errors"][0]["source"], found["errors"][0]["kind"]) == ("fails", "error")
    assert "not today" in found["errors"][0]["reason"]
    out = run("functions.py:fails", "on_error=0.25", *DATA, "--show", "2", code=1)
    assert out.splitlines()[1].split()[:9] == ["fails", "6", "6", "0", "6", "0.25", "0", "0.25", "0.25"]
    assert "fails, row 0: error: raised RuntimeError" in out
    assert "6 rows failed; the first 2 are shown" in out
    assert not caplog.records, "they are listed, and need no warning"


@pytest.mark.parametrize("on_error", ["raise", "none"])
def test_a_failure_ends_nothing_whatever_a_training_would_do(run, on_error):
    assert len(run.json("functions.py:fails", f"on_error={on_error}", *DATA, code=1)["errors"]) == 6


def test_metrics_of_a_source_are_printed(run):
    def reply(body: Any, i: int) -> Any:
        message = {"role": "assistant", "content": "Score: 3"}
        return {"choices": [{"message": message}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}

    with Server(reply) as server:
        out = run("judge", f"base_url={server.url}", "model=m", "prompt_price=1e6", *DATA)
    assert "judge, mean over rows: prompt_tokens 10, completion_tokens 2, cost 10" in out
    assert "cost_total 60" in out


# What cannot be


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("exact_mach",), "no recipe and no reward plugin named 'exact_mach'. Did you mean 'exact_match'?"),
        (("exact_match", "colum=x"), "no such setting. Did you mean 'column'?"),
        (("exact_match", "x"), "settings must be KEY=VALUE, such as column=answer, got 'x'"),
        (
            ("exact_match", "column=truth"),
            "rewards.exact_match reads truth. The dataset has: answer",
        ),
        (("functions.py",), "Name a function in it as functions.py:FUNCTION"),
        (("functions.py:lenghts",), "has no function 'lenghts'; it has: lengths, own"),
        (("nowhere.py:f",), "no such file"),
        (("nowhere.yaml",), "there is no recipe file nowhere.yaml"),
        (("grpo", "rewards=[]"), "no reward source"),
        (("exact_match", "--against", "label"), "no column 'label' (the labels of --against)"),
        (
            ("exact_match", "--against", "completion"),
            "row 1: completion must be a number, true or false for --against, got 'six, I think'",
        ),
        (
            ("exact_match", "--completion-column", "human"),
            "row 0: the completion must be a text or assistant messages, got '1'",
        ),
        (("exact_match", "--tokenizer", "./none"), "no folder ./none"),
        (("reward_model", "model=./none"), "./none"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_what_cannot_be_scored_is_one_error(run, words, says):
    assert says in run(*words, *DATA, code=2)


def test_a_dataset_is_asked_for_and_must_hold_rows(run):
    assert "score needs a dataset. Pass --dataset FILE" in run("exact_match", code=2)
    assert "no dataset file or folder none.jsonl" in run("exact_match", "--dataset", "none.jsonl", code=2)
    assert "empty.jsonl has no rows" in run("exact_match", "--dataset", write("empty.jsonl", []), code=2)
    empty = [{**ROWS[0], "prompt": ""}]
    assert "prompt of row 1 is empty" in run("exact_match", "--dataset", write("blank.jsonl", empty), code=2)


# Agreement


def test_agreement_of_zeros_and_ones_is_the_share_that_is_equal():
    found = agreement([1, 0, 1, None, 0.0], [True, 1, None, 0, False])
    assert (found.rows, found.binary, found.differing) == (3, True, [1])
    assert found.number == pytest.approx(2 / 3)
    assert found.confusion == {(1, 1): 1, (1, 0): 1, (None, 1): 1, (0, None): 1, (0, 0): 1}


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks([3, 1, 3, 2]) == [3.5, 1.0, 3.5, 2.0]
    found = agreement([1, 2, 3, 4], [10, 20, 30, 1000])
    assert found.spearman == pytest.approx(1.0)
    assert found.pearson is not None
    assert found.pearson < 0.9
    assert agreement([1, 2, 3], [3, 2, 1]).number == pytest.approx(-1.0)


def test_what_is_constant_or_empty_agrees_with_nothing():
    assert agreement([0.5, 0.5], [1, 2]).number is None
    assert agreement([2.0], [1]).number is None
    assert agreement([None, 1], [1, None]).number is None
